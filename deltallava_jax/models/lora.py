"""Low-rank adapters (LoRA) beside frozen matrices: y = x W + scale * (dropout(x) A) B.

In the parameters A and B lie beside the matrix that they adapt: ``decoder/layers/q/kernel``, ``.../lora_a`` [L, in, r]
and ``.../lora_b`` [L, r, out], stacked like the layers. ``assembled`` puts the three into one ``Adapted`` in the
kernel's place, which any Linear can call; ``merged`` gives plain matrices, for inference and exports."""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from zlib import crc32

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float

from deltallava_jax.arrays import Array
from deltallava_jax.config import LoraConfig
from deltallava_jax.errors import ConfigError
from deltallava_jax.models import quantized
from deltallava_jax.models.layers import ADAPTED, Params
from deltallava_jax.models.names import flatten, unflatten
from deltallava_jax.products import matmul

A, B = "lora_a", "lora_b"
MATRICES = r"^(vision|decoder)/layers/(\w+)/kernel$"  # that can have adapters
QUANTISED = r"^decoder/layers/\w+/kernel$"  # where the base is


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Adapted:
    """A frozen matrix with its adapter, or a stack of them.

    keys: of the dropout, one for each matrix; None without dropout."""

    kernel: Array | quantized.Quantized
    a: Float[Array, "... C r"]
    b: Float[Array, "... r D"]
    keys: Array | None
    scale: float = field(metadata={"static": True})
    dropout: float = field(metadata={"static": True})

    def product(self, x: Float[Array, "... C"]) -> Float[Array, "... D"]:
        """x W + scale * (dropout(x) A) B; of it the backward pass finds the sum saved, not its two terms."""
        return checkpoint_name(_product(x, self), ADAPTED)


@functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.nothing_saveable)
def _product(x: Array, matrix: Adapted) -> Array:
    kernel = matrix.kernel
    base = matmul(x, kernel) if isinstance(kernel, jax.Array) else kernel.product(x)
    with jax.named_scope("adapter"):
        if matrix.keys is not None:
            kept = jax.random.bernoulli(matrix.keys, 1 - matrix.dropout, x.shape)
            x = jnp.where(kept, x / (1 - matrix.dropout), 0).astype(x.dtype)
        return base + matmul(matmul(x, matrix.a) * matrix.scale, matrix.b)


def is_adapter(path: str) -> bool:
    return path.endswith((f"/{A}", f"/{B}"))


def adapted(path: str) -> str:
    """The path of the matrix that an adapter belongs to; any other path as it is."""
    return f"{path.rpartition('/')[0]}/kernel" if is_adapter(path) else path


def trained_whole(paths: Iterable[str]) -> list[str]:
    """Of the parameters that train, those that are neither adapters nor the projector."""
    return [path for path in paths if not is_adapter(path) and not path.startswith("projector/")]


def targets(cfg: LoraConfig, paths: Iterable[str]) -> list[str]:
    """The modules that get an adapter, as "decoder/layers/q".

    Names ("q,v"; "q_proj,v_proj" too) and regular expressions that do not name the tower ("vision") mean the decoder
    alone, as in LLaVA. Raises ConfigError for targets that match nothing, or anything but a layer's matrix."""
    modules = [path.removesuffix("/kernel") for path in paths if re.search(MATRICES, path)]
    names = re.fullmatch(r"\w+(\s*,\s*\w+)*\s*,?\s*", cfg.targets)
    wanted = [name.strip().removesuffix("_proj") for name in cfg.targets.split(",") if name.strip()] if names else []
    unknown = [name for name in wanted if not any(module.endswith(f"/{name}") for module in modules)]
    if unknown:
        known = sorted({module.rsplit("/", 1)[1] for module in modules if module.startswith("decoder/")})
        raise ConfigError(f"lora.targets: no matrix {unknown[0]!r} in the decoder's layers; known: {', '.join(known)}")
    pattern = rf"/({'|'.join(wanted)})$" if names else cfg.targets
    tower = "vision" in pattern
    forms = lambda module: (module, f"{module}/kernel", f"{module}_proj")
    found = [
        module
        for module in modules
        if (tower or module.startswith("decoder/")) and any(re.search(pattern, form) for form in forms(module))
    ]
    if not found:
        adaptable = [module for module in modules if tower or module.startswith("decoder/")]
        near = difflib.get_close_matches(cfg.targets, adaptable or modules, n=1, cutoff=0.0)
        raise ConfigError(f"lora.targets={cfg.targets!r} matches no matrix of a layer, e.g. {near[0]!r}")
    return found


def shapes(cfg: LoraConfig, kernels: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """{path: shape} of the adapters of a model whose parameters are ``kernels``: {path: shape}."""
    found = {}
    for module in targets(cfg, kernels):
        *stack, inputs, outputs = kernels[f"{module}/kernel"]
        found |= {f"{module}/{A}": (*stack, inputs, cfg.rank), f"{module}/{B}": (*stack, cfg.rank, outputs)}
    return found


def added(params: Params, cfg: LoraConfig, key: Array) -> Params:
    """The parameters with fresh float32 adapters: A uniform within in**-0.5 (torch's kaiming_uniform_ with a = sqrt 5,
    as in peft), B zero."""
    flat = flatten(params)
    for path, shape in shapes(cfg, {path: leaf.shape for path, leaf in flat.items()}).items():
        bound = shape[-2] ** -0.5
        draw = lambda shape=shape, path=path, bound=bound: jax.random.uniform(
            jax.random.fold_in(key, crc32(path.encode())), shape, minval=-bound, maxval=bound
        )
        flat[path] = draw() if path.endswith(A) else jnp.zeros(shape)
    return unflatten(flat)


def quantize(frozen: Params, kind: str) -> Params:
    """The frozen parameters with the matrices of the decoder's layers in ``kind``: nf4, int8, or bfloat16 as it is."""
    if kind == "bfloat16":
        return frozen
    flat = flatten(frozen)
    for path in list(flat):
        if re.search(QUANTISED, path):
            kernel = flat.pop(path).astype(jnp.bfloat16)  # as frozen parameters are kept; of any other the codes differ
            flat |= {f"{path}/{name}": part for name, part in quantized.quantize(kernel, kind).items()}
    return unflatten(flat)


def assembled(params: Params, cfg: LoraConfig, key: Array | None = None) -> Params:
    """The parameters with every quantised matrix, and every matrix with its adapter, as one leaf that a Linear calls.

    key: of the dropout; None without."""

    def walk(node, path: str):
        if not isinstance(node, dict):
            return node
        node = {name: walk(child, f"{path}/{name}") for name, child in node.items()}
        if "scale" in node and ("nf4" in node or "int8" in node):
            return quantized.assembled(node)
        if A not in node:
            return node
        a, b = node.pop(A), node.pop(B)
        keys = None
        if key is not None and cfg.dropout:
            keys = jax.random.fold_in(key, crc32(path.encode()))
            keys = jax.random.split(keys, a.shape[:-2]) if a.ndim > 2 else keys
        return node | {"kernel": Adapted(node["kernel"], a, b, keys, cfg.scale, cfg.dropout)}

    return walk(params, "")


def merged(params: Params, cfg: LoraConfig, dtype=None) -> Params:
    """Plain matrices W + scale * A B, added in float32, in the dtype of W, or in ``dtype`` (path -> dtype or None).

    Quantised matrices are what their codes stand for, in bfloat16, as the adapters were trained with them."""
    flat = flatten(params)
    out = {}
    for path, leaf in flat.items():
        module = path.rsplit("/", 1)[0]
        if path.endswith(("/kernel/nf4", "/kernel/int8")):
            kernel = quantized.assembled({path.rsplit("/", 1)[1]: leaf, "scale": flat[f"{module}/scale"]})
            path, module, kind = module, module.rsplit("/", 1)[0], jnp.bfloat16
        elif is_adapter(path) or path.endswith("/kernel/scale"):
            continue
        else:
            kernel, kind = leaf, leaf.dtype
        kind = (dtype and dtype(path)) or kind
        a = flat.get(f"{module}/{A}") if path.endswith("/kernel") else None
        if a is None and isinstance(kernel, jax.Array):
            out[path] = kernel if kernel.dtype == kind else kernel.astype(kind)
        else:
            out[path] = _merged(kernel, a, flat.get(f"{module}/{B}"), cfg.scale, jnp.dtype(kind))
    return unflatten(out)


@functools.partial(jax.jit, static_argnames=("scale", "dtype"))
def _merged(kernel, a, b, scale: float, dtype) -> Array:
    def one(layer):
        kernel, a, b = layer
        whole = kernel.astype(jnp.float32) if isinstance(kernel, jax.Array) else kernel.whole(jnp.float32)
        if a is not None:
            whole = whole + scale * jnp.matmul(a, b, precision="highest", preferred_element_type=jnp.float32)
        return whole.astype(dtype)

    stacked = (kernel if isinstance(kernel, jax.Array) else kernel.codes).ndim > 2
    return (jax.lax.map if stacked else lambda f, x: f(x))(one, (kernel, a, b))

"""Sharding rules, which mesh axis divides which dimension: one ordered table for parameters and optimizer state."""

from __future__ import annotations

import math
import re

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from deltallava_jax.errors import ConfigError

# The first pattern that matches the path applies. The leading dimension of stacked layers stays whole.
RULES: tuple[tuple[str, P], ...] = (
    (r"decoder/embed/embedding$", P("tensor", "fsdp")),
    (r"decoder/head/out/kernel$", P("fsdp", "tensor")),
    (r"(vision|decoder)/layers/(q|k|v|gate|up)/kernel(/|$)", P(None, "fsdp", "tensor")),
    (r"(vision|decoder)/layers/(q|k|v|gate|up)/bias$", P(None, "tensor")),
    (r"(vision|decoder)/layers/(o|down)/kernel(/|$)", P(None, "tensor", "fsdp")),
    (r"(vision|decoder)/layers/(q|k|v|gate|up)/lora_a$", P(None, "fsdp", None)),
    (r"(vision|decoder)/layers/(q|k|v|gate|up)/lora_b$", P(None, None, ("tensor", "fsdp"))),
    (r"(vision|decoder)/layers/(o|down)/lora_a$", P(None, ("tensor", "fsdp"), None)),
    (r"(vision|decoder)/layers/(o|down)/lora_b$", P(None, None, "fsdp")),
)
OPTIONAL = r"head/out/kernel|lora_"  # rules of what not every model has: a tied head has no matrix
FALLBACK_SIZE = 2**16  # smaller arrays stay whole on every device


def spec_for(path: str, shape: tuple[int, ...], mesh: Mesh) -> P:
    """The PartitionSpec of one array: by rule, else its largest divisible dimension over fsdp.

    Raises ConfigError where a rule names a dimension that the mesh axis does not divide."""
    for pattern, spec in RULES:
        if re.search(pattern, path):
            for size, axes in zip(shape, spec, strict=True):
                axes = axes if isinstance(axes, tuple) else (axes,) if axes else ()
                if path.endswith("kernel/scale"):  # of blocks of a quantised matrix: small, and few in a narrow one
                    return P()
                if size % math.prod(mesh.shape[axis] for axis in axes):
                    named = " x ".join(f"{axis}={mesh.shape[axis]}" for axis in axes)
                    raise ConfigError(f"{path} {shape}: {size} is not divisible by mesh {named}")
            return spec
    fsdp = mesh.shape["fsdp"]
    divisible = [i for i, size in enumerate(shape) if size % fsdp == 0]
    if fsdp == 1 or math.prod(shape) < FALLBACK_SIZE or not divisible:
        return P()
    largest = max(divisible, key=lambda i: shape[i])
    return P(*("fsdp" if i == largest else None for i in range(len(shape))))


def shardings(tree, mesh: Mesh):
    """NamedSharding of every leaf of a model's train state; optimizer moments are sharded as their parameters.

    Raises ConfigError for a rule that matches nothing, or as ``spec_for``."""
    paths = [_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    for pattern, _ in RULES:
        if not re.search(OPTIONAL, pattern) and not any(re.search(pattern, path) for path in paths):
            raise ConfigError(f"the sharding rule {pattern!r} matches no parameter, e.g. {paths[0]}")

    def sharding(path, leaf) -> NamedSharding:
        return NamedSharding(mesh, spec_for(_name(path), leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(sharding, tree)


def _name(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")

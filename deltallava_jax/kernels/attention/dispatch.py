"""The choice of dense attention's implementation (XLA, cuDNN or splash attention), and the attention mask."""

from __future__ import annotations

import importlib
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from deltallava_jax.arrays import Array
from deltallava_jax.kernels import devices

KERNELS = {"splash": "tpu", "cudnn": "gpu"}
IMPLEMENTATIONS = ("xla", *KERNELS)
# Platform -> (kernel chosen automatically, least number of keys), e.g. {"tpu": ("splash", 1024)} once it has run on one
# (benchmarks/measure/kernels.py). XLA keeps the scores of all heads in memory, the kernels keep none.
AUTOMATIC: dict[str, tuple[str, int]] = {}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AttentionMask:
    """Which keys a query attends to. segments: set where the mask is ``causal(segments)``, so that a kernel can do
    without ``allowed``; XLA drops an array that the program does not use."""

    allowed: Bool[Array, "B 1 Q K"]
    segments: Int[Array, "B S"] | None = None


def causal(segments: Int[Array, "B S"]) -> AttentionMask:
    """Self-attention within rows: a token attends to itself and the tokens before it of its own segment. So nothing but
    padding attends to padding, segment 0."""
    positions = jnp.arange(segments.shape[1])
    allowed = (segments[:, :, None] == segments[:, None, :]) & (positions[None, :] <= positions[:, None])
    return AttentionMask(allowed[:, None], segments)


def attention(
    q: Float[Array, "B Q H D"],
    k: Float[Array, "B K G D"],
    v: Float[Array, "B K G D"],
    mask: AttentionMask | None = None,
    *,
    implementation: str | None = None,
) -> Float[Array, "B Q H D"]:
    """Attention with scale D**-0.5, softmax in float32; H may be a multiple of the key heads G. mask: None: all keys.

    implementation: "xla"; "splash" on a TPU, for rows that attend to themselves, whole or by segments; "cudnn" on an
    NVIDIA GPU, in half precision; None: the platform's kernel of AUTOMATIC for long rows where it can run, else XLA,
    logged once. The platform is that of the mesh in use, which may be that of another machine. Under a mesh the kernels
    run on each device's own rows and heads.

    Raises ValueError where a kernel given by name cannot run."""
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(f"implementation={implementation!r}; expected {', '.join(IMPLEMENTATIONS)} or None")
    name = implementation or choose(q, k, mask)
    if name == "xla":
        return jax.nn.dot_product_attention(q, k, v, mask=None if mask is None else mask.allowed, implementation="xla")
    if reason := refusal(name, q, k, mask):
        raise ValueError(f'implementation="{name}": {reason}')
    heads = devices.rows_spec(4, heads_at=2)
    rows = devices.rows_spec()
    return devices.per_device(_backend(name).attend, (heads, heads, heads, rows), heads)(q, k, v, mask)


def refusal(name: str, q, k, mask: AttentionMask | None) -> str | None:
    """Why a kernel cannot run on the target devices or on such arrays; None where it can."""
    platform = devices.device()[0]
    if platform != KERNELS[name]:
        return f"runs on a {KERNELS[name]}, not on a {platform}"
    if reason := devices.indivisible(q.shape[0], q.shape[2], k.shape[2]):
        return reason
    return _backend(name).refusal(q, k, mask)


def choose(q, k, mask: AttentionMask | None) -> str:
    """The automatic choice for arrays of these shapes and dtypes; logs a rejected kernel once."""
    name, least = AUTOMATIC.get(devices.device()[0], ("xla", 0))
    if name == "xla" or q.shape[1] != k.shape[1] or k.shape[1] < least:
        return "xla"
    if reason := refusal(name, q, k, mask):
        devices.log_once(f"attention over {q.shape[1]} tokens runs in XLA: {name} {reason}")
        return "xla"
    return name


def _backend(name: str):
    return importlib.import_module(f"deltallava_jax.kernels.attention.{name}")

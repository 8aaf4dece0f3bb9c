"""The choice of dense attention's implementation (XLA, cuDNN or splash attention), and the attention mask."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from deltallava_jax.arrays import Array
from deltallava_jax.kernels import devices
from deltallava_jax.kernels.registry import Operation

SKIPPING = "causal_kernel"  # named scope of a kernel that computes no scores of later tokens


def _refusal_of_all(q, k, mask) -> str | None:
    return devices.indivisible(q.shape[0], q.shape[2], k.shape[2])


# XLA keeps the scores of all heads in memory, the kernels keep none. Neither has run on its device yet.
OPERATION = Operation(
    name="dense attention",
    package=__package__,
    kernels={"splash": {"tpu": "splash"}, "cudnn": {"gpu": "cudnn"}},
    refusal_of_all=_refusal_of_all,
)


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


def kernel_outputs_saveable(primitive, *_, **params) -> bool:
    """A policy of jax.checkpoint: what the kernels' forward passes give to their backward passes is saved."""
    if primitive.name == "pallas_call":
        return (params.get("name") or "").startswith("splash_mha_fwd")
    return primitive.name.startswith("dot_product_attention_fwd")  # cuDNN's


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
    NVIDIA GPU, in half precision; None: the kernel that was measured to be faster, else XLA, logged once. The platform
    is that of the mesh in use, which may be that of another machine. Under a mesh the kernels run on each device's own
    rows and heads.

    Raises ValueError where a kernel given by name cannot run."""
    name = OPERATION.select(implementation, q, k, mask)
    if name == "xla":
        return jax.nn.dot_product_attention(q, k, v, mask=None if mask is None else mask.allowed, implementation="xla")
    heads = devices.rows_spec(4, heads_at=2)
    rows = devices.rows_spec()
    kernel = devices.per_device(OPERATION.kernel(name).attend, (heads, heads, heads, rows), heads)
    with jax.named_scope(SKIPPING if mask is not None and mask.segments is not None else name):
        return kernel(q, k, v, mask)

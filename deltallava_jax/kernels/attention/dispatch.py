"""The choice of dense attention's implementation (XLA, blocks, cuDNN or splash attention), and the attention mask."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from deltallava_jax.arrays import Array
from deltallava_jax.kernels import devices
from deltallava_jax.kernels.registry import Call, Operation, Trial

SAVED = "attention"  # name, for jax.checkpoint, of what a kernel's forward pass gives to its backward pass
SKIPPING = "causal_kernel"  # named scope of a kernel that computes no scores of later tokens
TRIANGLE = "causal_blocks_"  # named scope, ending in a row's number of blocks, of products up to the diagonal alone


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


SEGMENTS = 5  # of a measured row
MIN_LENGTH = 256  # of the rows from which on the library's kernels are taken unmeasured
MEASURED_SCORES = 2**28  # most scores of a measured call: XLA has several such arrays in memory, 1 GiB each in float32
MIN_PACKED = 128  # of packed rows on a CPU from which on blocks are taken: at 64 a forward pass is slower
LIBRARY = {"gpu": "cudnn", "tpu": "splash"}  # MaxText's choices on NVIDIA GPUs and TPUs


def _refusal_of_all(q, k, mask) -> str | None:
    return devices.indivisible(q.shape[0], q.shape[2], k.shape[2])


def _is_self_attention(q, k, mask) -> bool:
    return q.shape[1] == k.shape[1]


def _default(platform: str, q, k, mask) -> str | None:
    if not _is_self_attention(q, k, mask):
        return None
    if platform == "cpu":
        packed = mask is not None and mask.segments is not None
        return "blocks" if packed and q.shape[1] >= MIN_PACKED else None
    return LIBRARY.get(platform) if q.shape[1] >= MIN_LENGTH else None


def _call(q, k, mask) -> Call:
    over_rows, over_heads = devices.shards()
    rows, queries, heads, width = q.shape
    heads, key_heads = (max(count // over_heads, 1) for count in (heads, k.shape[2]))
    rows = min(max(rows // over_rows, 1), max(MEASURED_SCORES // (heads * queries * k.shape[1]), 1))
    kind = "all keys" if mask is None else "any mask" if mask.segments is None else "causal segments"
    shapes = (rows, queries, heads, width), (rows, k.shape[1], key_heads, width)
    return Call("attention", shapes, str(q.dtype), kind)


def _trial(call: Call) -> Trial:
    """Random arrays; where the mask has segments, several of different lengths, with padding within and at the end."""
    shapes = (*call.shapes, call.shapes[1])
    q, k, v = (jax.random.normal(jax.random.key(seed), shape) for seed, shape in enumerate(shapes))
    rows, queries, keys = q.shape[0], q.shape[1], k.shape[1]
    mask = None
    if call.kind != "all keys":
        ends = jnp.sort(jax.random.randint(jax.random.key(3), (rows, SEGMENTS), 0, keys))
        places = jnp.arange(keys)
        segments = 1 + (places[None, :, None] >= ends[:, None, :]).sum(-1, dtype=jnp.int32)
        segments = jnp.where((segments > SEGMENTS) | (places % 50 == 49), 0, segments)
        mask = causal(segments)
    if call.kind == "any mask":
        mask = AttentionMask(mask.allowed[:, :, keys - queries :])
    run = lambda implementation, q, k, v: attention(q, k, v, mask, implementation=implementation)
    given = [jax.ShapeDtypeStruct(shape, call.dtype) for shape in call.shapes]
    return Trial((*given, mask), (q, k, v), run)


OPERATION = Operation(
    name="dense attention",
    setting="attention",
    package=__package__,
    kernels={
        "blocks": {"cpu": ".blocks"},
        "splash": {"tpu": ".splash"},
        "cudnn": {"gpu": ".cudnn"},
        "cudnn_segments": {"gpu": ".cudnn_segments"},
    },
    refusal_of_all=_refusal_of_all,
    is_forced=_is_self_attention,
    default=_default,
    settled={"cpu"},
    call=_call,
    trial=_trial,
)


def kernel_outputs_saveable(primitive, *_, **params) -> bool:
    """A policy of jax.checkpoint: what the kernels' forward passes give to their backward passes is saved."""
    if primitive.name == "pallas_call":
        return (params.get("name") or "").startswith("splash_mha_fwd")
    if primitive.name == "name":
        return params["name"] == SAVED
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

    implementation: "xla"; "blocks" on a CPU, for packed rows; "splash" on a TPU, for rows that attend to themselves,
    whole or by segments; "cudnn" on an NVIDIA GPU, in half precision; None: the choice of registry.py, and XLA, logged
    once, where that kernel cannot run. The platform is that of the mesh in use, which may be that of another machine.
    Under a mesh the kernels run on each device's own rows and heads.

    Raises ValueError where a kernel given by name cannot run."""
    name = OPERATION.select(implementation, q, k, mask)
    if name == "xla":
        return jax.nn.dot_product_attention(q, k, v, mask=None if mask is None else mask.allowed, implementation="xla")
    heads = devices.rows_spec(4, heads_at=2)
    rows = devices.rows_spec()
    kernel = devices.per_device(OPERATION.kernel(name).attend, (heads, heads, heads, rows), heads)
    with jax.named_scope(SKIPPING if mask is not None and mask.segments is not None else name):
        return kernel(q, k, v, mask)

"""cuDNN's flash attention of packed rows without what JAX's interface adds: the gradient of the mask, and on GPUs from
Hopper on the mask itself. There each segment is a sequence of its own, given by offset and length, so nothing is
computed across segments.

JAX wraps these forms of cuDNN's calls in private parts only. Here XLA's custom calls are made through jax.ffi, which
takes calls of their kind but does not promise that they stay: so this is never taken unmeasured. Rows with a segment
that is not in one piece (visual tokens that do not exist lie within), or of more than SEGMENTS, take the mask, decided
on the device."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from deltallava_jax.kernels import devices
from deltallava_jax.kernels.attention import cudnn

SEGMENTS = 32  # most of a row, padding counted; the saved logsumexp is [B * SEGMENTS, H, S]
MASKED = {"bfloat16": -(2.0**41), "float16": -(2.0**15)}  # far from the least number, as in jax.nn, for cuDNN's sake
# Products of q, k, v and their gradients with scores, in XLA's description of a call: contracted and batch dimensions.
FORWARD = {"bmm1": ((3, 3), (0, 2), (0, 2)), "bmm2": ((3, 1), (0, 1), (0, 2))}
BACKWARD = {
    "bmm1_grad_gemm1": ((2, 1), (0, 1), (0, 2)), "bmm1_grad_gemm2": ((3, 1), (0, 1), (0, 2)),
    "bmm2_grad_gemm1": ((2, 1), (0, 1), (0, 2)), "bmm2_grad_gemm2": ((3, 3), (0, 2), (0, 2)),
}  # fmt: skip


def refusal(q, k, mask) -> str | None:
    """Why the kernel cannot run on the target GPU or on these arrays; None where it can."""
    if mask is None or mask.segments is None:
        return "takes rows that attend to themselves causally by segments"
    return cudnn.refusal(q, k, mask)


def attend(q, k, v, mask):
    """Shapes as in dispatch.attention. Rows are padded, for the mask's sake, as in cudnn.py."""
    more = -q.shape[1] % cudnn.BLOCK
    pad = lambda x: jnp.pad(x, ((0, 0), (0, more), *[(0, 0)] * (x.ndim - 2)))
    return _attend(*map(pad, (q, k, v, mask.segments)))[:, : q.shape[1]]


@jax.custom_vjp
def _attend(q, k, v, segments):
    return _forward(q, k, v, segments)[0]


def _forward(q, k, v, segments):
    """(the output, what the backward pass needs)."""
    rows, length, heads, _ = q.shape
    stats = jax.ShapeDtypeStruct((rows, heads, length), jnp.float32)
    several = jax.ShapeDtypeStruct((rows * SEGMENTS, heads, length), jnp.float32)

    def masked(q, k, v, segments):
        return _call("ScaleBiasSoftmax", q, k, 1, FORWARD, [q, stats], q, k, v, _mask(segments, q.dtype))

    def packed(q, k, v, segments):
        return _call("Softmax", q, k, SEGMENTS, FORWARD, [q, several], q, k, v, *sequences(q, k, segments)[1])

    def masked_as_packed(*arrays):
        out, found = masked(*arrays)
        return out, jnp.pad(found, ((0, several.shape[0] - rows), (0, 0), (0, 0)))

    if _takes_sequences(q, k):
        fits = sequences(q, k, segments)[0]
        out, found = jax.lax.cond(fits, packed, masked_as_packed, q, k, v, segments)
    else:
        out, found = masked(q, k, v, segments)
    out, found = (checkpoint_name(x, "attention") for x in (out, found))  # as splash attention's
    return out, (q, k, v, segments, out, found)


def _backward(saved, gradient):
    q, k, v, segments, out, stats = saved

    def masked(gradient):
        mask = _mask(segments, q.dtype)
        operands = q, k, v, stats[: len(q)], gradient, mask, out
        return _call("ScaleBiasSoftmaxBackward", q, k, 1, BACKWARD, [q, k, k], *operands)

    def packed(gradient):
        operands = q, k, v, stats, gradient, out, *sequences(q, k, segments)[1]
        return _call("SoftmaxBackward", q, k, SEGMENTS, BACKWARD, [q, k, k], *operands)

    if _takes_sequences(q, k):
        return *jax.lax.cond(sequences(q, k, segments)[0], packed, masked, gradient), None
    return *masked(gradient), None


_attend.defvjp(_forward, _backward)


def _takes_sequences(q, k) -> bool:
    """Heads that share keys are left out: JAX counts the keys' offsets in queries there, which cannot be right."""
    return devices.from_hopper_on() and q.shape[2] == k.shape[2]


def _mask(segments, dtype):
    """What is added to the scores, besides the causal order, which is told by its type."""
    same = segments[:, :, None] == segments[:, None, :]
    return jnp.where(same, 0, MASKED[str(dtype)])[:, None].astype(dtype)


def sequences(q, k, segments):
    """(whether the rows' segments are in one piece and no more than SEGMENTS, (lengths of queries, of keys [B, M],
    offsets of queries, of keys [B, M + 1])): int32, those of all rows first, then lengths of 0 at the arrays' end.
    Offsets count numbers, not tokens."""
    rows, length = segments.shape
    ordered = jnp.where(segments == 0, jnp.iinfo(jnp.int32).max, segments)
    rises = ordered[:, 1:] - ordered[:, :-1]
    number = jnp.pad(jnp.cumsum(rises != 0, axis=1), ((0, 0), (1, 0)))  # [B, S], of the segment in its row
    fits = (ordered[:, 1:] >= ordered[:, :-1]).all() & (number.max() < SEGMENTS)
    lengths = (number[:, :, None] == jnp.arange(SEGMENTS)).sum(1, dtype=jnp.int32)  # [B, M]
    starts = jnp.cumsum(lengths, axis=1) - lengths + length * jnp.arange(rows)[:, None]
    starts = jnp.where(lengths > 0, starts, rows * length)
    order = jnp.argsort(lengths.reshape(-1) == 0, stable=True)
    lengths, starts = (x.reshape(-1)[order].astype(jnp.int32) for x in (lengths, starts))
    starts = jnp.pad(starts, (0, rows), constant_values=rows * length).reshape(rows, -1)
    lengths = lengths.reshape(rows, -1)
    return fits, (lengths, lengths, *(starts * x.shape[2] * x.shape[3] for x in (q, k)))


def _call(name: str, q, k, segments: int, products, results, *operands):
    """XLA's call of cuDNN. segments: of a row, 1: not divided. results: arrays or shapes of what it gives, those
    [B, S, H, D] as they lie in memory."""
    rows, length, heads, width = q.shape
    described = {
        "fmha_scale": width**-0.5,
        "mask_type": "CAUSAL" if segments == 1 else "PADDING_CAUSAL",
        "max_seg_per_batch": segments,
        "is_flash_attention": True,
        "algorithm": {"algo_id": "0", "math_type": "TENSOR_OP_MATH", "tuning_knobs": {"17": "1", "24": "0"},
                      "is_cudnn_frontend": True, "workspace_size": "0"},
        "intermediate_tensor_shape": {
            "element_type": {"bfloat16": "BF16", "float16": "F16"}[str(q.dtype)],
            "dimensions": [str(size) for size in (rows, heads, length, k.shape[1])],
            "layout": {"minor_to_major": ["3", "2", "1", "0"]}, "is_dynamic_dimension": [False] * 4,
        },
    }  # fmt: skip
    for product, (contracted, *batch) in products.items():
        described[f"{product}_dot_dimension_numbers"] = {
            f"{side}_{kind}_dimensions": list(map(str, dimensions))
            for side, one, several in zip(("lhs", "rhs"), contracted, batch, strict=True)
            for kind, dimensions in (("contracting", (one,)), ("batch", several))
        }
    by_heads = lambda x: (x.shape[0], x.shape[2], x.shape[1], x.shape[3]) if x.ndim == 4 else x.shape
    *found, _ = jax.ffi.ffi_call(
        f"__cudnn$fmha{name}",
        [*(jax.ShapeDtypeStruct(by_heads(x), x.dtype) for x in results), jax.ShapeDtypeStruct((0,), jnp.uint8)],
        output_layouts=[*((0, 2, 1, 3) if x.ndim == 4 else tuple(range(x.ndim)) for x in results), (0,)],
        custom_call_api_version=2,
        legacy_backend_config=json.dumps({"operation_queue_id": "0", "cudnn_fmha_backend_config": described}),
    )(*operands)  # the last result is work space
    return tuple(x.swapaxes(1, 2) if x.ndim == 4 else x for x in found)

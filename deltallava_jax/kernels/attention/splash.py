"""Splash attention, JAX's flash attention for TPUs: segments and the causal order are told to the kernel, which skips
blocks in the future, and neither scores nor mask are ever in memory."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

LANES, SUBLANES = 128, 8
MAX_BLOCK = 640  # of queries and of keys


def refusal(q, k, seen) -> str | None:
    """Why the kernel cannot run on these, None where it can."""
    if q.dtype not in (jnp.float32, jnp.bfloat16):
        return f"takes float32 or bfloat16, not {q.dtype}"
    precision = jax.config.jax_default_matmul_precision
    if q.dtype == jnp.bfloat16 and precision not in (None, "default", "bfloat16"):
        return f"does not compile in bfloat16 where jax_default_matmul_precision is {precision}"
    if q.shape[1] != k.shape[1] or (seen is not None and seen.segments is None):
        return "takes rows that attend to themselves, whole or causally by segments"
    if q.shape[3] % SUBLANES:
        return f"takes heads of a multiple of {SUBLANES}, not {q.shape[3]}"
    return None


def attend(q, k, v, seen, interpret: bool = False):
    """Shapes as in dispatch.attention. ``interpret`` runs the kernel on a CPU, for tests.

    Rows are padded to whole blocks; the padding has a segment of its own, so nobody else sees it."""
    rows, length, heads, width = q.shape
    size = -(-length // LANES) * LANES
    block = max(n for n in range(LANES, min(size, MAX_BLOCK) + 1, LANES) if size % n == 0)
    mask = (masks.FullMask if seen is None else masks.CausalMask)((size, size))
    kernel = splash.make_splash_mha_single_device(
        masks.MultiHeadMask([mask] * heads), block_sizes=splash.BlockSizes(*[block] * 8), interpret=interpret
    )
    segments = seen.segments if seen is not None else None
    if segments is None and size > length:
        segments = jnp.ones((rows, length), jnp.int32)
    if segments is not None:
        segments = jnp.pad(segments, ((0, 0), (0, size - length)), constant_values=-1)
        segments = splash.SegmentIds(segments, segments)
    by_head = lambda x: jnp.pad(x, ((0, 0), (0, size - length), (0, 0), (0, 0))).swapaxes(1, 2)
    scaled = (q.astype(jnp.float32) * width**-0.5).astype(q.dtype)
    out = jax.vmap(kernel, in_axes=(0, 0, 0, None if segments is None else 0))(*map(by_head, (scaled, k, v)), segments)
    return out.swapaxes(1, 2)[:, :length]

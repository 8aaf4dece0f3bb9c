"""Splash attention, JAX's flash attention for TPUs: it takes segments and the causal order, skips future blocks, and
keeps neither scores nor a mask in memory."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

LANES, SUBLANES = 128, 8
MAX_BLOCK = 640  # of queries and of keys


def refusal(q, k, mask) -> str | None:
    """Why the kernel cannot run on these arrays; None where it can."""
    if q.dtype not in (jnp.float32, jnp.bfloat16):
        return f"takes float32 or bfloat16, not {q.dtype}"
    precision = jax.config.jax_default_matmul_precision
    if q.dtype == jnp.bfloat16 and precision not in (None, "default", "bfloat16"):
        return f"does not compile in bfloat16 where jax_default_matmul_precision is {precision}"
    if q.shape[1] != k.shape[1] or (mask is not None and mask.segments is None):
        return "takes rows that attend to themselves, whole or causally by segments"
    if q.shape[3] % SUBLANES:
        return f"takes heads of a multiple of {SUBLANES}, not {q.shape[3]}"
    return None


def attend(q, k, v, mask, interpret: bool = False):
    """Shapes as in dispatch.attention. ``interpret`` runs the kernel on a CPU, for tests.

    Rows are padded to whole blocks; the padding is a segment of its own, so no token attends to it."""
    rows, length, heads, width = q.shape
    size = -(-length // LANES) * LANES
    block = max(n for n in range(LANES, min(size, MAX_BLOCK) + 1, LANES) if size % n == 0)
    order = (masks.FullMask if mask is None else masks.CausalMask)((size, size))
    kernel = splash.make_splash_mha_single_device(
        masks.MultiHeadMask([order] * heads),
        block_sizes=splash.BlockSizes(*[block] * 8),
        residual_checkpoint_name="attention",  # output and logsumexp, for policies of jax.checkpoint
        interpret=interpret,
    )
    segments = mask.segments if mask is not None else None
    if segments is None and size > length:
        segments = jnp.ones((rows, length), jnp.int32)
    if segments is not None:
        segments = jnp.pad(segments, ((0, 0), (0, size - length)), constant_values=-1)
        segments = splash.SegmentIds(segments, segments)
    by_head = lambda x: jnp.pad(x, ((0, 0), (0, size - length), (0, 0), (0, 0))).swapaxes(1, 2)
    scaled = (q.astype(jnp.float32) * width**-0.5).astype(q.dtype)
    out = jax.vmap(kernel, in_axes=(0, 0, 0, None if segments is None else 0))(*map(by_head, (scaled, k, v)), segments)
    return out.swapaxes(1, 2)[:, :length]

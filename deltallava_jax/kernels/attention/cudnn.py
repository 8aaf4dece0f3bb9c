"""cuDNN's flash attention. JAX's interface to it has no segments, so it takes the boolean mask, one for all heads; the
scores are still never in memory. With a mask, cuDNN's backward pass has given NaN for lengths of 64 beyond a multiple
of 128, so lengths are padded to whole multiples."""

from __future__ import annotations

import jax.numpy as jnp
from jax.nn import dot_product_attention

BLOCK = 128
MAX_WIDTH = 128  # of a head, on any GPU


def refusal(q, k, mask) -> str | None:
    """Why the kernel cannot run on these arrays; None where it can."""
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"takes bfloat16 or float16, not {q.dtype}"
    if q.shape[3] % 8 or q.shape[3] > MAX_WIDTH:
        return f"takes heads of a multiple of 8 up to {MAX_WIDTH}, not {q.shape[3]}"
    return None


def attend(q, k, v, mask):
    """Shapes as in dispatch.attention."""
    block = BLOCK if mask is not None else 2  # JAX refuses gradients of odd lengths
    more = lambda x, axis: -x.shape[axis] % block
    pad = lambda x: jnp.pad(x, ((0, 0), (0, more(x, 1)), (0, 0), (0, 0)))
    if mask is None:
        lengths = lambda x: jnp.full(x.shape[0], x.shape[1], jnp.int32)
        odd = more(q, 1) or more(k, 1)
        real = {"query_seq_lengths": lengths(q), "key_value_seq_lengths": lengths(k)} if odd else {}
        return dot_product_attention(*map(pad, (q, k, v)), **real, implementation="cudnn")[:, : q.shape[1]]
    # A query without a key would be NaN: those of the padding attend to all real keys.
    allowed = jnp.pad(mask.allowed, ((0, 0), (0, 0), (0, more(mask.allowed, 2)), (0, 0)), constant_values=True)
    allowed = jnp.pad(allowed, ((0, 0), (0, 0), (0, 0), (0, more(allowed, 3))))
    return dot_product_attention(*map(pad, (q, k, v)), mask=allowed, implementation="cudnn")[:, : q.shape[1]]

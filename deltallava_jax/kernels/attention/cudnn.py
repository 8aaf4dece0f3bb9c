"""cuDNN's flash attention, through JAX: the causal order by the mask type, so that later blocks are skipped, and the
segments as a mask [B, 1, S, S], one for all heads; the scores are never in memory. With a mask, cuDNN's backward pass
has given NaN for lengths of 64 beyond a multiple of 128, so lengths are padded to whole multiples."""

from __future__ import annotations

import re

import jax.numpy as jnp
from jax.nn import dot_product_attention

from deltallava_jax.kernels import devices

BLOCK = 128
MAX_WIDTH = 128  # of a head, on any GPU
BEFORE_AMPERE = re.compile(r"GTX|RTX 20[5-8]0|TITAN|Quadro|\b[KMPTV]\d+\b")  # in the names of NVIDIA's GPUs


def refusal(q, k, mask) -> str | None:
    """Why the kernel cannot run on the target GPU or on these arrays; None where it can."""
    kind = devices.device()[1]
    if not kind.startswith("NVIDIA") or BEFORE_AMPERE.search(kind):
        return f"needs an NVIDIA GPU from Ampere on, not {kind}"
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
        options = {"query_seq_lengths": lengths(q), "key_value_seq_lengths": lengths(k)} if odd else {}
    elif mask.segments is not None:
        # The padding is a segment of its own, so every query has a key: itself.
        segments = jnp.pad(mask.segments, ((0, 0), (0, more(mask.segments, 1))), constant_values=-1)
        options = {"mask": (segments[:, :, None] == segments[:, None, :])[:, None], "is_causal": True}
    else:
        # A query without a key would be NaN: those of the padding attend to all real keys.
        allowed = jnp.pad(mask.allowed, ((0, 0), (0, 0), (0, more(mask.allowed, 2)), (0, 0)), constant_values=True)
        options = {"mask": jnp.pad(allowed, ((0, 0), (0, 0), (0, 0), (0, more(allowed, 3))))}
    return dot_product_attention(*map(pad, (q, k, v)), **options, implementation="cudnn")[:, : q.shape[1]]

"""Windowed attention in plain XLA: the contract that every other implementation is tested against."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float


def check(q, k, v, window: int) -> None:
    """Raises ValueError unless the arrays' shapes fit each other and the windows the grids."""
    gq, g = q.shape[1], k.shape[1]
    wanted = (q.shape[0], g, g, *q.shape[3:])
    if q.ndim != 5 or q.shape[2] != gq or k.shape != wanted or v.shape != wanted:
        raise ValueError(
            f"expected q [B, gq, gq, H, D], k and v [B, g, g, H, D]; got {q.shape}, {k.shape} and {v.shape}"
        )
    if window < 1 or g % gq or gq % window:
        raise ValueError(f"windows of {window} on a {gq}x{gq} query grid over a {g}x{g} patch grid do not fit")


def windowed_attention(
    q: Float[Array, "B gq gq H D"],
    k: Float[Array, "B g g H D"],
    v: Float[Array, "B g g H D"],
    *,
    window: int = 1,
) -> Float[Array, "B gq gq H D"]:
    """Each window x window block of queries attends to its own region of keys and values, per head.

    The query grid (side gq) lies over the patch grid (side g = s * gq), so a block of w x w queries sees
    (w * s) x (w * s) keys. Scale D**-0.5, softmax in float32. Equations 9 and 10 of the paper; the release's local
    chunk attention is window=1. Raises ValueError as check() does."""
    check(q, k, v, window)
    split = "b (i p) (j r) h d -> b i j (p r) h d"
    side = window * (k.shape[1] // q.shape[1])
    q = rearrange(q, split, p=window, r=window)
    k = rearrange(k, split, p=side, r=side)
    v = rearrange(v, split, p=side, r=side)
    scores = jnp.einsum("bijqhd,bijkhd->bijhqk", q, k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(scores * q.shape[-1] ** -0.5, axis=-1).astype(v.dtype)
    out = jnp.einsum("bijhqk,bijkhd->bijqhd", weights, v)
    return rearrange(out, "b i j (p r) h d -> b (i p) (j r) h d", p=window)

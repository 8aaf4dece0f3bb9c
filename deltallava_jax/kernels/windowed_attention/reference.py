"""Windowed attention in plain XLA: the contract that every other implementation is tested against."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Float

from deltallava_jax.arrays import Array


def validate(q, k, v, window: int) -> None:
    """Raises ValueError unless the arrays' shapes fit each other and the windows the grids."""
    shapes = f"{q.shape}, {k.shape} and {v.shape}"
    if not q.ndim == k.ndim == v.ndim == 5 or q.shape[1] != q.shape[2] or k.shape[1] != k.shape[2]:
        raise ValueError(f"expected q [B, gq, gq, H, D], k and v [B, g, g, G, D]; got {shapes}")
    if k.shape != v.shape or (q.shape[0], q.shape[4]) != (k.shape[0], k.shape[4]) or q.shape[3] % k.shape[3]:
        raise ValueError(f"q, k and v do not fit: expected equal B and D and a multiple of G heads; got {shapes}")
    gq, g = q.shape[1], k.shape[1]
    if window < 1 or g % gq or gq % window:
        raise ValueError(f"windows of {window} on a {gq}x{gq} query grid over a {g}x{g} patch grid do not fit")


def windowed_attention(
    q: Float[Array, "B gq gq H D"],
    k: Float[Array, "B g g G D"],
    v: Float[Array, "B g g G D"],
    *,
    window: int = 1,
) -> Float[Array, "B gq gq H D"]:
    """Each window x window block of queries attends to its own region of keys and values, per head.

    The query grid (side gq) lies over the patch grid (side g = s * gq), so a block of w x w queries sees
    (w * s) x (w * s) keys. Scale D**-0.5, softmax in float32. H may be a multiple of the key heads G, which
    neighbouring heads then share. Equations 9 and 10 of the paper; the release's local chunk attention is window=1.
    Raises ValueError as ``validate`` does."""
    validate(q, k, v, window)
    rows, side = q.shape[1] // window, window * (k.shape[1] // q.shape[1])
    sizes = dict(i=rows, j=rows, h=k.shape[3])
    q = rearrange(q, "b (i p) (j r) (h f) d -> (b i j) h (p r f) d", **sizes)
    k, v = (rearrange(x, "b (i p) (j r) h d -> (b i j) h (p r) d", p=side, r=side) for x in (k, v))
    scores = jnp.einsum("mhqd,mhkd->mhqk", q, k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(scores * q.shape[-1] ** -0.5, axis=-1).astype(v.dtype)
    out = jnp.einsum("mhqk,mhkd->mhqd", weights, v)
    return rearrange(out, "(b i j) h (p r f) d -> b (i p) (j r) (h f) d", p=window, r=window, **sizes)

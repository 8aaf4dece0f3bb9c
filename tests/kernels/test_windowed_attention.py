"""The reference windowed attention against a loop over queries in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deltallava_jax.kernels.windowed_attention import windowed_attention


def brute_force(q, k, v, window):
    """Each query looks up its window's region of keys, one head at a time."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    n, side, _, heads, width = q.shape
    region = window * k.shape[1] // side
    out = np.zeros_like(q)
    for b, i, j, h in np.ndindex(n, side, side, heads):
        top, left = i // window * region, j // window * region
        keys = k[b, top : top + region, left : left + region, h].reshape(-1, width)
        values = v[b, top : top + region, left : left + region, h].reshape(-1, width)
        scores = keys @ q[b, i, j, h] / np.sqrt(width)
        weights = np.exp(scores - scores.max())
        out[b, i, j, h] = weights @ values / weights.sum()
    return out


def random_qkv(query_side, grid, heads=2, width=8):
    rng = np.random.default_rng(0)
    sides = (query_side, grid, grid)
    return [rng.standard_normal((2, side, side, heads, width)).astype(np.float32) for side in sides]


@pytest.mark.parametrize(
    "grid, scale_factor, window",
    [
        (6, 3, 1),
        (8, 2, 2),
        (8, 2, 4),  # one window: every query attends to the whole grid
        (4, 1, 1),  # s = 1: one key per query, so the output is v
        (4, 1, 2),
        (6, 6, 1),  # s = g: one query that attends to everything
    ],
)
def test_reference_equals_brute_force(grid, scale_factor, window):
    q, k, v = random_qkv(grid // scale_factor, grid)
    out = jax.jit(windowed_attention, static_argnames="window")(q, k, v, window=window)
    np.testing.assert_allclose(out, brute_force(q, k, v, window), atol=1e-5)
    if scale_factor == window == 1:
        np.testing.assert_allclose(out, v, atol=1e-6)


def test_heads_may_share_keys_and_values():
    q, k, v = random_qkv(4, 8, heads=4)
    k, v = k[..., :2, :], v[..., :2, :]
    out = jax.jit(windowed_attention, static_argnames="window")(q, k, v, window=2)
    np.testing.assert_allclose(out, brute_force(q, k.repeat(2, axis=3), v.repeat(2, axis=3), 2), atol=1e-5)


def test_window_is_one_by_default():
    q, k, v = random_qkv(2, 4)
    np.testing.assert_allclose(jax.jit(windowed_attention)(q, k, v), brute_force(q, k, v, 1), atol=1e-5)


def test_bfloat16_stays_bfloat16():
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in random_qkv(3, 6))
    out = jax.jit(windowed_attention)(q, k, v)
    assert out.dtype == jnp.bfloat16
    expected = brute_force(*(np.asarray(x, np.float32) for x in (q, k, v)), 1)
    np.testing.assert_allclose(np.asarray(out, np.float32), expected, atol=0.03)


@pytest.mark.parametrize("query_side, grid, window", [(4, 6, 1), (3, 6, 2)])
def test_grids_that_do_not_fit_are_refused(query_side, grid, window):
    q, k, v = random_qkv(query_side, grid)
    with pytest.raises(
        ValueError, match=f"window={window}, query grid {query_side}x{query_side}, patch grid {grid}x{grid}"
    ):
        windowed_attention(q, k, v, window=window)

"""Windowed attention in float64 numpy, a loop over windows and heads, with its derivative."""

import jax
import numpy as np

from deltallava_jax.kernels.windowed_attention.reference import windowed_attention

TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}


def in_float64(q, k, v, do, window):
    """(output, dq, dk, dv)."""
    q, k, v, do = (np.asarray(x).astype(np.float64) for x in (q, k, v, do))
    batch, side, _, heads, width = q.shape
    region = window * k.shape[1] // side
    rows = lambda x: x.reshape(-1, width)
    out, dq, dk, dv = (np.zeros_like(x) for x in (q, q, k, v))
    for b, i, j, h in np.ndindex(batch, side // window, side // window, heads):
        queries, keys = (
            (b, slice(i * size, (i + 1) * size), slice(j * size, (j + 1) * size), h) for size in (window, region)
        )
        q_, k_, v_, do_ = rows(q[queries]), rows(k[keys]), rows(v[keys]), rows(do[queries])
        scores = q_ @ k_.T / np.sqrt(width)
        weights = np.exp(scores - scores.max(1, keepdims=True))
        weights /= weights.sum(1, keepdims=True)
        d_weights = do_ @ v_.T
        d_scores = weights * (d_weights - (weights * d_weights).sum(1, keepdims=True)) / np.sqrt(width)
        out[queries] = (weights @ v_).reshape(out[queries].shape)
        dq[queries] = (d_scores @ k_).reshape(dq[queries].shape)
        dk[keys] = (d_scores.T @ q_).reshape(dk[keys].shape)
        dv[keys] = (weights.T @ do_).reshape(dv[keys].shape)
    return out, dq, dk, dv


def draw(batch, gq, scale, heads, width, dtype, seed=0):
    """q, k, v and the output's gradient."""
    rng = np.random.default_rng(seed)
    sides = (gq, gq * scale, gq * scale, gq)
    return [jax.numpy.asarray(rng.standard_normal((batch, n, n, heads, width)), dtype) for n in sides]


def assert_same(attention, arrays, window, dtype):
    """``attention(q, k, v)`` and its derivative equal float64's and, nearly, the reference's."""

    def both(attention):
        def run(q, k, v, do):
            out, pull = jax.vjp(attention, q, k, v)
            return out, *pull(do)

        return [np.asarray(x, np.float64) for x in jax.jit(run)(*arrays)]

    found = both(attention)
    reference = both(lambda q, k, v: windowed_attention(q, k, v, window=window))
    tolerance = TOLERANCE[dtype]
    for name, a, b, c in zip(("out", "dq", "dk", "dv"), found, in_float64(*arrays, window), reference, strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance, rtol=tolerance, err_msg=f"{name} against float64")
        np.testing.assert_allclose(a, c, atol=2 * tolerance, rtol=2 * tolerance, err_msg=f"{name} against reference.py")


def refusal(*arguments):
    """None: where this module stands in for a kernel's, it takes everything."""

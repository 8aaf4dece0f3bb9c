"""Windowed attention for TPUs: whole rows of windows per step, the windows separated by a mask.

A step takes one image's rows of windows as they lie in memory, queries [Q, H * D] and keys [K, H * D], so nothing is
transposed or gathered in HBM. Per head the scores of all its queries with all its keys are one product, those across
windows masked out. That computes more scores than needed, but the matrix unit works on 128 x 128 tiles: products of
one query with s * s keys would fill less of it. All keys of a query are in the step, so the backward
kernel recomputes the weights and needs nothing from the forward one."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Float

from deltallava_jax.arrays import Array

LANES = 128  # of a register; also the side of a tile of the matrix unit
MIN_KEYS = 128  # of a step, where the grid has as many
VMEM = 64 * 2**20  # bytes; the smallest TPU with Mosaic has 128 MiB on the cores that this compiles for
MAX_STEP = 2**20  # scores of a step and head: 4 MiB


def refusal(q, k, window: int, source: int | None = None) -> str | None:
    """Why the kernel cannot run on these arrays; None where it can."""
    if q.dtype not in (jnp.float32, jnp.bfloat16):
        return f"takes float32 or bfloat16, not {q.dtype}"
    if q.shape[-1] % LANES:
        return f"takes heads of a multiple of {LANES}, not {q.shape[-1]}"
    queries, keys = _step(q.shape[1], k.shape[1], window, q.dtype)
    if queries * keys > MAX_STEP:
        return f"takes up to {MAX_STEP} scores per head and step; this grid has {queries} x {keys}"
    return None


def _step(gq: int, g: int, window: int, dtype) -> tuple[int, int]:
    """(queries, keys) of a step: whole rows of windows, whole registers, and no more than the tiles need."""
    rows = gq // window  # of windows
    sublanes = 32 // jnp.dtype(dtype).itemsize
    for count in range(1, rows):
        queries, keys = count * window * gq, count * (g // rows) * g
        if rows % count == 0 and queries % sublanes == 0 and keys % sublanes == 0 and keys >= MIN_KEYS:
            return queries, keys
    return gq * gq, g * g


def _bias(gq: int, g: int, window: int, queries: int, keys: int) -> np.ndarray:
    """[queries, keys] of a step: 0 where they share a window, else the most negative float."""
    side = window * (g // gq)
    of = lambda count, width, size: (np.arange(count) // width // size, np.arange(count) % width // size)
    (qy, qx), (ky, kx) = of(queries, gq, window), of(keys, g, side)
    same = (qy[:, None] == ky) & (qx[:, None] == kx)
    return np.where(same, 0.0, np.finfo(np.float32).min).astype(np.float32)


def _product(a, b, contract: tuple[int, int]):
    """a and b contracted over one axis each, summed in float32."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return jax.lax.dot_general(
        a, b, (((contract[0],), (contract[1],)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def _weights(q, k, bias):
    """Softmax over the keys of each query's own window [Q, K], float32."""
    scores = _product(q, k, (1, 1)) * q.shape[-1] ** -0.5 + bias
    weights = jnp.exp(scores - scores.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


def _forward_kernel(bias_ref, q_ref, k_ref, v_ref, o_ref, *, width: int):
    for start in range(0, q_ref.shape[-1], width):
        head = (0, slice(None), pl.ds(start, width))
        v = v_ref[head]
        weights = _weights(q_ref[head], k_ref[head], bias_ref[...])
        o_ref[head] = _product(weights.astype(v.dtype), v, (1, 0)).astype(o_ref.dtype)


def _backward_kernel(bias_ref, q_ref, k_ref, v_ref, do_ref, dq_ref, dk_ref, dv_ref, *, width: int):
    for start in range(0, q_ref.shape[-1], width):
        head = (0, slice(None), pl.ds(start, width))
        q, k, do = q_ref[head], k_ref[head], do_ref[head]
        weights = _weights(q, k, bias_ref[...])
        dv_ref[head] = _product(weights.astype(do.dtype), do, (0, 0)).astype(dv_ref.dtype)
        d_weights = _product(do, v_ref[head], (1, 1))
        d_scores = weights * (d_weights - (weights * d_weights).sum(axis=1, keepdims=True)) * width**-0.5
        d_scores = d_scores.astype(q.dtype)
        dq_ref[head] = _product(d_scores, k, (1, 0)).astype(dq_ref.dtype)
        dk_ref[head] = _product(d_scores, q, (0, 0)).astype(dk_ref.dtype)


def _call(kernel, q, k, others, outputs, window: int, interpret):
    """``kernel`` over the steps; "q" or "k" in ``others`` and ``outputs`` names their grid."""
    (batch, gq, _, _, width), g = q.shape, k.shape[1]
    queries, keys = _step(gq, g, window, q.dtype)
    flat = lambda x: x.reshape(batch, -1, x.shape[3] * width)
    rows = {"q": flat(q), "k": flat(k)}
    block = {
        name: pl.BlockSpec((1, size, rows[name].shape[2]), lambda b, i: (b, i, 0))
        for name, size in (("q", queries), ("k", keys))
    }
    bias = _bias(gq, g, window, queries, keys)
    results = pl.pallas_call(
        functools.partial(kernel, width=width),
        grid=(batch, gq * gq // queries),
        in_specs=[
            pl.BlockSpec(bias.shape, lambda b, i: (0, 0)),
            block["q"],
            block["k"],
            *(block[name] for name, _ in others),
        ],
        out_specs=[block[name] for name in outputs],
        out_shape=[jax.ShapeDtypeStruct(rows[name].shape, q.dtype) for name in outputs],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=VMEM),
        interpret=interpret,
        name=f"windowed_attention{kernel.__name__.removesuffix('_kernel')}",
    )(bias, rows["q"], rows["k"], *(flat(x) for _, x in others))
    return [x.reshape({"q": q, "k": k}[name].shape) for name, x in zip(outputs, results, strict=True)]


def forward(
    q: Float[Array, "B gq gq H D"], k: Float[Array, "B g g H D"], v: Float[Array, "B g g H D"], window: int, interpret
):
    """(the output, shaped as q; residuals of the backward pass besides q, k and v). ``interpret``: False, or
    pltpu.InterpretParams to run on a CPU."""
    return _call(_forward_kernel, q, k, [("k", v)], "q", window, interpret)[0], ()


def backward(q, k, v, residuals, do, window: int, interpret):
    """Gradients of q, k and v."""
    return tuple(_call(_backward_kernel, q, k, [("k", v), ("q", do)], "qkk", window, interpret))

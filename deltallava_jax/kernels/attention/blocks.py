"""Attention of packed rows in blocks of queries, for CPUs: a block takes the keys from the first that any of its
queries attends to up to its last query's, so the future and other conversations are mostly skipped, and the scores of
one block at a time are in memory (Dao et al. 2022, arXiv:2205.14135, in JAX's own operations)."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name

from deltallava_jax.kernels.attention.dispatch import SAVED, TRIANGLE

BLOCK = 160  # most tokens of a block of queries
SHORT = 4  # most blocks of a row whose weights are kept: fewer bytes than a layer's products


def refusal(q, k, mask) -> str | None:
    """Why the kernel cannot run on these arrays; None where it can."""
    if mask is None or mask.segments is None or q.shape[1] != k.shape[1]:
        return "takes rows that attend to themselves causally by segments"
    return None


def attend(q, k, v, mask):
    """Shapes as in dispatch.attention. Short rows are one batch, of which only the future is skipped; of long ones,
    one after the other, each block takes the keys that it needs."""
    length = q.shape[1]
    count = -(-length // BLOCK)
    size = -(-length // count)
    pad = lambda x: jnp.pad(x, ((0, 0), (0, count * size - length), *[(0, 0)] * (x.ndim - 2)))
    q = rearrange(pad(q), "b (n t) (g r) d -> b n g r t d", t=size, g=k.shape[2])
    k, v = (rearrange(pad(x), "b s g d -> b g s d") for x in (k, v))
    rows = q, k, v, pad(mask.segments)
    if count > SHORT:
        out = jax.lax.map(lambda row: _row(*row), rows)
    else:
        with jax.named_scope(f"{TRIANGLE}{count}"):
            out = jax.vmap(_row)(*rows)
    return rearrange(out, "b n g r t d -> b (n t) (g r) d")[:, :length]


@jax.custom_vjp
def _row(q, k, v, segments):
    """q [n, g, r, t, d], k and v [g, n * t, d], segments [n * t] -> the shape of q."""
    return _forward(q, k, v, segments)[0]


def _forward(q, k, v, segments):
    """Keeps the weights of short rows for the backward pass, otherwise the logarithms of their sums."""

    def block(i, start, keys, _, q):
        near = _slice(start, keys)
        scores = _scores(q, near(k), segments, i, start)
        most = scores.max(-1, keepdims=True)
        weights = jnp.exp(scores - most)
        total = weights.sum(-1, keepdims=True)
        weights = (weights / total).astype(v.dtype)
        out = jnp.einsum("grts,gsd->grtd", weights, near(v))
        return None, (out, weights if len(scaled) <= SHORT else most + jnp.log(total))

    q, segments = jax.lax.optimization_barrier((q, segments))  # or JAX makes the masks of all blocks before the layers
    scaled = q * q.shape[-1] ** -0.5
    _, (out, kept) = _over_blocks(block, segments, None, scaled)
    out, kept = checkpoint_name((jnp.stack(out), kept), SAVED)
    return out, (q, k, v, segments, out, kept)


def _backward(saved, d_out):
    q, k, v, segments, out, kept = saved
    scale = q.shape[-1] ** -0.5
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

    def block(i, start, keys, gradients, q, d_out, inner, kept):
        near = _slice(start, keys)
        weights = kept
        if len(scaled) > SHORT:
            with jax.named_scope("rematted"):  # computed in the forward pass too
                weights = jnp.exp(_scores(q, near(k), segments, i, start) - kept)
        d_weights = product("grtd,gsd->grts", d_out, near(v))
        d_scores = (weights * (d_weights - inner)).astype(q.dtype)
        dq = product("grts,gsd->grtd", d_scores, near(k)) * scale
        of_keys = (product("grts,grtd->gsd", d, x) for d, x in ((d_scores, q), (weights.astype(q.dtype), d_out)))
        add = lambda x, new: jax.lax.dynamic_update_slice_in_dim(x, near(x) + new, start, 1)
        return tuple(map(add, gradients, of_keys)), dq.astype(q.dtype)

    scaled = q * scale
    inner = product("ngrtd,ngrtd->ngrt", d_out, out)[..., None]
    zeros = tuple(jnp.zeros(x.shape) for x in (k, v))
    (dk, dv), dq = _over_blocks(block, segments, zeros, scaled, d_out, inner, kept)
    return jnp.stack(dq), dk.astype(k.dtype), dv.astype(v.dtype), None


_row.defvjp(_forward, _backward)


def _over_blocks(block, segments, carry, *given):
    """(carry, what the blocks return, in lists or stacked) of block(i, start, keys, carry, *given[i]), one block of
    queries after the other: ``keys`` keys from ``start`` on hold all that block i attends to."""
    count, size = len(given[0]), len(segments) // len(given[0])
    if count <= SHORT:
        returned = []
        for i in range(count):
            carry, one = block(i, 0, (i + 1) * size, carry, *(x[i] for x in given))
            returned.append(one)
        return carry, tuple(zip(*returned, strict=True)) if isinstance(returned[0], tuple) else returned

    def at(carry, one):
        i, choice, *given = one
        branches = [
            lambda i, *more, width=width: block(i, jnp.maximum(i + 1 - width, 0) * size, width * size, *more)
            for width in _widths(count)
        ]
        return jax.lax.switch(choice, branches, i, carry, *given)

    return jax.lax.scan(at, carry, (jnp.arange(count), _choices(segments, count), *given))


def _widths(count: int) -> list[int]:
    """The numbers of blocks of keys that there is a program for: 1, 2, 3, 4, 6, 8, 12, ..., count."""
    powers = [2**power for power in range(count.bit_length())]
    return sorted({width for power in powers for width in (power, power * 3 // 2) if width <= count} | {count})


def _choices(segments, count: int):
    """[count]: the place in _widths of the number of blocks of keys that each block of queries needs."""
    blocks = rearrange(segments, "(n t) -> n t", n=count)
    live = blocks > 0
    lowest = jnp.where(live, blocks, jnp.iinfo(jnp.int32).max).min(1)
    highest = blocks.max(1)
    padded = ~live.all(1)
    shared = (lowest[:, None] <= highest) & (lowest <= highest[:, None]) | (padded[:, None] & padded)
    first = jnp.argmax(shared, axis=1)  # at most the block itself
    return jnp.searchsorted(jnp.array(_widths(count)), jnp.arange(count) + 1 - first)


def _slice(start, keys: int):
    return lambda x: jax.lax.dynamic_slice_in_dim(x, start, keys, 1)


def _scores(q, k, segments, i, start):
    """Scores [g, r, t, s] of a block of queries and its keys in float32, -inf where a query does not attend."""
    size, keys = q.shape[2], k.shape[1]
    scores = jnp.einsum("grtd,gsd->grts", q, k, preferred_element_type=jnp.float32)
    queries, places = i * size + jnp.arange(size), start + jnp.arange(keys)
    of_queries = jax.lax.dynamic_slice_in_dim(segments, i * size, size)
    of_keys = jax.lax.dynamic_slice_in_dim(segments, start, keys)
    allowed = (of_queries[:, None] == of_keys) & (places <= queries[:, None])
    return jnp.where(allowed, scores, -jnp.inf)

"""Attention of packed rows in blocks, for CPUs: the scores of one block of queries and one of keys are in memory at a
time, and blocks that lie in the future or share no segment are skipped (Dao et al. 2022, arXiv:2205.14135, in JAX's
own operations). A row's 4,096 tokens in conversations of 500 need a sixth of the scores of dense attention."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from einops import rearrange

BLOCK = 256  # tokens


def refusal(q, k, mask) -> str | None:
    """Why the kernel cannot run on these arrays; None where it can."""
    if mask is None or mask.segments is None or q.shape[1] != k.shape[1]:
        return "takes rows that attend to themselves causally by segments"
    return None


def attend(q, k, v, mask):
    """Shapes as in dispatch.attention."""
    length = q.shape[1]
    more = -length % BLOCK
    pad = lambda x: jnp.pad(x, ((0, 0), (0, more), *[(0, 0)] * (x.ndim - 2)))
    groups = k.shape[2]
    q = rearrange(pad(q), "b (n t) (g r) d -> b n t g r d", t=BLOCK, g=groups)
    k, v = (rearrange(pad(x), "b (n t) g d -> b n t g d", t=BLOCK) for x in (k, v))
    segments = rearrange(pad(mask.segments), "b (n t) -> b n t", t=BLOCK)
    out = jax.lax.map(lambda row: _row(*row), (q, k, v, segments))
    return rearrange(out, "b n t g r d -> b (n t) (g r) d")[:, :length]


def _pairs(segments):
    """[n * n, 3]: (block of queries, block of keys, whether a query may attend to a key), all pairs."""
    live = segments > 0
    lowest = jnp.where(live, segments, jnp.iinfo(jnp.int32).max).min(1)
    highest = segments.max(1)
    padded = ~live.all(1)
    shared = (lowest[:, None] <= highest) & (lowest <= highest[:, None]) | (padded[:, None] & padded)
    i, j = (x.reshape(-1) for x in jnp.indices(shared.shape))
    return jnp.stack([i, j, (shared.reshape(-1) & (j <= i)).astype(jnp.int32)], axis=1)


def _scores(q, k, segments, i, j):
    """Scores [g, r, t, t] of a block of queries and one of keys in float32, -inf where a query does not attend."""
    scores = jnp.einsum("tgrd,sgd->grts", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    places = jnp.arange(BLOCK)
    allowed = (segments[i][:, None] == segments[j]) & (j * BLOCK + places <= (i * BLOCK + places)[:, None])
    return jnp.where(allowed, scores, -jnp.inf)


@jax.custom_vjp
def _row(q, k, v, segments):
    """q [n, t, g, r, d], k and v [n, t, g, d], segments [n, t] -> the shape of q."""
    return _forward(q, k, v, segments)[0]


def _forward(q, k, v, segments):
    def add(carry, pair):
        i, j, shared = pair

        def attend(state):
            most, total, out = state
            scores = _scores(q[i], k[j], segments, i, j)
            new = jnp.maximum(most, scores.max(-1))
            finite = jnp.where(new == -jnp.inf, 0.0, new)  # a query may attend to nothing in this block
            weights = jnp.exp(scores - finite[..., None])
            shrink = jnp.exp(most - finite)
            values = jnp.einsum("grts,sgd->grtd", weights.astype(v.dtype), v[j], preferred_element_type=jnp.float32)
            return new, total * shrink + weights.sum(-1), out * shrink[..., None] + values

        state = jax.lax.cond(shared > 0, attend, lambda state: state, jax.tree.map(lambda x: x[i], carry))
        return jax.tree.map(lambda x, new: x.at[i].set(new), carry, state), None

    shape = (len(q), *q.shape[2:4], BLOCK)
    start = (jnp.full(shape, -jnp.inf), jnp.zeros(shape), jnp.zeros((*shape, q.shape[-1])))
    (most, total, out), _ = jax.lax.scan(add, start, _pairs(segments))
    out = rearrange(out / total[..., None], "n g r t d -> n t g r d").astype(q.dtype)
    return out, (q, k, v, segments, out, most + jnp.log(total))


def _backward(saved, d_out):
    q, k, v, segments, out, sums = saved
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    inner = product("ntgrd,ntgrd->ngrt", d_out, out)

    def add(carry, pair):
        i, j, shared = pair

        def attend(_):
            with jax.named_scope("rematted"):  # computed in the forward pass too
                weights = jnp.exp(_scores(q[i], k[j], segments, i, j) - sums[i][..., None])
            d_weights = product("tgrd,sgd->grts", d_out[i], v[j])
            d_scores = (weights * (d_weights - inner[i][..., None]) * q.shape[-1] ** -0.5).astype(q.dtype)
            dq, dk = product("grts,sgd->tgrd", d_scores, k[j]), product("grts,tgrd->sgd", d_scores, q[i])
            return dq, dk, product("grts,tgrd->sgd", weights.astype(q.dtype), d_out[i])

        nothing = jax.tree.map(lambda x: jnp.zeros(x.shape[1:]), carry)
        dq, dk, dv = jax.lax.cond(shared > 0, attend, lambda _: nothing, None)
        return (carry[0].at[i].add(dq), carry[1].at[j].add(dk), carry[2].at[j].add(dv)), None

    gradients, _ = jax.lax.scan(add, tuple(jnp.zeros(x.shape) for x in (q, k, v)), _pairs(segments))
    return *(new.astype(x.dtype) for new, x in zip(gradients, (q, k, v), strict=True)), None


_row.defvjp(_forward, _backward)

"""FastV (pkunlp-icler/FastV, modeling_llama.py): the decoder keeps the visual tokens that the last prompt token
attends to most.

Layers before K process every token. Then the attention of the last prompt token in layer K - 1, averaged over the
heads, ranks the visual tokens; the others are dropped, the positions stay. Inference only."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from deltallava_jax.arrays import Array
from deltallava_jax.config import DecoderConfig, FastVConfig
from deltallava_jax.models import decoder
from deltallava_jax.models.layers import Params
from deltallava_jax.sequence import Layout


def layer_slices(cfg: DecoderConfig, fastv: FastVConfig) -> tuple[tuple[int, int], ...]:
    """The slices of the layers, each with its own cache: before the scoring layer, that layer, after pruning."""
    return ((0, fastv.layer - 1), (fastv.layer - 1, fastv.layer), (fastv.layer, cfg.layers))


def kept_tokens(tokens: int, text: int, fastv: FastVConfig) -> int:
    """Tokens of a row after pruning: its text and the visual tokens that are kept."""
    return min(text + fastv.keep, tokens)


def select(
    scores: Float[Array, "B S"], is_visual: Bool[Array, "B S"], live: Bool[Array, "B S"], keep: int, kept: int
) -> tuple[Int[Array, "B kept"], Bool[Array, "B kept"]]:
    """(row positions that stay, in order; which of them hold a token): all text and ``keep`` visual tokens per row."""
    S = scores.shape[1]
    visual = is_visual & live
    rank = jnp.argsort(jnp.argsort(jnp.where(visual, -scores, jnp.inf), axis=1, stable=True), axis=1)
    stays = live & (~visual | (rank < keep))
    order = jnp.argsort(jnp.where(stays, 0, S) + jnp.arange(S), axis=1)[:, :kept]
    return order, jnp.take_along_axis(stays, order, axis=1)


def forward(
    params: Params,
    cfg: DecoderConfig,
    hidden: Float[Array, "B S d"],
    rows: Layout,
    fastv: FastVConfig,
    kept: int,
    caches: tuple[decoder.Cache | None, ...] = (None, None, None),
) -> tuple[Float[Array, "B kept d"], Layout, tuple]:
    """All layers over whole prompts, one per row, with empty caches or none.

    kept: see ``kept_tokens``. Returns (hidden states of the tokens that stay, their layout, the caches)."""
    before, scoring, after = layer_slices(cfg, fastv)
    hidden, first = decoder.forward(params, cfg, hidden, rows, layers=before, cache=caches[0], fresh=True)
    with jax.named_scope("fastv"):
        live = rows.segments > 0
        last = live.shape[1] - 1 - jnp.argmax(live[:, ::-1], axis=1)
        scores = decoder.attention_row(params, cfg, hidden, rows, scoring[0], last)
    hidden, second = decoder.forward(params, cfg, hidden, rows, layers=scoring, cache=caches[1], fresh=True)
    with jax.named_scope("fastv"):
        order, stays = select(scores, rows.is_visual, live, fastv.keep, kept)
        rows = jax.tree.map(lambda x: jnp.take_along_axis(x, order, axis=1), rows)
        hidden = jnp.take_along_axis(hidden, order[..., None], axis=1)
        rows = dataclasses.replace(rows, segments=jnp.where(stays, rows.segments, 0))
    hidden, third = decoder.forward(params, cfg, hidden, rows, layers=after, cache=caches[2], fresh=True)
    return hidden, rows, (first, second, third)

"""FastV (pkunlp-icler/FastV, modeling_llama.py): inside the decoder, keep the visual tokens the prompt's end reads.

Layers before K see every token. Then the attention of layer K - 1, averaged over its heads, from the last prompt
token, chooses; the others' hidden states are dropped, the original positions stay. Inference only."""

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
    """The slices of the layers, each with a cache of its own: before the scoring layer, that layer, after pruning."""
    return ((0, fastv.layer - 1), (fastv.layer - 1, fastv.layer), (fastv.layer, cfg.layers))


def kept_tokens(slots: int, text: int, fastv: FastVConfig) -> int:
    """Slots of a row after pruning: its text tokens and the visual tokens that are kept."""
    return min(text + fastv.keep, slots)


def select(
    scores: Float[Array, "B S"], is_visual: Bool[Array, "B S"], live: Bool[Array, "B S"], keep: int, slots: int
) -> tuple[Int[Array, "B slots"], Bool[Array, "B slots"]]:
    """(slots that stay, in reading order; whether each is live): all text, and ``keep`` visual slots a row."""
    S = scores.shape[1]
    visual = is_visual & live
    rank = jnp.argsort(jnp.argsort(jnp.where(visual, -scores, jnp.inf), axis=1, stable=True), axis=1)
    stays = live & (~visual | (rank < keep))
    order = jnp.argsort(jnp.where(stays, 0, S) + jnp.arange(S), axis=1)[:, :slots]
    return order, jnp.take_along_axis(stays, order, axis=1)


def forward(
    params: Params,
    cfg: DecoderConfig,
    hidden: Float[Array, "B S d"],
    rows: Layout,
    fastv: FastVConfig,
    slots: int,
    caches: tuple[decoder.Cache | None, ...] = (None, None, None),
) -> tuple[Float[Array, "B slots d"], Layout, tuple]:
    """All layers over whole prompts, one a row, with empty caches or none.

    Returns (hidden states of the slots that stay, their layout, the caches)."""
    before, scoring, after = layer_slices(cfg, fastv)
    hidden, first = decoder.forward(params, cfg, hidden, rows, layers=before, cache=caches[0], fresh=True)
    with jax.named_scope("fastv"):
        live = rows.segments > 0
        last = live.shape[1] - 1 - jnp.argmax(live[:, ::-1], axis=1)
        scores = decoder.attention_row(params, cfg, hidden, rows, scoring[0], last)
    hidden, second = decoder.forward(params, cfg, hidden, rows, layers=scoring, cache=caches[1], fresh=True)
    with jax.named_scope("fastv"):
        order, stays = select(scores, rows.is_visual, live, fastv.keep, slots)
        rows = jax.tree.map(lambda x: jnp.take_along_axis(x, order, axis=1), rows)
        hidden = jnp.take_along_axis(hidden, order[..., None], axis=1)
        rows = dataclasses.replace(rows, segments=jnp.where(stays, rows.segments, 0))
    hidden, third = decoder.forward(params, cfg, hidden, rows, layers=after, cache=caches[2], fresh=True)
    return hidden, rows, (first, second, third)

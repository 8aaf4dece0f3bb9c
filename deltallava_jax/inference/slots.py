"""The engine's device side: a fixed number of slots, each with the key-value cache of one conversation.

All requests share the same compiled functions: ``prefill`` runs prompts into new slots, ``extend`` continues a
conversation, ``insert`` puts a conversation into one of many slots, ``decode`` generates the next tokens of every
active slot. Slots are donated: a call consumes its argument and returns the new ones."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8

from deltallava_jax.config import ModelConfig
from deltallava_jax.inference.sampling import Controls, choose
from deltallava_jax.kernels.registry import as_configured
from deltallava_jax.models import decoder, fastv, vlm
from deltallava_jax.models.layers import Params
from deltallava_jax.sequence import Batch, Layout, layout, text_layout

CHUNK = 16  # most tokens that one call of ``decode`` generates in a slot
LEAST = 64  # positions of a cache: read lengths are multiples of it
WORTH = 0.05  # of a step's bytes: what a shorter read must save to be worth a program of its own


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Slots:
    """B conversations. caches: one for each slice of the layers, see ``layer_slices``.

    position: of the next token. token: the last one, sampled but not yet in the caches. active: the answer is not
    finished. drawn: tokens of the current answer. occurred: tokens of prompts and answers, for the repetition
    penalty."""

    caches: tuple[decoder.Cache, ...]
    position: Int[Array, " B"]
    token: Int[Array, " B"]
    active: Bool[Array, " B"]
    drawn: Int[Array, " B"]
    occurred: Bool[Array, "B vocab"]
    controls: Controls


@functools.partial(jax.jit, static_argnames=("cfg", "budget"))
def encode(
    params: Params, cfg: ModelConfig, images: UInt8[Array, "n H W 3"], prompts: Batch | None = None, *, budget: int
) -> tuple[Float[Array, "n V d"], Bool[Array, "n V"] | None]:
    """Visual tokens of images and which of them are valid (None: all), compiled once for each (n, budget).

    prompts: for systems that read the question, the rows whose image places the images fill, row by row."""
    return vlm.visual_tokens(params, cfg, images, prompts, budget=budget)[:2]


def layer_slices(cfg: ModelConfig) -> tuple[tuple[int, int], ...]:
    """The slices of the decoder's layers, each of which has its own cache."""
    return fastv.layer_slices(cfg.decoder, cfg.fastv) if cfg.fastv else ((0, cfg.decoder.layers),)


@functools.partial(jax.jit, static_argnames=("cfg", "capacity"))
@as_configured
def prefill(
    params: Params,
    cfg: ModelConfig,
    prompts: Batch,
    visual: Float[Array, "n V d"],
    valid: Bool[Array, "n V"] | None,
    controls: Controls,
    *,
    capacity: int,
) -> Slots:
    """New slots, with the prompts in their caches and the first token of each answer.

    visual, valid: of each image place, row by row (n = B * I), as ``encode`` returns them. capacity: tokens of each
    cache, at least those of the prompt with its visual tokens and of the answer."""
    B = prompts.tokens.shape[0]
    S = prompts.tokens.shape[1] + prompts.image_positions.shape[1] * (visual.shape[1] - 1)
    dropped = S - _kept(cfg, prompts, S) if cfg.fastv else 0
    caches = tuple(
        decoder.init_cache(cfg.decoder, B, length, cfg.dtype, layers=last - first)
        for (first, last), length in zip(layer_slices(cfg), (capacity, capacity, capacity - dropped), strict=False)
    )
    zeros = jnp.zeros(B, jnp.int32)
    occurred = jnp.zeros((B, cfg.decoder.vocab_size), bool)
    slots = Slots(caches, zeros, zeros, jnp.zeros(B, bool), zeros, occurred, controls)
    with jax.named_scope("prefill"):
        return _run_prompts(params, cfg, slots, prompts, visual, valid, fresh=True)


@functools.partial(jax.jit, static_argnames=("cfg",), donate_argnames=("slots",))
@as_configured
def extend(
    params: Params,
    cfg: ModelConfig,
    slots: Slots,
    prompts: Batch,
    visual: Float[Array, "n V d"],
    valid: Bool[Array, "n V"] | None,
    controls: Controls,
) -> Slots:
    """Slots with the next turns added to their caches, which need space for them, and the first token of each answer.

    FastV takes no new images this way: which tokens it keeps depends on the end of the first prompt."""
    if cfg.fastv and prompts.image_positions.shape[1]:
        raise ValueError("FastV takes images only with the first prompt of a conversation")
    with jax.named_scope("extend"):
        slots = dataclasses.replace(slots, controls=controls, drawn=jnp.zeros_like(slots.drawn))
        return _run_prompts(params, cfg, slots, prompts, visual, valid, fresh=False)


def read_lengths(slots: Slots, steps: int, weights: int) -> tuple[int, ...]:
    """Positions of each cache that ``steps`` further tokens of the active slots need, in few different lengths: the
    capacity, its half, its quarter, ... down to where the half would save too little of what a step reads.

    weights: bytes of the decoder. Waits for the slots."""
    lengths, active = jax.device_get(([cache.length for cache in slots.caches], slots.active))
    return tuple(
        read_length(int(np.max(length, where=active, initial=0)) + min(steps, CHUNK), cache, weights)
        for length, cache in zip(lengths, slots.caches, strict=True)
    )


def read_length(used: int, cache: decoder.Cache, weights: int) -> int:
    """Of a cache of which the first ``used`` positions are needed."""
    capacity = length = cache.live.shape[1]
    position = sum(x.size * x.dtype.itemsize for x in (*cache.k, *cache.v)) // capacity  # bytes
    while length > LEAST:
        half = -(-length // (2 * LEAST)) * LEAST
        if used > half or (length - half) * position < WORTH * (weights + length * position):
            break
        length = half
    return length


@functools.partial(jax.jit, static_argnames=("cfg", "read"), donate_argnames=("slots",))
def decode(
    params: Params, cfg: ModelConfig, slots: Slots, steps: int, *, read: tuple[int, ...] | None = None
) -> tuple[Slots, Int[Array, "B CHUNK"]]:
    """Up to ``steps`` (at most CHUNK) further tokens of each active slot; -1 where there is none.

    read: positions of each cache that are read, see ``read_lengths``; by default all."""
    B = slots.token.shape[0]
    lengths = read or (None,) * len(slots.caches)

    def unfinished(carry):
        step, slots, _ = carry
        return (step < steps) & slots.active.any()

    def decode_one(carry):
        step, slots, out = carry
        rows = text_layout(slots.position[:, None], slots.active[:, None].astype(jnp.int32))
        hidden = decoder.embed(params["decoder"], cfg.decoder, slots.token[:, None], cfg.dtype)
        caches = []
        for layers, cache, length in zip(layer_slices(cfg), slots.caches, lengths, strict=True):
            hidden, cache = decoder.forward(
                params["decoder"], cfg.decoder, hidden, rows, layers=layers, cache=cache, read=length
            )  # fmt: skip
            caches.append(cache)
        position = slots.position + slots.active
        after = _sample(params, cfg, dataclasses.replace(slots, caches=tuple(caches), position=position), hidden)
        return step + 1, after, out.at[:, step].set(jnp.where(slots.active, after.token, -1))

    with jax.named_scope("decode"):
        out = jnp.full((B, CHUNK), -1, jnp.int32)
        _, slots, out = jax.lax.while_loop(unfinished, decode_one, (jnp.int32(0), slots, out))
    return slots, out


@functools.partial(jax.jit, donate_argnames=("slots",))
def insert(slots: Slots, one: Slots, row: int) -> Slots:
    """``slots`` with the conversation of ``one`` (a single row, of no greater capacity) in place of row ``row``."""

    def place(many: Array, x: Array) -> Array:
        start = (row, *[0] * (x.ndim - 1))
        return jax.lax.dynamic_update_slice(many, x.astype(many.dtype), start)

    return jax.tree.map(place, slots, one)


@functools.partial(jax.jit, static_argnames=("cfg", "rows", "capacity"))
def empty(cfg: ModelConfig, controls: Controls, *, rows: int, capacity: int) -> Slots:
    """Empty slots, to insert conversations into."""
    caches = tuple(
        decoder.init_cache(cfg.decoder, rows, capacity, cfg.dtype, layers=last - first)
        for first, last in layer_slices(cfg)
    )
    zeros = jnp.zeros(rows, jnp.int32)
    occurred = jnp.zeros((rows, cfg.decoder.vocab_size), bool)
    return Slots(caches, zeros, zeros, jnp.zeros(rows, bool), zeros, occurred, controls)


@functools.partial(jax.jit, donate_argnames=("slots",))
def halt(slots: Slots, rows: Bool[Array, " B"], back: Int[Array, " B"]) -> Slots:
    """Ends the answers of ``rows`` and removes the last ``back`` tokens of each row from its caches."""
    caches = tuple(dataclasses.replace(cache, length=cache.length - back) for cache in slots.caches)
    return dataclasses.replace(slots, caches=caches, position=slots.position - back, active=slots.active & ~rows)


# ------------------------------------------------------------------ inside


def _run_prompts(params, cfg, slots: Slots, prompts: Batch, visual, valid, *, fresh: bool) -> Slots:
    """Appends prompts to the caches and samples the first token after them."""
    B, I = prompts.image_positions.shape
    rows = layout(prompts, None if valid is None else valid.reshape(B, I, -1), visual.shape[1])
    hidden = vlm.merge(params, cfg, prompts, rows, visual)
    rows = dataclasses.replace(rows, positions=rows.positions + slots.position[:, None])
    weights = params["decoder"]
    caches = slots.caches
    if cfg.fastv and fresh:
        kept = _kept(cfg, prompts, hidden.shape[1])
        hidden, after, caches = fastv.forward(weights, cfg.decoder, hidden, rows, cfg.fastv, kept, caches)
    else:
        after = rows
        written = []
        for layers, cache in zip(layer_slices(cfg), caches, strict=True):
            hidden, cache = decoder.forward(
                weights, cfg.decoder, hidden, rows, layers=layers, cache=cache, fresh=fresh
            )  # fmt: skip
            written.append(cache)
        caches = tuple(written)
    words = jnp.where((prompts.segments > 0) & (prompts.tokens > 0), prompts.tokens, slots.occurred.shape[1])
    occurred = slots.occurred.at[jnp.arange(B)[:, None], words].set(True, mode="drop")
    position = slots.position + (rows.segments > 0).sum(1, dtype=jnp.int32)
    slots = dataclasses.replace(slots, caches=caches, position=position, occurred=occurred, active=jnp.ones(B, bool))
    return _sample(params, cfg, slots, _last(hidden, after))


def _kept(cfg: ModelConfig, prompts: Batch, S: int) -> int:
    return fastv.kept_tokens(S, prompts.tokens.shape[1], cfg.fastv)


def _last(hidden: Float[Array, "B S d"], rows: Layout) -> Float[Array, "B 1 d"]:
    """The state of each row's last token that is not padding."""
    last = hidden.shape[1] - 1 - jnp.argmax(rows.segments[:, ::-1] > 0, axis=1)
    return jnp.take_along_axis(hidden, last[:, None, None], axis=1)


def _sample(params, cfg: ModelConfig, slots: Slots, hidden: Float[Array, "B 1 d"]) -> Slots:
    """Slots with the next token of each active one."""
    weights = params["decoder"]
    logits = decoder.logits(weights, cfg.decoder, decoder.finish(weights, cfg.decoder, hidden))[:, 0]
    token = jnp.where(slots.active, choose(logits, slots.occurred, slots.controls, slots.drawn), slots.token)
    drawn = slots.drawn + slots.active
    active = slots.active & (token != slots.controls.end) & (drawn < slots.controls.limit)
    occurred = slots.occurred.at[jnp.arange(len(token)), token].set(True)
    return dataclasses.replace(slots, token=token, drawn=drawn, active=active, occurred=occurred)

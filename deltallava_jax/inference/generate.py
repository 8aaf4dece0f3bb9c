"""Greedy generation for batches of prompts of unequal length, with a static key-value cache."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8

from deltallava_jax.config import ModelConfig
from deltallava_jax.data.conversation import Tokenized
from deltallava_jax.models import decoder, vlm
from deltallava_jax.models.layers import Params
from deltallava_jax.models.selection import fastv
from deltallava_jax.sequence import Batch, layout, text_layout


@functools.partial(jax.jit, static_argnames=("cfg", "budget"))
def encode(
    params: Params, cfg: ModelConfig, images: UInt8[Array, "n H W 3"], prompts: Batch | None = None, *, budget: int
) -> tuple[Float[Array, "n V d"], Bool[Array, "n V"] | None]:
    """Visual tokens of images and which of them are there (None: all), compiled once for each (n, budget).

    prompts: for systems that read the question, the rows whose image places the images fill, row by row."""
    return vlm.visual_tokens(params, cfg, images, prompts, budget=budget)[:2]


def prompt_batch(prompts: list[Tokenized], length: int) -> Batch:
    """Prompts, one a row, padded on the right to ``length`` text tokens; images are given to ``greedy`` encoded.

    Raises ValueError for a prompt that is longer."""
    rows = len(prompts)
    images = max(len(prompt.image_positions) for prompt in prompts)
    batch = Batch(
        tokens=np.zeros((rows, length), np.int32),
        loss_mask=np.zeros((rows, length), bool),
        segments=np.zeros((rows, length), np.int32),
        image_positions=np.full((rows, images), length, np.int32),
        images=np.zeros((rows, images, 0, 0, 3), np.uint8),
        questions=np.zeros((rows, images, 2), np.int32),
    )
    for row, prompt in enumerate(prompts):
        count = len(prompt.ids)
        if count > length:
            raise ValueError(f"a prompt of {count} tokens in a batch of length {length}")
        batch.tokens[row, :count] = prompt.ids
        batch.segments[row, :count] = 1
        batch.image_positions[row, : len(prompt.image_positions)] = prompt.image_positions
        batch.questions[row, : len(prompt.questions)] = prompt.questions
    return batch


@functools.partial(jax.jit, static_argnames=("cfg", "max_new_tokens", "eos"))
def greedy(
    params: Params,
    cfg: ModelConfig,
    prompts: Batch,
    visual: Float[Array, "n V d"],
    valid: Bool[Array, "n V"] | None = None,
    *,
    max_new_tokens: int,
    eos: int,
) -> Int[Array, "B max_new_tokens"]:
    """The most likely next tokens of each prompt, up to and including ``eos``; 0 after it.

    visual, valid: of each image place, row by row (n = B * I), as ``encode`` gives them. Stops when every row has
    ended."""
    B, I = prompts.image_positions.shape
    rows = layout(prompts, None if valid is None else valid.reshape(B, I, -1), visual.shape[1])
    hidden = vlm.merge(params, cfg, prompts, rows, visual)
    weights, shape = params["decoder"], cfg.decoder
    live = rows.segments > 0
    S, slots = hidden.shape[1], (hidden.shape[1],)
    stages = ((0, shape.layers),)
    if cfg.fastv:
        stages, kept = fastv.stages(shape, cfg.fastv), fastv.kept_slots(rows, prompts.tokens.shape[1], cfg.fastv)
        slots = (S, S, kept)
    caches = tuple(
        decoder.init_cache(shape, B, count + max_new_tokens, hidden.dtype, layers=last - first)
        for (first, last), count in zip(stages, slots)
    )
    with jax.named_scope("prefill"):
        if cfg.fastv:
            hidden, rows, caches = fastv.run(weights, shape, hidden, rows, cfg.fastv, slots[-1], caches)
        else:
            hidden, cache = decoder.run(weights, shape, hidden, rows, cache=caches[0])
            caches = (cache,)
    last = slots[-1] - 1 - jnp.argmax(rows.segments[:, ::-1] > 0, axis=1)
    hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)

    def choose(hidden: Float[Array, "B 1 d"]) -> Int[Array, " B"]:
        return jnp.argmax(decoder.logits(weights, shape, decoder.finish(weights, shape, hidden)), axis=-1)[:, 0]

    def unfinished(carry):
        count, done, *_ = carry
        return (count < max_new_tokens) & ~done.all()

    def decode(carry):
        count, done, token, out, caches = carry
        token = jnp.where(done, 0, token)
        out = out.at[:, count].set(token)
        done |= token == eos
        hidden = decoder.embed(weights, shape, token[:, None], cfg.dtype)
        slot = text_layout((live.sum(1) + count)[:, None].astype(jnp.int32), jnp.ones((B, 1), jnp.int32))
        written = []
        for layers, cache in zip(stages, caches):
            hidden, cache = decoder.run(weights, shape, hidden, slot, layers=layers, cache=cache)
            written.append(cache)
        return count + 1, done, choose(hidden), out, tuple(written)

    out = jnp.zeros((B, max_new_tokens), jnp.int32)
    carry = (jnp.int32(0), jnp.zeros(B, bool), choose(hidden), out, caches)
    with jax.named_scope("decode"):
        return jax.lax.while_loop(unfinished, decode, carry)[3]

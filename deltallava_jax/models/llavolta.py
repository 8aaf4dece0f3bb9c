"""LLaVolta (Beckschen/LLaVolta, llava_llama.py): training pools the visual tokens before a decoder layer.

The phases of the schedule are equal parts of the training and pool less and less; the last one does not pool, so the
trained model is a plain one."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Float

from deltallava_jax.arrays import Array
from deltallava_jax.config import Config
from deltallava_jax.errors import ConfigError
from deltallava_jax.models import systems
from deltallava_jax.sequence import Batch, Layout, layout

Pooling = tuple[int, int]  # (stride, the decoder layer before which tokens are pooled)


def phase_at(phases: tuple[Pooling, ...], step: int, steps: int) -> Pooling | None:
    """The pooling of step ``step`` (from 0) of ``steps``; None for no pooling."""
    if not phases:
        return None
    stride, layer = phases[min(step * len(phases) // steps, len(phases) - 1)]
    return (stride, layer) if stride > 1 else None


def validate(cfg: Config) -> None:
    """ConfigError unless every phase fits the decoder and every budget of the projector."""
    for stride, layer in cfg.training.llavolta:
        if not 0 <= layer < cfg.model.decoder.layers:
            raise ConfigError(
                f"training.llavolta pools before layer {layer}; the decoder has {cfg.model.decoder.layers} layers"
            )
        for budget in systems.budgets(cfg.model.projector):
            if budget % stride:
                raise ConfigError(f"training.llavolta stride {stride} does not divide the {budget} tokens of an image")


def pool(
    hidden: Float[Array, "B S d"], rows: Layout, batch: Batch, V: int, stride: int
) -> tuple[Float[Array, "B P d"], Layout]:
    """Hidden states and layout with every ``stride`` visual tokens of an image, in reading order, pooled into one.

    rows: the layout of ``hidden``, V tokens per image. A pooled token is the mean of the states, at the mean of the
    rotary positions, rounded down; the rest is unchanged."""
    B, I = batch.image_positions.shape
    after = layout(batch, None, V // stride)
    first = batch.image_positions + jnp.arange(I) * (V - 1)  # each image's first row position
    visual = jnp.minimum(first[..., None] + jnp.arange(V), hidden.shape[1] - 1).reshape(B, I * V)
    opened = (batch.image_positions[:, None] < after.text_index[..., None]).sum(-1)  # images before a text token
    text = after.text_index + opened * (V - 1)

    def pooled(x: Array) -> Array:
        """[B, S, c] -> [B, P, c]"""
        take = lambda x, index: jnp.take_along_axis(x, index[..., None], axis=1)
        cells = take(x, visual).reshape(B, -1, stride, x.shape[-1])
        means = cells.mean(2) if jnp.issubdtype(x.dtype, jnp.floating) else cells.sum(2) // stride
        return jnp.where(after.is_visual[..., None], take(means, after.visual_index), take(x, text))

    positions = pooled(rows.positions[..., None])[..., 0]
    return pooled(hidden), dataclasses.replace(after, positions=positions)

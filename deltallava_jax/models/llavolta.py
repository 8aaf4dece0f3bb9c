"""LLaVolta (Beckschen/LLaVolta, llava_llama.py): while training, visual tokens are pooled before some decoder layer.

A schedule of phases, each an equal part of the training, compresses less and less; the last one not at all, so that
the trained model is a plain one."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Float

from deltallava_jax.arrays import Array
from deltallava_jax.config import Config
from deltallava_jax.errors import ConfigError
from deltallava_jax.models import systems
from deltallava_jax.sequence import Batch, Layout, layout

Pooling = tuple[int, int]  # (stride, layer before which it happens)


def phase_at(phases: tuple[Pooling, ...], step: int, steps: int) -> Pooling | None:
    """The pooling of step ``step`` (from 0) of ``steps``; None where nothing is pooled."""
    if not phases:
        return None
    stride, layer = phases[min(step * len(phases) // steps, len(phases) - 1)]
    return (stride, layer) if stride > 1 else None


def validate(cfg: Config) -> None:
    """ConfigError unless every phase fits the decoder and every budget of the projector."""
    for stride, layer in cfg.training.llavolta:
        if not 0 <= layer < cfg.model.decoder.layers:
            raise ConfigError(
                f"training.llavolta pools before layer {layer}; the decoder has {cfg.model.decoder.layers}"
            )
        for budget in systems.budgets(cfg.model.projector):
            if budget % stride:
                raise ConfigError(f"training.llavolta stride {stride} does not divide the {budget} tokens of an image")


def pool(
    hidden: Float[Array, "B S d"], rows: Layout, batch: Batch, V: int, stride: int
) -> tuple[Float[Array, "B P d"], Layout]:
    """Hidden states and layout with every ``stride`` visual slots of an image, in reading order, made one.

    rows: the layout of ``hidden``, V slots an image. The mean of their states at the mean of their positions, rounded
    down; everything else stays where it is."""
    B, I = batch.image_positions.shape
    after = layout(batch, None, V // stride)
    first = batch.image_positions + jnp.arange(I) * (V - 1)  # each image's first slot
    visual = jnp.minimum(first[..., None] + jnp.arange(V), hidden.shape[1] - 1).reshape(B, I * V)
    opened = (batch.image_positions[:, None] < after.text_index[..., None]).sum(-1)  # images before a text slot
    text = after.text_index + opened * (V - 1)

    def pooled(x: Array) -> Array:
        """[B, S, c] -> [B, P, c]"""
        take = lambda x, index: jnp.take_along_axis(x, index[..., None], axis=1)
        cells = take(x, visual).reshape(B, -1, stride, x.shape[-1])
        means = cells.mean(2) if jnp.issubdtype(x.dtype, jnp.floating) else cells.sum(2) // stride
        return jnp.where(after.is_visual[..., None], take(means, after.visual_index), take(x, text))

    positions = pooled(rows.positions[..., None])[..., 0]
    return pooled(hidden), dataclasses.replace(after, positions=positions)

"""Where an image's visual tokens go in a row of text: the one contract between the data and the models.

The data pipeline writes one placeholder (token id 0) per image and never knows how many visual tokens a model makes
of it. On the device, ``layout`` opens each placeholder into V visual tokens. Shapes: B rows, T text tokens with
placeholders, I image places per row, V visual tokens per image, S = T + I * (V - 1) tokens of an opened row.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from deltallava_jax.arrays import Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """Rows of packed conversations, numpy on the host or jax on the device.

    tokens: token ids; 0 at an image's placeholder and in the padding.
    loss_mask: True at tokens to predict.
    segments: 1, 2, ... for the conversations of a row, each a contiguous block; 0 is padding.
    image_positions: index into tokens of each image's placeholder, ascending; T where the place is unused.
    images: uint8 pixels, normalised on the device, or floats, normalised already.
    questions: token ids of each image's question, for systems that use it: its text alone, BOS first, padded with -1.
    branches: within a conversation, 0 for the part that all rounds share, 1, 2, ... for rounds that attend to the
        shared part but not to each other; None: each round attends to those before it.
    """

    tokens: Int[Array, "B T"]
    loss_mask: Bool[Array, "B T"]
    segments: Int[Array, "B T"]
    image_positions: Int[Array, "B I"]
    images: UInt8[Array, "B I H W 3"] | Float[Array, "B I H W 3"]
    questions: Int[Array, "B I Q"] | None = None
    branches: Int[Array, "B T"] | None = None

    @classmethod
    def shapes(
        cls,
        rows: int,
        text: int,
        images: int,
        size: int = 0,
        *,
        question: int = 0,
        branches: bool = False,
        make=jax.ShapeDtypeStruct,
    ) -> Batch:
        """The batch of B = rows, T = text, I = images, H = W = size and Q = question with make(shape, dtype) for each
        array; size 0: the images are encoded already; question 0: no questions."""

        def ints(*shape: int):
            return make((rows, *shape), np.int32)

        return cls(
            tokens=ints(text),
            loss_mask=make((rows, text), np.bool_),
            segments=ints(text),
            image_positions=ints(images),
            images=make((rows, images, size, size, 3), np.uint8),
            questions=ints(images, question) if question else None,
            branches=ints(text) if branches else None,
        )

    @classmethod
    def empty(
        cls, rows: int, text: int, images: int, size: int = 0, *, question: int = 0, branches: bool = False
    ) -> Batch:
        """A numpy batch of these ``shapes``, all padding, with no image place in use."""
        batch = cls.shapes(rows, text, images, size, question=question, branches=branches, make=np.zeros)
        batch.image_positions[:] = text
        if question:
            batch.questions[:] = -1
        return batch


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Layout:
    """What stands at each of a row's S positions.

    positions: rotary positions, restarting in each segment; they skip padding, and a branch continues from the shared
        part.
    segments: the token's conversation; 0 for padding and for visual tokens that do not exist.
    is_visual: the token belongs to an image.
    text_index, visual_index: where to gather from, in [0, T) and in [0, I * V); in range everywhere.
    targets, loss_mask: the token to predict from here and whether it counts.
    branches: as in Batch.
    """

    positions: Int[Array, "B S"]
    segments: Int[Array, "B S"]
    is_visual: Bool[Array, "B S"]
    text_index: Int[Array, "B S"]
    visual_index: Int[Array, "B S"]
    targets: Int[Array, "B S"]
    loss_mask: Bool[Array, "B S"]
    branches: Int[Array, "B S"] | None = None


def layout(batch: Batch, valid: Bool[Array, "B I V"] | None, V: int) -> Layout:
    """Opens each image's placeholder into V visual tokens.

    valid: which of an image's V tokens exist (None: all). Pure; V is static. A target is the next token of the same
    conversation, padding skipped."""
    B, T = batch.tokens.shape
    I = batch.image_positions.shape[1]
    S = T + I * (V - 1)
    index = jnp.arange(S)

    # First row position of each image; unused places start past the end.
    starts = jnp.where(batch.image_positions < T, batch.image_positions + jnp.arange(I) * (V - 1), S)
    opened = (index[None, :, None] >= starts[:, None, :]).sum(-1)  # images that begin at or before each position
    image = jnp.maximum(opened - 1, 0)
    if I:
        offset = index - jnp.take_along_axis(starts, image, axis=1)
    else:
        offset = jnp.full((B, S), V)
    is_visual = (opened > 0) & (offset < V)
    visual_index = jnp.where(is_visual, image * V + offset, 0)

    # An image before a text token takes V positions of the row, but one of the text.
    text_index = index - opened * (V - 1)
    inside = text_index < T
    text_index = jnp.clip(text_index, 0, T - 1)
    if I:
        placeholder = jnp.take_along_axis(batch.image_positions, image, axis=1)
        text_index = jnp.where(is_visual, jnp.clip(placeholder, 0, T - 1), text_index)
    inside = inside | is_visual

    conversation = jnp.where(inside, jnp.take_along_axis(batch.segments, text_index, axis=1), 0)
    live = conversation > 0
    if valid is not None and I:
        live &= ~is_visual | jnp.take_along_axis(valid.reshape(B, I * V), visual_index, axis=1)

    # Rotary positions: tokens before each position, padding skipped, less those before its conversation.
    before = jnp.cumsum(live, axis=1) - live
    begins = conversation != jnp.pad(conversation, ((0, 0), (1, 0)))[:, :-1]

    def latest(flags):
        """``before`` at the last flag up to each position."""
        return jax.lax.cummax(jnp.where(flags, before, 0), axis=1)

    positions = before - latest(begins)
    branches = None
    if batch.branches is not None:
        branches = jnp.where(inside, jnp.take_along_axis(batch.branches, text_index, axis=1), 0)
        left = jnp.pad(branches, ((0, 0), (1, 0)))[:, :-1]
        branch_begins = (branches > 0) & (begins | (branches != left))
        shared_ends = branch_begins & (begins | (left == 0))
        # In a branch: the length of the shared part, then the tokens since the branch began.
        alone = latest(shared_ends) - latest(begins) + before - latest(branch_begins)
        positions = jnp.where(branches > 0, alone, positions)
    positions = jnp.where(live, positions, 0)

    # The next token, padding skipped: a minimum over the positions to the right.
    following = jax.lax.cummin(jnp.where(live, index, S), axis=1, reverse=True)
    following = jnp.pad(following, ((0, 0), (0, 1)), constant_values=S)[:, 1:]
    exists = following < S
    following = jnp.minimum(following, S - 1)

    def at_next(values):
        return jnp.take_along_axis(values, following, axis=1)

    tokens = jnp.take_along_axis(batch.tokens, text_index, axis=1)
    supervised = jnp.take_along_axis(batch.loss_mask, text_index, axis=1) & ~is_visual & live
    loss_mask = live & exists & at_next(supervised) & (at_next(conversation) == conversation)
    if branches is not None:
        loss_mask &= (branches == 0) | (at_next(branches) == branches)

    return Layout(
        positions=positions.astype(jnp.int32),
        segments=jnp.where(live, conversation, 0).astype(jnp.int32),
        is_visual=is_visual,
        text_index=text_index.astype(jnp.int32),
        visual_index=visual_index.astype(jnp.int32),
        targets=jnp.where(loss_mask, at_next(tokens), 0).astype(jnp.int32),
        loss_mask=loss_mask,
        branches=branches,
    )


def text_layout(positions: Int[Array, "B S"], segments: Int[Array, "B S"]) -> Layout:
    """The layout of text tokens without targets: those appended while decoding."""
    zeros = jnp.zeros_like(positions)
    none = jnp.zeros_like(positions, bool)
    return Layout(positions, segments, none, zeros, zeros, zeros, none)


def budget_at(seed: int, step: int, budgets: tuple[int, ...]) -> int:
    """The budget (visual tokens per image) of a training step, uniform over ``budgets``; the same on every host."""
    if len(budgets) == 1:
        return budgets[0]
    return budgets[int(np.random.default_rng((seed, step)).integers(len(budgets)))]

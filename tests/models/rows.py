"""Rows for tests: layouts of plain text, and batches packed from conversations; checks on nested dicts."""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

from deltallava_jax.models.names import flatten
from deltallava_jax.sequence import Batch, Layout

SIDE = 32  # pixels of the test images


def text_layout(segments, positions=None) -> Layout:
    """Layout of rows without images; positions count within each segment unless given."""
    segments = np.asarray(segments, np.int32)
    if positions is None:
        equal = np.tril(segments[:, :, None] == segments[:, None, :])
        positions = np.where(segments > 0, equal.sum(-1) - 1, 0)
    zeros = jnp.zeros(segments.shape, jnp.int32)
    dead = zeros.astype(bool)
    return Layout(jnp.asarray(positions, jnp.int32), jnp.asarray(segments), dead, zeros, zeros, zeros, dead)


@dataclass(frozen=True)
class Conversation:
    """Token ids with 0 for each image, which of them are supervised, and the images."""

    tokens: list[int]
    supervised: list[bool]
    images: list[np.ndarray] = field(default_factory=list)


def conversation(rng, length: int, images: int = 0, vocab: int = 97) -> Conversation:
    """A random conversation with its images near the start, the later half supervised."""
    tokens = rng.integers(1, vocab, length)
    tokens[1 : 1 + 2 * images : 2] = 0
    supervised = (np.arange(length) >= length // 2) & (tokens > 0)
    pixels = [rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8) for _ in range(images)]
    return Conversation(tokens.tolist(), supervised.tolist(), pixels)


def pack(rows: list[list[Conversation]], T: int, I: int) -> Batch:
    """One row of the batch per list of conversations; unused image places are black."""
    batch = Batch.empty(len(rows), T, I, SIDE)
    for b, conversations in enumerate(rows):
        at = place = 0
        for number, one in enumerate(conversations, start=1):
            span = slice(at, at + len(one.tokens))
            batch.tokens[b, span], batch.segments[b, span] = one.tokens, number
            batch.loss_mask[b, span] = one.supervised
            for offset, pixels in zip(np.flatnonzero(np.equal(one.tokens, 0)), one.images, strict=True):
                batch.image_positions[b, place], batch.images[b, place] = at + offset, pixels
                place += 1
            at += len(one.tokens)
    return jax.tree.map(jnp.asarray, batch)


def random_params(init, cfg, seed: int = 0) -> dict:
    """Parameters of the shapes that init(cfg, key) makes, all far from special values, without compiling init."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        r = jnp.asarray(rng.standard_normal(leaf.shape), jnp.float32)
        name = path[-1].key
        return 1 + 0.3 * r if name == "scale" else r * (0.3 if name == "bias" else leaf.shape[-1] ** -0.5)

    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(lambda: init(cfg, jax.random.key(0))))


def assert_trees_close(ours: dict, theirs: dict, *, atol: float = 1e-4, rtol: float = 1e-4):
    """Equal paths and close leaves; the message names the leaf."""
    ours, theirs = flatten(ours), flatten(theirs)
    assert ours.keys() == theirs.keys()
    for path, leaf in ours.items():
        np.testing.assert_allclose(leaf, theirs[path], atol=atol, rtol=rtol, err_msg=path)

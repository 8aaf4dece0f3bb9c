"""QueCC in the whole model: the question is read by the decoder on its own, and no gradient goes through it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from rows import text_layout

from deltallava_jax.config import DecoderConfig, VisionConfig, compose
from deltallava_jax.models import decoder, vlm
from deltallava_jax.models.names import flatten
from deltallava_jax.sequence import Batch

CFG = compose(
    VisionConfig(image_size=32, patch_size=8, width=32, layers=2, heads=2, mlp_width=64),
    DecoderConfig(vocab_size=50, width=24, layers=2, heads=2, kv_heads=2, mlp_width=32, initializer_range=0.3),
    dict(name="quecc", scale_factor=2, head_dim=16, level_count=2, question_length=4, initializer_range=0.2),
    dtype="float32",
)
PARAMS = vlm.init_params(CFG, jax.random.key(0))


def batch():
    """Two rows: two images with questions of three and of six tokens; one image, its second place unused."""
    tokens = np.random.default_rng(0).integers(1, 50, (2, 14)).astype(np.int32)
    tokens[0, [1, 6]] = tokens[1, 2] = 0
    return Batch(
        tokens, np.ones((2, 14), bool), np.ones((2, 14), np.int32), np.array([[1, 6], [2, 14]], np.int32),
        np.random.default_rng(1).integers(0, 256, (2, 2, 32, 32, 3)).astype(np.uint8),
        questions=np.array([[[2, 5], [7, 13]], [[3, 6], [0, 0]]], np.int32),
    )  # fmt: skip


def test_a_question_is_read_alone_and_its_last_state_taken():
    rows = batch()
    found = vlm.question_states(PARAMS, CFG, jax.tree.map(jnp.asarray, rows))
    assert found.shape == (4, 24) and not found[3].any()  # the unused place
    for place, (row, start, end) in enumerate([(0, 2, 5), (0, 9, 13), (1, 3, 6)]):  # of six tokens the last four
        tokens = jnp.asarray(rows.tokens[row : row + 1, start:end])
        hidden = decoder.embed(PARAMS["decoder"], CFG.decoder, tokens)
        hidden, _ = decoder.run(PARAMS["decoder"], CFG.decoder, hidden, text_layout(np.ones(tokens.shape, np.int32)))
        expected = decoder.finish(PARAMS["decoder"], CFG.decoder, hidden)[0, -1]
        np.testing.assert_allclose(found[place], expected, atol=1e-5)


def test_the_question_changes_the_image_and_gets_no_gradient():
    rows = batch()
    other = dataclasses.replace(rows, questions=rows.questions + (rows.questions > 0))
    images = rows.images.reshape(4, 32, 32, 3)
    tokens, *_ = vlm.visual_tokens(PARAMS, CFG, images, rows)
    changed, *_ = vlm.visual_tokens(PARAMS, CFG, images, other)
    assert np.abs(tokens[:3] - changed[:3]).max() > 1e-3

    gradients = jax.grad(lambda p: (vlm.visual_tokens(p, CFG, images, rows)[0] ** 2).sum())(PARAMS)
    assert all(not leaf.any() for leaf in flatten(gradients["decoder"]).values())
    assert gradients["projector"]["text"]["kernel"].any()

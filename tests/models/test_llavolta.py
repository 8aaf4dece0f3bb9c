"""LLaVolta: stride 1 changes nothing, pooling by hand gives the same, the schedule ends in the plain model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deltallava_jax.config import Config, DecoderConfig, TrainingConfig, VisionConfig, compose
from deltallava_jax.errors import ConfigError
from deltallava_jax.models import decoder, llavolta, vlm
from deltallava_jax.sequence import layout
from tests.models.rows import SIDE, conversation, pack, random_params, text_layout

T, I, V = 20, 2, 16
VISION = VisionConfig(image_size=SIDE, patch_size=8, width=32, layers=2, heads=2, mlp_width=48)
DECODER = DecoderConfig(vocab_size=97, width=32, layers=3, heads=4, kv_heads=2, mlp_width=48)
CFG = compose(VISION, DECODER, dict(name="mlp"), dtype="float32")
PARAMS = random_params(vlm.init_params, CFG)
RNG = np.random.default_rng(1)
TALKS = [conversation(RNG, 9, images=1), conversation(RNG, 8, images=1), conversation(RNG, 7)]
BATCH = pack([TALKS[:2], [TALKS[1], TALKS[2]]], T, I)  # the second row leaves an image place unused
PHASES = ((8, 2), (2, 2), (2, 1), (1, 0))


def inputs(batch=BATCH):
    rows = layout(batch, None, V)
    images = batch.images.reshape(-1, SIDE, SIDE, 3)
    visual, *_ = vlm.visual_tokens(PARAMS, CFG, images)
    return vlm.merge(PARAMS, CFG, batch, rows, visual), rows


def test_stride_one_changes_nothing():
    hidden, rows = inputs()
    pooled, after = llavolta.pool(hidden, rows, BATCH, V, 1)
    live = np.asarray(rows.segments) > 0
    np.testing.assert_array_equal(np.asarray(pooled)[live], np.asarray(hidden)[live])
    for field in dataclasses.fields(rows):
        if getattr(rows, field.name) is not None:
            np.testing.assert_array_equal(getattr(after, field.name), getattr(rows, field.name), err_msg=field.name)


@pytest.mark.parametrize("stride, layer", [(8, 2), (2, 1), (16, 0), (4, 3)])
def test_pooling_by_hand(stride, layer):
    """Each conversation alone, its image's states averaged in numpy, run on by the decoder."""
    found, rows, _ = jax.jit(lambda p, b: vlm.hidden_states(p, CFG, b, pooling=(stride, layer)))(PARAMS, BATCH)
    weights = PARAMS["decoder"]
    for row, talks in enumerate([TALKS[:2], [TALKS[1], TALKS[2]]]):
        for number, talk in enumerate(talks, start=1):
            one = pack([[talk]], len(talk.tokens), len(talk.images))
            hidden, alone = inputs(one)
            hidden, _ = decoder.forward(weights, DECODER, hidden, alone, layers=(0, layer))
            x, positions = np.asarray(hidden[0]), np.arange(hidden.shape[1])
            if talk.images:
                at = talk.tokens.index(0)
                cells = [slice(start, start + stride) for start in range(at, at + V, stride)]
                x = np.concatenate([x[:at], *(x[cell].mean(0)[None] for cell in cells), x[at + V :]])
                middle = [int(np.floor(positions[cell].mean())) for cell in cells]
                positions = np.concatenate([positions[:at], middle, positions[at + V :]])
            by_hand = text_layout(np.ones((1, len(x))), positions[None])
            x, _ = decoder.forward(weights, DECODER, jnp.asarray(x[None]), by_hand, layers=(layer, DECODER.layers))
            expected = decoder.finish(weights, DECODER, x)[0]
            own = np.asarray(rows.segments[row]) == number
            np.testing.assert_array_equal(np.asarray(rows.positions[row])[own], positions)
            np.testing.assert_allclose(np.asarray(found[row])[own], expected, atol=1e-5)


def test_the_same_tokens_are_supervised():
    losses = {}
    for pooling in (None, (8, 2), (2, 1)):
        total, count = vlm.loss_sum(PARAMS, CFG, BATCH, None, train=False, pooling=pooling)
        assert count == BATCH.loss_mask.sum()
        losses[pooling] = float(total)
    assert len(set(losses.values())) == 3


def test_the_schedule_is_equal_parts_and_ends_plain():
    phases = [llavolta.phase_at(PHASES, step, 10) for step in range(10)]
    assert phases == [(8, 2)] * 3 + [(2, 2)] * 2 + [(2, 1)] * 3 + [None] * 2
    assert [llavolta.phase_at((), step, 10) for step in range(10)] == [None] * 10


@pytest.mark.parametrize(
    "phases, words",
    [
        (((3, 1), (1, 0)), "stride 3 does not divide the 16 tokens of an image"),
        (((2, 3),), "pools before layer 3; the decoder has 3"),
    ],
)
def test_a_phase_that_does_not_fit_is_refused(phases, words):
    with pytest.raises(ConfigError, match=words):
        llavolta.validate(Config(model=CFG, training=TrainingConfig(llavolta=phases)))


@pytest.mark.parametrize("phase", [(8,), (0, 2), (8, 2, 1)])
def test_a_phase_is_a_stride_and_a_layer(phase):
    with pytest.raises(ConfigError, match="expected \\(stride, decoder layer\\)"):
        TrainingConfig(llavolta=(phase,))

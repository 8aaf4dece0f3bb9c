"""FastV: the original's choice of tokens; keeping all is the plain model; cached decoding is the pruned forward."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deltallava_jax.config import DecoderConfig, FastVConfig, VisionConfig, compose
from deltallava_jax.errors import ConfigError
from deltallava_jax.inference.generate import Engine
from deltallava_jax.inference.sampling import Sampling
from deltallava_jax.models import decoder, fastv, vlm
from deltallava_jax.sequence import Batch, layout
from tests import golden
from tests.models.rows import text_layout

CFG = compose(
    VisionConfig(image_size=32, patch_size=8, width=32, layers=2, heads=2, mlp_width=64),
    DecoderConfig(vocab_size=50, width=32, layers=4, heads=4, kv_heads=2, mlp_width=64, initializer_range=0.3),
    dict(name="mlp"),
    dtype="float32",
)
PARAMS = vlm.init_params(CFG, jax.random.key(0))
V, NEW = 16, 4


def prompts():
    """Two prompts of unequal length, an image in each, the second with padding."""
    tokens = np.random.default_rng(0).integers(1, 50, (2, 9)).astype(np.int32)
    tokens[0, 3] = tokens[1, 1] = 0
    tokens[1, 6:] = 0
    segments = np.ones((2, 9), np.int32)
    segments[1, 6:] = 0
    pixels = np.random.default_rng(1).integers(0, 256, (2, 1, 32, 32, 3)).astype(np.uint8)
    batch = Batch(tokens, np.zeros((2, 9), bool), segments, np.array([[3], [1]], np.int32), pixels)
    return jax.tree.map(jnp.asarray, batch)


def with_fastv(layer, keep):
    return dataclasses.replace(CFG, fastv=FastVConfig(layer, keep))


def answers(cfg):
    batch = prompts()
    engine = Engine(PARAMS, cfg)
    visual = engine.encode(batch.images[:, 0], budget=V)
    return np.array(engine.tokens(batch, *visual, Sampling(max_new_tokens=NEW), end=-1))


@pytest.mark.parametrize("keep", [288, 144, 64, 36, 16, 4, 1])
def test_golden(keep):
    logits = golden.inputs("fastv_attn_logits", (1, 8, 652, 652))[0, :, -1]  # the last row sees everything
    scores = np.asarray(jax.nn.softmax(logits, axis=-1)).mean(0)[None]
    expected = golden.outputs("fastv")
    np.testing.assert_allclose(scores[0], expected["last_row_mean"], rtol=1e-5)
    is_visual = (np.arange(652) >= 35) & (np.arange(652) < 611)
    live = np.ones((1, 652), bool)
    order, stays = fastv.select(scores, is_visual[None], live, keep, 76 + keep)
    assert stays.all()
    np.testing.assert_array_equal(order[0], expected[f"keep_k{keep}"])


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_keeping_every_token_is_the_unpruned_model(layer):
    np.testing.assert_array_equal(answers(with_fastv(layer, V)), answers(CFG))


@pytest.mark.parametrize("layer, keep", [(1, 4), (2, 4), (3, 1)])
def test_cached_decoding_is_the_forward_over_the_pruned_rows(layer, keep):
    cfg, batch = with_fastv(layer, keep), prompts()
    found = answers(cfg)
    visual, _, _ = vlm.visual_tokens(PARAMS, CFG, batch.images[:, 0], budget=V)
    weights = PARAMS["decoder"]
    for row in range(2):
        one = jax.tree.map(lambda x, row=row: x[row : row + 1], batch)
        rows = layout(one, None, V)
        hidden = vlm.merge(PARAMS, CFG, one, rows, visual[row : row + 1])
        before = decoder.forward(weights, CFG.decoder, hidden, rows, layers=(0, layer - 1))[0]
        # The score, written out: the attention of the last token in the layer before the cut.
        live = np.flatnonzero(rows.segments[0])
        scores = np.asarray(attention_of_last(weights, before[:, live], rows.positions[:, live], layer - 1))
        visible = [at for at in live if rows.is_visual[0, at]]
        best = sorted(visible, key=lambda at: -scores[list(live).index(at)])[:keep]
        kept = [at for at in live if at in best or at not in visible]
        sequence, positions = hidden[:, live], rows.positions[:, live]
        for step in range(NEW):
            segments = jnp.ones(positions.shape, jnp.int32)
            full = text_layout_of(positions, segments)
            middle = decoder.forward(weights, CFG.decoder, sequence, full, layers=(0, layer))[0]
            stay = np.array([list(live).index(at) for at in kept] + list(range(len(live), sequence.shape[1])))
            pruned = text_layout_of(positions[:, stay], segments[:, stay])
            final = decoder.forward(weights, CFG.decoder, middle[:, stay], pruned, layers=(layer, 4))[0]
            normed = decoder.finish(weights, CFG.decoder, final[:, -1:])
            token = int(jnp.argmax(decoder.logits(weights, CFG.decoder, normed)[0, 0]))
            assert token == found[row, step], (row, step)
            new = decoder.embed(weights, CFG.decoder, jnp.array([[token]]))
            sequence = jnp.concatenate([sequence, new], axis=1)
            positions = jnp.concatenate([positions, positions[:, -1:] + 1], axis=1)


def text_layout_of(positions, segments):
    return dataclasses.replace(text_layout(segments), positions=positions)


def attention_of_last(weights, hidden, positions, layer):
    """Head mean of the last token's attention over all tokens, by plain numpy."""
    layer = jax.tree.map(lambda x: np.asarray(x[layer], np.float64), weights["layers"])
    x = np.asarray(hidden[0], np.float64)
    y = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * layer["attention_norm"]["scale"]
    frequencies = 10000.0 ** -(np.arange(4) / 4)
    angles = np.asarray(positions[0])[:, None] * frequencies

    def heads(kernel, count):
        t = (y @ kernel).reshape(len(y), count, 8)
        a, b = t[..., :4], t[..., 4:]
        cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    q, k = heads(layer["q"]["kernel"], 4)[-1], np.repeat(heads(layer["k"]["kernel"], 2), 2, axis=1)
    scores = np.einsum("hd,thd->ht", q, k) / np.sqrt(8)
    scores = np.exp(scores - scores.max(-1, keepdims=True))
    return (scores / scores.sum(-1, keepdims=True)).mean(0)


def test_a_layer_that_does_not_exist_is_refused():
    with pytest.raises(ConfigError, match="fastv.layer=4; the decoder has 4 layers"):
        with_fastv(4, 3)

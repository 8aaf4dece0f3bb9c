"""The decoder against itself: caches, slices of layers, packing, padding, causality."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rows import jitter, text_layout

from deltallava_jax.config import DecoderConfig
from deltallava_jax.models import decoder

CFG = DecoderConfig(vocab_size=50, width=32, layers=3, heads=4, kv_heads=2, mlp_width=48)
LENGTHS = np.array([9, 6, 2])
close = functools.partial(np.testing.assert_allclose, atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def params():
    return jitter(decoder.init_params(CFG, jax.random.key(0)), scale=1.0)


def random_hidden(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal((*shape, CFG.width)).astype(np.float32)


@functools.partial(jax.jit, static_argnames="layers")
def run(params, hidden, slots, cache=None, layers=None):
    return decoder.run(params, CFG, hidden, slots, layers=layers, cache=cache)


def forward(params, hidden, segments, layers=None):
    """Uncached run of rows with those segments."""
    return np.asarray(run(params, hidden, text_layout(segments), layers=layers)[0])


def test_cached_decoding_equals_the_uncached_forward(params):
    """Rows of unequal length, padded on the right, prefilled together, then four single-token steps."""
    steps, widest = 4, LENGTHS.max()
    inputs = [random_hidden(n + steps, seed=n) for n in LENGTHS]
    alone = [forward(params, x[None], np.ones((1, len(x)), int))[0] for x in inputs]

    prompt = random_hidden(3, widest, seed=99)  # the padding holds noise
    for b, n in enumerate(LENGTHS):
        prompt[b, :n] = inputs[b][:n]
    cache = decoder.init_cache(CFG, rows=3, slots=widest + steps + 2)
    hidden, cache = run(params, prompt, text_layout(np.arange(widest) < LENGTHS[:, None]), cache)
    for b, n in enumerate(LENGTHS):
        close(hidden[b, :n], alone[b][:n], err_msg=f"prefill of row {b}")
    for step in range(steps):
        token = np.stack([inputs[b][n + step] for b, n in enumerate(LENGTHS)])[:, None]
        slots = text_layout(np.ones((3, 1)), positions=LENGTHS[:, None] + step)
        hidden, cache = run(params, token, slots, cache)
        close(hidden[:, 0], np.stack([alone[b][n + step] for b, n in enumerate(LENGTHS)]), err_msg=f"step {step}")
    assert cache.length == widest + steps


def test_a_finished_row_can_append_dead_slots(params):
    """A row whose step is dead (segment 0) is as if the step had not been, for itself and for its neighbour."""
    x = random_hidden(2, 6)
    alone = forward(params, x, np.ones((2, 6), int))
    hidden, cache = run(params, x[:, :4], text_layout(np.ones((2, 4))), decoder.init_cache(CFG, 2, 8))
    first = np.stack([x[0, 4], random_hidden(seed=7)])[:, None]
    hidden, cache = run(params, first, text_layout([[1], [0]], positions=[[4], [0]]), cache)
    close(hidden[0, 0], alone[0, 4])
    hidden, cache = run(params, np.stack([x[0, 5], x[1, 4]])[:, None], text_layout([[1], [1]], [[5], [4]]), cache)
    close(hidden[:, 0], np.stack([alone[0, 5], alone[1, 4]]))


def test_prefill_in_two_pieces_equals_one(params):
    x, segments = random_hidden(2, 10), np.array([[1] * 10, [1] * 3 + [2] * 5 + [0] * 2])
    whole = text_layout(segments)
    expected, once = run(params, x, whole, decoder.init_cache(CFG, 2, 12))
    cache, pieces = decoder.init_cache(CFG, 2, 12), []
    for part in (slice(0, 6), slice(6, 10)):
        hidden, cache = run(params, x[:, part], jax.tree.map(lambda leaf: leaf[:, part], whole), cache)  # noqa: B023
        pieces.append(hidden)
    live = segments > 0
    close(np.concatenate(pieces, axis=1)[live], expected[live])
    close(forward(params, x, segments)[live], expected[live])
    np.testing.assert_array_equal(cache.segments, np.pad(segments, ((0, 0), (0, 2))))
    assert cache.length == once.length == 10
    written = np.pad(live, ((0, 0), (0, 2)))
    close(cache.k[:, written], once.k[:, written])
    close(cache.v[:, written], once.v[:, written])


@pytest.mark.parametrize("K", [1, 2])
def test_two_slices_of_layers_equal_all(params, K):
    """With and without caches, one cache for each slice, over a prefill and a step."""
    x, L = random_hidden(2, 8), CFG.layers
    segments = np.ones((2, 8), int)
    expected = forward(params, x, segments)
    middle = forward(params, x, segments, layers=(0, K))
    assert np.abs(middle - expected).max() > 0.1
    close(forward(params, middle, segments, layers=(K, L)), expected)

    caches = {layers: decoder.init_cache(CFG, 2, 8, layers=layers[1] - layers[0]) for layers in ((0, K), (K, L))}
    whole = text_layout(segments)
    for part in (slice(0, 7), slice(7, 8)):
        hidden = x[:, part]
        for layers in caches:
            slots = jax.tree.map(lambda leaf: leaf[:, part], whole)  # noqa: B023
            hidden, caches[layers] = run(params, hidden, slots, caches[layers], layers=layers)
        close(hidden, expected[:, part])


def test_packed_conversations_do_not_see_each_other(params):
    """Two in a row are as each alone, and changing one leaves the other's hidden states bit-identical."""
    x, segments = random_hidden(1, 14), np.array([[1] * 5 + [2] * 7 + [0] * 2])
    packed = forward(params, x, segments)
    parts = {"first": slice(0, 5), "second": slice(5, 12)}
    for part in parts.values():
        length = part.stop - part.start
        close(packed[:, part], forward(params, x[:, part], np.ones((1, length), int)))
    for changed, kept in (("first", "second"), ("second", "first")):
        other = x.copy()
        other[:, parts[changed]] += 1
        perturbed = forward(params, other, segments)
        np.testing.assert_array_equal(perturbed[:, parts[kept]], packed[:, parts[kept]])
        assert np.abs(perturbed - packed)[:, parts[changed]].min(-1).max() > 1e-4


def test_padding_changes_nothing(params):
    """Dead slots at the end and in the middle of a conversation, whatever they hold."""
    x, segments = random_hidden(1, 12), np.array([[1, 1, 1, 0, 0, 1, 1, 0, 1, 1, 0, 0]])
    live = segments > 0
    padded = forward(params, x, segments)
    close(padded[live], forward(params, x[live][None], np.ones((1, live.sum()), int))[0])
    other = np.where(live[..., None], x, 100 * random_hidden(1, 12, seed=5))
    np.testing.assert_array_equal(forward(params, other, segments)[live], padded[live])
    assert np.isfinite(padded).all()


def test_causality(params):
    """A changed slot leaves all before it bit-identical and reaches itself and all after."""
    x, segments = random_hidden(1, 9), np.ones((1, 9), int)
    base = forward(params, x, segments)
    for at in range(9):
        other = x.copy()
        other[:, at] += 1
        change = np.abs(forward(params, other, segments) - base)[0].max(-1)
        assert (change[:at] == 0).all() and (change[at:] > 1e-4).all(), f"slot {at}"


def test_embedding_head_and_dtypes(params):
    """The head reads the final norm's output; bfloat16 hidden states give float32 logits."""
    tokens = np.array([[3, 49, 0]])
    hidden = decoder.embed(params, CFG, tokens)
    np.testing.assert_array_equal(hidden, np.asarray(params["embed"]["embedding"])[tokens])
    normed = decoder.finish(params, CFG, hidden)
    scale = np.asarray(params["head"]["norm"]["scale"])
    close(normed, hidden / np.sqrt((np.asarray(hidden) ** 2).mean(-1, keepdims=True) + CFG.norm_eps) * scale)
    close(decoder.logits(params, CFG, normed), np.asarray(normed) @ np.asarray(params["head"]["out"]["kernel"]))

    half = decoder.embed(params, CFG, tokens, jnp.bfloat16)
    slots = text_layout(np.ones((1, 3)))
    out, cache = run(params, half, slots, decoder.init_cache(CFG, 1, 4, dtype=jnp.bfloat16))
    assert half.dtype == out.dtype == cache.k.dtype == jnp.bfloat16
    scores = decoder.logits(params, CFG, decoder.finish(params, CFG, out))
    assert scores.dtype == jnp.float32
    exact = decoder.logits(params, CFG, decoder.finish(params, CFG, run(params, hidden, slots)[0]))
    assert np.abs(scores - exact).max() < 0.1 * np.abs(exact).max()

"""The decoder against a plain numpy one on rows without padding, and against itself: caches, slices, packing."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deltallava_jax.config import DecoderConfig
from deltallava_jax.models import decoder
from tests.models.rows import random_params, text_layout

CFG = DecoderConfig(vocab_size=50, width=32, layers=3, heads=4, kv_heads=2, mlp_width=48)
PARAMS = random_params(decoder.init_params, CFG)
LENGTHS = np.array([9, 6, 2])  # tokens of three rows, without padding
ROW, CAPACITY = 9, 15  # tokens of a row, and of a cache
close = functools.partial(np.testing.assert_allclose, atol=2e-5, rtol=1e-5)


def random_hidden(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal((*shape, CFG.width)).astype(np.float32)


def part(rows, start, stop):
    """The layout of some of the positions."""
    return jax.tree.map(lambda leaf: leaf[:, start:stop], rows)


@functools.partial(jax.jit, static_argnames=("layers", "read"))
def run(hidden, rows, cache=None, layers=None, read=None):
    return decoder.forward(PARAMS, CFG, hidden, rows, layers=layers, cache=cache, read=read)


def forward(hidden, segments):
    return np.asarray(run(hidden, text_layout(segments))[0])


def alone(x, layers=(0, CFG.layers)):
    """One conversation [T, width] through some layers, in float64 numpy."""
    T, D, x = len(x), CFG.head_dim, x.astype(float)
    angles = np.arange(T)[:, None, None] * CFG.rope_base ** -(np.arange(0, D, 2) / D)
    cosine, sine = np.cos(angles), np.sin(angles)

    def rotated(t):
        a, b = np.split(t, 2, axis=-1)
        return np.concatenate([a * cosine - b * sine, b * cosine + a * sine], axis=-1)

    for index in range(*layers):
        layer = jax.tree.map(lambda leaf: leaf[index], PARAMS["layers"])  # noqa: B023
        normed = lambda t, name: t / np.sqrt((t**2).mean(-1, keepdims=True) + 1e-5) * layer[name]["scale"]  # noqa: B023, E731
        y = normed(x, "attention_norm")
        q, k, v = (np.reshape(y @ layer[name]["kernel"], (T, -1, D)) for name in "qkv")
        k, v = (np.repeat(t, CFG.heads // CFG.kv_heads, axis=1) for t in (rotated(k), v))
        scores = np.einsum("qhd,khd->hqk", rotated(q), k) / np.sqrt(D)
        weights = np.exp(np.where(np.tri(T, dtype=bool), scores, -np.inf))
        weights /= weights.sum(-1, keepdims=True)
        x = x + np.einsum("hqk,khd->qhd", weights, v).reshape(T, -1) @ layer["o"]["kernel"]
        y = normed(x, "mlp_norm")
        gate = y @ layer["gate"]["kernel"]
        x = x + (gate / (1 + np.exp(-gate)) * (y @ layer["up"]["kernel"])) @ layer["down"]["kernel"]
    return x


def prompts(inputs):
    """Rows of unequal length padded on the right with noise, and their layout."""
    hidden = 10 * random_hidden(len(inputs), ROW, seed=99)
    for row, x, n in zip(hidden, inputs, LENGTHS, strict=True):
        row[:n] = x[:n]
    return hidden, text_layout(np.arange(ROW) < LENGTHS[:, None])


@pytest.mark.parametrize("read", [None, 13])
def test_cached_decoding_equals_the_uncached_forward(read):
    """Rows of unequal length prefilled together, then four single-token steps, against each row alone; what lies beyond
    the read positions is NaN."""
    inputs = [random_hidden(n + 4, seed=n) for n in LENGTHS]
    expected = [alone(x) for x in inputs]
    cache = decoder.init_cache(CFG, rows=3, capacity=CAPACITY)
    if read:
        beyond = jnp.arange(CAPACITY)[:, None] >= read
        poisoned = (tuple(jnp.where(beyond, jnp.nan, x) for x in leaves) for leaves in (cache.k, cache.v))
        cache = dataclasses.replace(cache, **dict(zip("kv", poisoned, strict=True)))
    hidden, cache = run(*prompts(inputs), cache, read=read)
    for b, n in enumerate(LENGTHS):
        close(hidden[b, :n], expected[b][:n], err_msg=f"prefill of row {b}")
    for step in range(4):
        token = np.stack([x[n + step] for x, n in zip(inputs, LENGTHS, strict=True)])[:, None]
        hidden, cache = run(token, text_layout(np.ones((3, 1)), LENGTHS[:, None] + step), cache, read=read)
        close(
            hidden[:, 0],
            np.stack([x[n + step] for x, n in zip(expected, LENGTHS, strict=True)]),
            err_msg=f"step {step}",
        )
    np.testing.assert_array_equal(cache.length, LENGTHS + 4)  # padding is overwritten


def test_a_step_of_padding_changes_nothing():
    """A row ignores a step with segment 0, and its neighbours are not affected."""
    inputs = [random_hidden(n + 2, seed=n) for n in LENGTHS]
    expected = [alone(x) for x in inputs]
    hidden, cache = run(*prompts(inputs), decoder.init_cache(CFG, rows=3, capacity=CAPACITY))
    at = LENGTHS.copy()
    for alive in ([1, 0, 1], [1, 1, 0]):
        token = np.stack([x[i] for x, i in zip(inputs, at, strict=True)])[:, None]
        hidden, cache = run(token, text_layout(np.array(alive)[:, None], at[:, None]), cache)
        for b in np.flatnonzero(alive):
            close(hidden[b, 0], expected[b][at[b]])
        at += alive
    assert at.tolist() == [11, 7, 3]


def test_prefill_in_two_pieces_equals_one():
    """Rows of unequal length, one with a padding token inside; a fresh cache need not be attended to."""
    x = random_hidden(3, ROW)
    live = np.array([[1] * 9, [1, 1, 0] + [1] * 4 + [0] * 2, [1] * 7 + [0] * 2]) > 0
    rows = text_layout(live)
    empty = decoder.init_cache(CFG, rows=3, capacity=CAPACITY)
    expected, once = run(x, rows, empty)
    fresh, again = decoder.forward(PARAMS, CFG, x, rows, cache=empty, fresh=True)
    first, cache = run(x[:, :5], part(rows, 0, 5), empty)
    second, cache = run(x[:, 5:], part(rows, 5, 9), cache)
    close(np.concatenate([first, second], axis=1)[live], expected[live])
    close(fresh[live], expected[live])
    close(expected[0], alone(x[0]))
    written = np.pad(live, ((0, 0), (0, CAPACITY - ROW)))
    for one in (once, again, cache):
        np.testing.assert_array_equal(one.length, [9, 7, 7])
        np.testing.assert_array_equal(one.live, written)
        for mine, reference in zip(one.k + one.v, once.k + once.v, strict=True):
            mine, reference = (np.swapaxes(x, 1, 2) for x in (mine, reference))
            close(mine[written], reference[written])
            assert not np.any(mine[:, ROW:])


def test_unstacked_layers_are_the_same_decoder():
    x, rows = random_hidden(2, ROW), text_layout(np.ones((2, ROW)))
    params = decoder.unstacked(PARAMS, CFG)
    mine, reference = (jax.jit(lambda p: decoder.forward(p, CFG, x, rows)[0])(p) for p in (params, PARAMS))
    close(mine, reference)
    close(decoder.logits(params, CFG, mine), decoder.logits(PARAMS, CFG, reference))
    given = jax.tree.map(jnp.copy, PARAMS)
    jax.tree.map(np.testing.assert_array_equal, decoder.unstacked(given, CFG, donate=True), params)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given["layers"]))


def test_slices_of_layers_equal_all():
    """Layers 0 to 1, then 1 to 3, without caches and with a cache for each slice over a prefill and a step."""
    x, slices = random_hidden(1, ROW), ((0, 1), (1, 3))
    rows = text_layout(np.ones((1, ROW)))
    middle, expected = alone(x[0], layers=(0, 1)), alone(x[0])

    @jax.jit
    def uncached(x):
        first = decoder.forward(PARAMS, CFG, x, rows, layers=slices[0])[0]
        return first, decoder.forward(PARAMS, CFG, first, rows, layers=slices[1])[0]

    @jax.jit
    def cached(x):
        caches = [decoder.init_cache(CFG, 1, ROW, layers=last - first) for first, last in slices]
        pieces = []
        for piece in (slice(0, 8), slice(8, 9)):
            hidden, here = x[:, piece], part(rows, piece.start, piece.stop)
            for i, layers in enumerate(slices):
                hidden, caches[i] = decoder.forward(PARAMS, CFG, hidden, here, layers=layers, cache=caches[i])
            pieces.append(hidden)
        return jnp.concatenate(pieces, axis=1), caches

    first, last = uncached(x)
    close(first[0], middle)
    close(last[0], expected)
    hidden, caches = cached(x)
    close(hidden[0], expected)
    assert [len(cache.k) for cache in caches] == [1, 2]


def test_packed_conversations_do_not_attend_to_each_other():
    """Two packed ones equal each alone, and changing one leaves the other's hidden states bit-identical."""
    x, segments = random_hidden(1, 12), np.array([[1] * 4 + [2] * 6 + [0] * 2])
    packed, parts = forward(x, segments), (slice(0, 4), slice(4, 10))
    for one in parts:
        close(packed[0, one], alone(x[0, one]))
    for mine, other in (parts, parts[::-1]):
        perturbed = x.copy()
        perturbed[:, mine] += random_hidden(seed=8)
        after = forward(perturbed, segments)
        np.testing.assert_array_equal(after[:, other], packed[:, other])
        assert (np.abs(after - packed)[:, mine].max(-1) > 1e-3).all()


def test_padding_changes_nothing():
    """Padding at the end and in the middle of a conversation, whatever it holds."""
    x, live = random_hidden(1, 12), np.array([[1, 1, 1, 0, 0, 1, 1, 0, 1, 1, 0, 0]]) > 0
    padded = forward(x, live)
    close(padded[live], alone(x[live]))
    other = np.where(live[..., None], x, 100 * random_hidden(1, 12, seed=5))
    np.testing.assert_array_equal(forward(other, live)[live], padded[live])
    assert np.isfinite(padded).all()


def test_causality():
    """Changing a token leaves all before it bit-identical and changes itself and all after."""
    x, segments = random_hidden(1, 12), np.ones((1, 12), int)
    before = forward(x, segments)
    for at in range(12):
        perturbed = x.copy()
        perturbed[:, at] += random_hidden(seed=8)
        change = np.abs(forward(perturbed, segments) - before)[0].max(-1)
        assert (change[:at] == 0).all() and (change[at:] > 1e-4).all(), f"position {at}"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_embedding_and_head(dtype):
    """embed looks up rows, finish is the RMS norm, logits are float32 in any compute dtype."""
    tokens, rows = np.array([[3, 49, 0]]), np.asarray(PARAMS["embed"]["embedding"])

    @jax.jit
    def ours(params):
        hidden = decoder.embed(params, CFG, tokens, dtype)
        normed = decoder.finish(params, CFG, hidden)
        return hidden, normed, decoder.logits(params, CFG, normed)

    hidden, normed, logits = ours(PARAMS)
    assert hidden.dtype == normed.dtype == dtype and logits.dtype == jnp.float32
    expected = rows[tokens] / np.sqrt((rows[tokens] ** 2).mean(-1, keepdims=True) + 1e-5)
    expected = expected * PARAMS["head"]["norm"]["scale"]
    tolerance = dict(atol=1e-5) if dtype == "float32" else dict(atol=0.03, rtol=0.03)
    np.testing.assert_allclose(np.asarray(hidden, np.float32), rows[tokens], **tolerance)
    np.testing.assert_allclose(np.asarray(normed, np.float32), expected, **tolerance)
    np.testing.assert_allclose(logits, expected @ PARAMS["head"]["out"]["kernel"], **tolerance)

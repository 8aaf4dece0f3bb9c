"""cuDNN's calls for packed rows: what they are given, and that, computed as cuDNN documents them, it is attention by
segments."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deltallava_jax.analysis import flops
from deltallava_jax.kernels import devices
from deltallava_jax.kernels.attention import AttentionMask, attention, causal, cudnn_segments
from tests.kernels.test_attention import both, draw

PACKED = [[1] * 70 + [2] * 60 + [0] * 20, [1] * 40 + [2] * 9 + [3] * 101]
ROWS = {
    "packed": PACKED,
    "one segment": [[1] * 150, [1] * 149 + [0]],
    "padding alone": [[0] * 150, [1] * 150],
    "a hole": [[1] * 30 + [0] * 5 + [1] * 35 + [2] * 80, PACKED[1]],
    "out of order": [[2] * 70 + [1] * 80, PACKED[1]],
    "many segments": [[1 + n // 3 for n in range(150)], PACKED[1]],
}


def sequences(segments):
    """Of each row, ids, starts and lengths of the runs of equal segments."""
    found = []
    for row in segments:
        starts = [at for at in range(len(row)) if at == 0 or row[at] != row[at - 1]]
        found.append([(row[a], a, b - a) for a, b in zip(starts, [*starts[1:], len(row)], strict=True)])
    return found


@pytest.fixture
def calls(monkeypatch):
    """Calls of cuDNN computed from their operands alone, over the tokens of all rows; the names of those that ran."""
    ran = []

    def call(name, q, k, segments, products, results, *operands):
        backward = name.endswith("Backward")
        q, k, v, *rest = operands
        rows, length, heads, width = q.shape
        place = jnp.arange(rows * length)
        allowed = place[:, None] >= place
        if segments > 1:
            lengths, key_lengths, starts, key_starts = rest[-4:]
            ids = []
            for count, start, x in ((lengths, starts, q), (key_lengths, key_starts, k)):
                begin = (start.reshape(-1)[: count.size] // (x.shape[2] * x.shape[3]))[:, None]
                within = (place >= begin) & (place < begin + count.reshape(-1, 1))
                ids.append(jnp.where(within.any(0), within.argmax(0), -1))
            allowed &= ids[0][:, None] == ids[1]
            scores = jnp.zeros((1, 1))
        else:
            scores = rest[-2 if backward else -1]
            allowed &= place[:, None] // length == place // length
            blocks = jnp.zeros((rows, length, rows, length))
            scores = blocks.at[jnp.arange(rows), :, jnp.arange(rows)].set(scores[:, 0].astype(jnp.float32))
            scores = scores.reshape(rows * length, rows * length)

        def attend(q, k, v):
            flat = lambda x: x.reshape(1, rows * length, *x.shape[2:]).astype(jnp.float32)
            out = jax.nn.dot_product_attention(*map(flat, (q, k, v)), scores[None, None], allowed[None, None])
            return out.reshape(q.shape).astype(q.dtype)

        jax.debug.callback(lambda: ran.append(name))
        out, pull = jax.vjp(attend, q, k, v)
        if backward:
            return pull(rest[1])
        return out, jnp.ones(results[1].shape, jnp.float32)

    monkeypatch.setattr(cudnn_segments, "_call", call)
    monkeypatch.setattr(devices, "device", lambda: ("gpu", "NVIDIA H100 80GB HBM3"))
    return ran


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("key_heads", [4, 2])
def test_segments_attend_to_themselves(calls, kind, key_heads):
    arrays = draw(key_heads=key_heads, width=32, dtype="bfloat16")
    mask = causal(jnp.asarray(ROWS[kind]))
    found = both(lambda *qkv: attention(*qkv, mask, implementation="cudnn_segments"))(*arrays)
    expected = both(lambda *qkv: attention(*qkv, mask, implementation="xla"))(*(x.astype("float32") for x in arrays))
    for name, a, b in zip(("out", "dq", "dk", "dv"), found, expected, strict=True):
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        assert np.isfinite(a).all()
        assert np.abs(a - b).max() < 2e-2 * np.abs(b).max(), name
    jax.effects_barrier()
    takes = key_heads == 4 and kind in ("packed", "one segment", "padding alone")
    assert calls == (["Softmax", "SoftmaxBackward"] if takes else ["ScaleBiasSoftmax", "ScaleBiasSoftmaxBackward"])


def test_gpus_before_hopper_take_the_mask(calls, monkeypatch):
    monkeypatch.setattr(devices, "device", lambda: ("gpu", "NVIDIA A100-SXM4-80GB"))
    arrays = draw(key_heads=4, width=32, dtype="bfloat16")[:3]
    attention(*arrays, causal(jnp.asarray(PACKED)), implementation="cudnn_segments")
    jax.effects_barrier()
    assert calls == ["ScaleBiasSoftmax"]


@pytest.mark.parametrize("kind", ["packed", "one segment", "padding alone"])
def test_lengths_and_offsets_of_the_sequences(kind):
    q = jnp.zeros((2, 150, 4, 8))
    fits, (lengths, key_lengths, starts, key_starts) = cudnn_segments.sequences(q, q, jnp.asarray(ROWS[kind]))
    found = [(length, 150 * row + at) for row, runs in enumerate(sequences(ROWS[kind])) for _, at, length in runs]
    count = cudnn_segments.SEGMENTS
    assert fits and lengths.shape == (2, count) and starts.shape == (2, count + 1)
    pad = lambda values, size, rest: values + [rest] * (size - len(values))
    np.testing.assert_array_equal(lengths.reshape(-1), pad([length for length, _ in found], 2 * count, 0))
    np.testing.assert_array_equal(starts.reshape(-1) // 32, pad([at for _, at in found], 2 * count + 2, 300))
    np.testing.assert_array_equal(lengths, key_lengths)
    np.testing.assert_array_equal(starts, key_starts)


def test_what_is_not_packed_is_refused(calls):
    arrays = draw(dtype="bfloat16")[:3]
    for mask in (None, AttentionMask(jnp.ones((2, 1, 150, 150), bool))):
        with pytest.raises(ValueError, match="takes rows that attend to themselves causally by segments"):
            attention(*arrays, mask, implementation="cudnn_segments")
    with pytest.raises(ValueError, match="takes bfloat16 or float16, not float32"):
        attention(*draw()[:3], causal(jnp.asarray(PACKED)), implementation="cudnn_segments")


@pytest.mark.parametrize("key_heads", [4, 2])
def test_operations_are_counted_once(monkeypatch, key_heads):
    monkeypatch.setattr(devices, "device", lambda: ("gpu", "NVIDIA H100 80GB HBM3"))
    arrays = draw(length=256, key_heads=key_heads, dtype="bfloat16")
    mask = causal(jnp.ones((2, 256), jnp.int32))
    run = lambda *qkv: attention(*qkv, mask, implementation="cudnn_segments").astype("float32").sum()
    counted = flops.traced(jax.make_jaxpr(jax.grad(run, (0, 1, 2)))(*arrays[:3]))
    product = 2 * 2 * 4 * 256 * 256 * 128
    assert flops.total(counted) == 7 * product and flops.total(counted, ("recompute",)) == product

"""Dense attention: splash attention on a CPU against float64 and XLA's form, its masks, and the choice."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deltallava_jax.config import DecoderConfig
from deltallava_jax.kernels import devices
from deltallava_jax.kernels.attention import AttentionMask, attention, blocks, causal, cudnn, dispatch, splash
from deltallava_jax.models import decoder
from deltallava_jax.sequence import text_layout

SEGMENTS = np.array([[1] * 70 + [2] * 60 + [0] * 20, [1] * 40 + [2] * 9 + [3] * 101])  # 150 tokens: 256 with padding


def draw(rows=2, length=150, heads=4, key_heads=2, width=128, dtype="float32"):
    """q, k, v and the output's gradient."""
    rng = np.random.default_rng(0)
    counts = heads, key_heads, key_heads, heads
    return [jnp.asarray(rng.standard_normal((rows, length, n, width)), dtype) for n in counts]


def both(function):
    """(output, dq, dk, dv) of ``function(q, k, v)``."""

    def run(q, k, v, do):
        out, pull = jax.vjp(function, q, k, v)
        return out, *pull(do)

    return jax.jit(run)


def in_float64(q, k, v, do, allowed):
    """(output, dq, dk, dv), a head and a row at a time; allowed [B, Q, K]."""
    q, k, v, do = (np.asarray(x).astype(np.float64) for x in (q, k, v, do))
    out, dq, dk, dv = (np.zeros_like(x) for x in (q, q, k, v))
    scale, share = q.shape[-1] ** -0.5, q.shape[2] // k.shape[2]
    for b, h in np.ndindex(q.shape[0], q.shape[2]):
        at, key = (b, slice(None), h), (b, slice(None), h // share)
        scores = np.where(allowed[b], q[at] @ k[key].T * scale, -np.inf)
        weights = np.exp(scores - scores.max(1, keepdims=True))
        weights /= weights.sum(1, keepdims=True)
        d_weights = do[at] @ v[key].T
        d_scores = weights * (d_weights - (weights * d_weights).sum(1, keepdims=True)) * scale
        out[at], dq[at] = weights @ v[key], d_scores @ k[key]
        dk[key] += d_scores.T @ q[at]
        dv[key] += weights.T @ do[at]
    return out, dq, dk, dv


interpreted = functools.partial(splash.attend, interpret=True)
in_xla = functools.partial(attention, implementation="xla")


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 2e-2)])
@pytest.mark.parametrize(
    "form, packed",
    [("splash", True), ("splash", False), ("xla", True), ("xla", False), ("blocks", True), ("short blocks", True)],
)
def test_equals_float64(form, dtype, tolerance, packed, monkeypatch):
    arrays = draw(dtype=dtype)
    mask = causal(jnp.asarray(SEGMENTS)) if packed else None
    monkeypatch.setattr(blocks, "BLOCK", 64 if form == "short blocks" else 16)  # three, or ten, of which some skip keys
    attend = {"splash": interpreted, "xla": in_xla}.get(form, blocks.attend)
    found = both(lambda q, k, v: attend(q, k, v, mask))(*arrays)
    allowed = np.ones((2, 150, 150), bool)
    if packed:
        allowed = np.tril(SEGMENTS[:, :, None] == SEGMENTS[:, None, :])
    for name, a, b in zip(("out", "dq", "dk", "dv"), found, in_float64(*arrays, allowed), strict=True):
        scale = max(1.0, np.abs(b).max() / 4)  # bfloat16 sums of many values round by their size
        np.testing.assert_allclose(np.asarray(a, float), b, atol=tolerance * scale, rtol=tolerance, err_msg=name)


@pytest.mark.parametrize("form", ["splash", "xla", "blocks", "short blocks"])
def test_segments_do_not_attend_to_each_other(form, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", 128 if form == "short blocks" else 32)
    q, k, v, do = draw(rows=1, length=256)
    segments = np.array([[1] * 100 + [2] * 90 + [0] * 66])
    attend = {"splash": interpreted, "xla": in_xla}.get(form, blocks.attend)
    run = both(lambda q, k, v: attend(q, k, v, causal(jnp.asarray(segments))))
    other = (segments == 2)[..., None, None]
    before, after = run(q, k, v, do), run(*(jnp.where(other, -3 * x, x) for x in (q, k, v, do)))
    for a, b in zip(before, after, strict=True):
        np.testing.assert_array_equal(a[segments != 2], b[segments != 2])
        assert np.abs(a - b)[segments == 2].max() > 0.1


def test_blocks_take_no_more_keys_than_they_need():
    segments = jnp.asarray(np.repeat([1, 2, 3, 4, 0], [40, 8, 12, 80, 20]))  # ten blocks of 16 tokens
    widths = np.array(blocks._widths(10))
    assert widths.tolist() == [1, 2, 3, 4, 6, 8, 10]
    needed = [1, 2, 3, 1, 2, 3, 4, 6, 6, 2]  # block 7 needs five and takes six; the padding begins in block 8
    assert widths[blocks._choices(segments, 10)].tolist() == needed


def test_masks_of_blocks_are_not_made_before_the_layers():
    """JAX moves what does not depend on a layer out of their loop: there, the masks of all blocks and widths."""
    length = 8 * blocks.BLOCK
    mask = causal(jnp.ones((2, length), jnp.int32))

    def loss(kernels, x):
        layer = lambda x, kernel: (blocks.attend(*(x @ kernel for kernel in kernel), mask), None)
        return jax.lax.scan(jax.checkpoint(layer), x, kernels)[0].sum()

    shapes = [jax.ShapeDtypeStruct(shape, "float32") for shape in ((2, 3, 8, 8), (2, length, 1, 8))]
    kept = jax.make_jaxpr(jax.grad(loss))(*shapes)
    largest = max(var.aval.size for eqn in kept.eqns for var in eqn.outvars)
    assert largest <= 2 * 2 * length * 8  # two layers' input


@pytest.mark.parametrize("block", [32, 64])
def test_blocks_of_rows_with_padding_within(block, monkeypatch):
    """As where visual tokens do not exist; the blocks with padding attend to each other's. 200 tokens are seven blocks
    of 29, or four of 50."""
    monkeypatch.setattr(blocks, "BLOCK", block)
    rng = np.random.default_rng(0)
    arrays = draw(length=200, width=16)
    segments = np.sort(rng.integers(1, 7, (2, 200)))
    mask = causal(jnp.asarray(np.where(rng.random((2, 200)) < 0.1, 0, segments)))
    found, expected = (both(lambda q, k, v, f=f: f(q, k, v, mask))(*arrays) for f in (blocks.attend, in_xla))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def on(monkeypatch, platform="tpu"):
    """Gives the dispatch a device, and runs splash attention on a CPU."""
    monkeypatch.setattr(devices, "device", lambda: (platform, "NVIDIA H100"))
    monkeypatch.setattr(splash, "attend", interpreted)
    devices.log_once.cache_clear()


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 8, 1)])
def test_a_mesh_divides_the_kernel(sizes, monkeypatch):
    arrays, segments = draw(rows=8, length=128, heads=4, key_heads=2), jnp.asarray(np.tile(SEGMENTS[:, :128], (4, 1)))
    whole = both(lambda q, k, v: interpreted(q, k, v, causal(segments)))(*arrays)
    on(monkeypatch)
    mesh = jax.make_mesh(sizes, ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    with jax.set_mesh(mesh):
        run = both(lambda q, k, v: attention(q, k, v, causal(segments), implementation="splash"))
        program = run.lower(*arrays).as_text()
        divided = run(*arrays)
    rows, heads = 8 // (sizes[0] * sizes[1]), 4 // sizes[2]
    assert f"tensor<{rows}x{heads}x128x128xf32>" in program  # of one device, as the kernel takes them
    for a, b in zip(whole, divided, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_a_decoder_through_splash_attention(monkeypatch):
    cfg = DecoderConfig(vocab_size=50, width=256, layers=2, heads=2, kv_heads=1, mlp_width=64)
    params = decoder.init_params(cfg, jax.random.key(0))
    hidden = jax.random.normal(jax.random.key(1), (2, 150, 256))
    places = np.tril(SEGMENTS[:, :, None] == SEGMENTS[:, None, :]).sum(-1) - 1
    rows = text_layout(jnp.asarray(places), jnp.asarray(SEGMENTS))
    live = (SEGMENTS > 0)[..., None]

    def loss(params, hidden):
        return jnp.square(jnp.where(live, decoder.forward(params, cfg, hidden, rows, remat="full")[0], 0)).mean()

    step = lambda: jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(params, hidden)
    expected = step()
    on(monkeypatch)
    monkeypatch.setattr(dispatch, "MIN_LENGTH", 100)
    loss_, gradients = jax.tree.map(np.asarray, step())
    np.testing.assert_allclose(loss_, expected[0], rtol=1e-5)
    for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected[1]), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())


@pytest.mark.parametrize(
    "kind, length, whole",
    [("segments", 192, 256), ("segments", 149, 256), ("any", 192, 256), ("all", 149, 150), ("all", 150, 150)],
)
def test_what_cudnn_is_given(monkeypatch, kind, length, whole):
    """With a mask lengths of whole multiples of 128, else even ones, no query without a key, the causal order by its
    type, and the same output and gradients."""
    given = []

    def record(q, k, v, mask=None, is_causal=False, implementation=None, **lengths):
        given.append((q.shape[1], k.shape[1], mask, is_causal, implementation))
        return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=is_causal, **lengths, implementation="xla")

    q, k, v, do = draw(length=length)
    segments = jnp.asarray(np.pad(SEGMENTS, ((0, 0), (0, 50)))[:, :length])
    mask = {"all": None, "segments": causal(segments), "any": AttentionMask(causal(segments).allowed)}[kind]
    expected = both(lambda *qkv: attention(*qkv, mask))(q, k, v, do)
    monkeypatch.setattr(cudnn, "dot_product_attention", record)
    out, pull = jax.vjp(lambda *qkv: cudnn.attend(*qkv, mask), q, k, v)
    for a, b in zip((out, *pull(do)), expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    queries, keys, allowed, is_causal, implementation = given[0]
    assert (queries, keys, implementation) == (whole, whole, "cudnn") and is_causal == (kind == "segments")
    if kind != "all":
        order = np.tril(np.ones((whole, whole), bool)) if is_causal else True
        assert (np.asarray(allowed) & order).any(-1).all()


@pytest.mark.parametrize(
    "platform, name, change, message",
    [
        ("cpu", "splash", {}, "runs on tpu, not on cpu"),
        ("tpu", "cudnn", {}, "runs on gpu, not on tpu"),
        ("tpu", "splash", {"width": 20}, "heads of a multiple of 8, not 20"),
        ("tpu", "splash", {"dtype": "float16"}, "float32 or bfloat16, not float16"),
        ("tpu", "splash", {"mask": AttentionMask(jnp.ones((2, 1, 150, 150), bool))}, "rows that attend to themselves"),
        ("tpu", "splash", {"dtype": "bfloat16"}, "where jax_default_matmul_precision is highest"),  # as in these tests
        ("gpu", "cudnn", {}, "bfloat16 or float16, not float32"),
        ("gpu", "cudnn", {"dtype": "bfloat16", "width": 256}, "a multiple of 8 up to 128, not 256"),
    ],
)
def test_what_cannot_run_is_refused(monkeypatch, platform, name, change, message):
    on(monkeypatch, platform)
    mask = change.pop("mask", None)
    q, k, v, _ = draw(**change)
    with pytest.raises(ValueError, match=f'implementation="{name}": .*{message}') as error:
        attention(q, k, v, mask, implementation=name)
    assert "\n" not in str(error.value)


def test_rows_and_heads_that_do_not_divide_are_refused(monkeypatch):
    on(monkeypatch)
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    with jax.set_mesh(mesh):
        for shape, message in (
            ({"rows": 3}, "a batch of 3 does not divide over 4 devices"),
            ({"rows": 4, "key_heads": 1}, "1 heads do not divide over 2 devices"),
        ):
            with pytest.raises(ValueError, match=message):
                attention(*draw(**shape)[:3], implementation="splash")


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="expected xla, blocks, splash, cudnn, cudnn_segments or None"):
        attention(*draw()[:3], implementation="triton")

"""Losses and gradients of the decoder and of the tower are XLA's with every implementation of attention: splash
attention in its interpreter, cuDNN's as XLA computes what it is given."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deltallava_jax.config import DecoderConfig, ModelConfig, VisionConfig
from deltallava_jax.kernels import devices, registry
from deltallava_jax.kernels.attention import cudnn, splash
from deltallava_jax.models import decoder, vision
from deltallava_jax.sequence import text_layout
from tests.kernels.test_cudnn_segments import calls  # noqa: F401 (a fixture)

LENGTH = 149
ROWS = {
    "packed": [[1] * 70 + [2] * 60 + [0] * 19, [1] * 40 + [2] * 9 + [3] * 100],
    "unpacked": [[1] * 149, [1] * 90 + [0] * 59],
    "tokens that do not exist": [[1] * 30 + [0] * 5 + [1] * 35 + [2] * 79, [1] * 50 + [2] * 99],
}


@pytest.fixture
def on(monkeypatch, calls):  # noqa: F811
    """on(implementation): the device that has it."""

    def dense(q, k, v, mask=None, implementation=None, **options):
        return jax.nn.dot_product_attention(q, k, v, mask=mask, **options, implementation="xla")

    monkeypatch.setattr(cudnn, "dot_product_attention", dense)
    monkeypatch.setattr(splash, "attend", functools.partial(splash.attend, interpret=True))
    monkeypatch.setattr(splash, "refusal", lambda *arguments: None)  # the tests' precision of products

    def on(implementation):
        device = ("tpu", "TPU v5") if implementation == "splash" else ("gpu", "NVIDIA H100 80GB HBM3")
        monkeypatch.setattr(devices, "device", lambda: device)

    return on


def assert_close(found, expected):
    """To 2e-2 of each array's largest value; the keys' bias of a tower has no gradient but what rounding leaves."""
    largest = max(np.abs(np.asarray(x, np.float32)).max() for x in jax.tree.leaves(expected[1]))
    for (path, a), b in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        scale = largest if jax.tree_util.keystr(path).endswith("['k']['bias']") else np.abs(b).max()
        assert np.isfinite(a).all() and np.abs(a - b).max() <= 2e-2 * scale, path


@pytest.mark.parametrize("implementation", ["splash", "cudnn", "cudnn_segments"])
@pytest.mark.parametrize("kind", ROWS)
def test_of_the_decoder(on, implementation, kind):
    cfg = DecoderConfig(vocab_size=50, width=128, layers=2, heads=4, kv_heads=4, mlp_width=64)
    params = decoder.init_params(cfg, jax.random.key(0))
    hidden = jax.random.normal(jax.random.key(1), (2, LENGTH, cfg.width), jnp.bfloat16)
    segments = np.asarray(ROWS[kind])
    rows = text_layout(jnp.broadcast_to(jnp.arange(LENGTH), segments.shape), jnp.asarray(segments))
    live = (segments > 0)[..., None]

    def loss(params, hidden):
        out = decoder.forward(params, cfg, hidden, rows, remat="attention")[0]
        return jnp.square(jnp.where(live, out.astype(jnp.float32), 0)).mean()

    assert_same(on, implementation, loss, params, hidden, f"2x{LENGTH}x4x32", "causal segments")


@pytest.mark.parametrize("implementation", ["splash", "cudnn"])
def test_of_the_tower(on, implementation):
    cfg = VisionConfig(image_size=24, patch_size=2, width=64, layers=2, heads=4, mlp_width=64)
    params = vision.init_params(cfg, jax.random.key(0))
    hidden = jax.random.normal(jax.random.key(1), (2, 145, cfg.width), jnp.bfloat16)

    def loss(params, hidden):
        return jnp.square(vision.forward(params, cfg, hidden, (0, 2), "dots").astype(jnp.float32)).mean()

    assert_same(on, implementation, loss, params, hidden, "2x145x4x16", "all keys")


def assert_same(on, implementation, loss, params, hidden, shape, kind):
    with registry.forced(ModelConfig(attention="xla"), ordered=True):
        expected = jax.jit(jax.value_and_grad(loss, (0, 1)))(params, hidden)
    on(implementation)
    registry.use(devices.device()[1], {f"attention {shape} bfloat16, {kind}": implementation})
    try:
        with registry.recording() as found:
            jax.jit(jax.value_and_grad(loss, (0, 1))).trace(params, hidden)
        (call,) = found.calls
        assert str(call) == f"attention {shape} bfloat16, {kind}"
        assert_close(jax.jit(jax.value_and_grad(loss, (0, 1)))(params, hidden), expected)
    finally:
        registry.use("", {})

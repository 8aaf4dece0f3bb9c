"""The count of operations: against formulas of the parts, and against XLA's count of the compiled program."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from deltallava_jax import kernels
from deltallava_jax.analysis import flops
from deltallava_jax.config import DecoderConfig, OptimizerConfig, VisionConfig
from deltallava_jax.kernels.attention import dispatch
from deltallava_jax.models import decoder, vision
from deltallava_jax.parallel.mesh import make_mesh
from deltallava_jax.sequence import text_layout
from deltallava_jax.training.step import TrainStep, batch_shapes
from tests.tiny import get_config
from tests.xla import unrolled

GROUPED = DecoderConfig(vocab_size=96, width=64, layers=3, heads=4, kv_heads=2, mlp_width=160, qkv_bias=True)
ROWS, LENGTH = 2, 24


def one_device_mesh(cfg):
    return make_mesh(cfg, jax.devices()[:1])


def configure(remat="none", layers=2, accumulation=1, frozen=()):
    cfg = get_config()
    model = dataclasses.replace(cfg.model, remat=remat, decoder=dataclasses.replace(cfg.model.decoder, layers=layers))
    optimizer = OptimizerConfig(accumulation=accumulation, frozen=frozen)
    return dataclasses.replace(cfg, model=model, optimizer=optimizer)


def trace(cfg):
    step = TrainStep(cfg, one_device_mesh(cfg), 10)
    return step.trace(batch_shapes(cfg, step.mesh, 60, 2), 4)


def test_decoder_is_its_formula():
    cfg = GROUPED

    def forward(params, hidden):
        places = jnp.broadcast_to(jnp.arange(LENGTH), (ROWS, LENGTH))
        hidden, _ = decoder.forward(params, cfg, hidden, text_layout(places, jnp.ones_like(places)))
        return decoder.logits(params, cfg, hidden)

    params = jax.eval_shape(lambda: decoder.init_params(cfg, jax.random.key(0)))
    counted = flops.traced(jax.make_jaxpr(forward)(params, jax.ShapeDtypeStruct((ROWS, LENGTH, 64), jnp.float32)))
    queries_and_output, keys_and_values, gated_mlp = 2 * 64 * 64, 2 * 64 * 32, 3 * 64 * 160
    matrices = 2 * LENGTH * (queries_and_output + keys_and_values + gated_mlp)
    attention = 2 * 2 * LENGTH * LENGTH * 64  # scores and values, of all four heads
    assert counted["decoder"] == dict(forward=ROWS * 3 * (matrices + attention), backward=0, recompute=0)
    assert counted["logits"]["forward"] == ROWS * 2 * LENGTH * 64 * 96
    # Of LENGTH^2 pairs a causal mask leaves LENGTH (LENGTH + 1) / 2.
    assert 3 * attention - flops.masked(cfg, LENGTH) == 3 * 2 * 2 * (LENGTH * (LENGTH + 1) // 2) * 64


@pytest.mark.parametrize("remat", ["none", "dots", "attention", "full"])
@pytest.mark.parametrize("mesh", [(1, 1, 1), (1, 2, 2)])
def test_splash_attention_counts_as_dense_attention(monkeypatch, remat, mesh):
    """On a mesh too. What its backward kernels compute again is three products of the scores' size; half of all are
    skipped. Its forward kernel runs again only where its outputs are not saved."""
    cfg, length = dataclasses.replace(GROUPED, layers=1), 128

    def loss(params, hidden):
        places = jnp.broadcast_to(jnp.arange(length), (ROWS, length))
        return decoder.forward(params, cfg, hidden, text_layout(places, jnp.ones_like(places)), remat=remat)[0].sum()

    params = jax.eval_shape(lambda: decoder.init_params(cfg, jax.random.key(0)))
    hidden = jax.ShapeDtypeStruct((ROWS, length, 64), jnp.float32)
    axis_types = (jax.sharding.AxisType.Auto,) * 3
    devices = jax.devices()[: mesh[1] * mesh[2]]

    def count():
        with jax.set_mesh(jax.make_mesh(mesh, ("data", "fsdp", "tensor"), axis_types=axis_types, devices=devices)):
            program = jax.make_jaxpr(lambda *x: jax.value_and_grad(loss, (0, 1))(*x))(params, hidden)
        return flops.traced(program)["decoder"], str(program).count("pallas_call"), flops.skipped(program)

    monkeypatch.setattr(dispatch, "MIN_PACKED", length + 1)
    expected, _, skipped = count()
    assert skipped == 0
    monkeypatch.setattr(kernels.devices, "device", lambda: ("tpu", "a kind"))
    monkeypatch.setattr(dispatch, "MIN_LENGTH", length)
    found, calls, skipped = count()
    again = remat == "full"
    assert calls == 3 + again
    product = ROWS * 2 * length * length * 64
    expected["recompute"] += (3 if again or remat == "none" else 1) * product  # XLA's scores and values, run again
    assert skipped == pytest.approx((9 + 2 * again) * product / 2, rel=1e-3)
    assert found == pytest.approx(expected, rel=1e-3)  # a row's sum of output times gradient is a product here


@pytest.mark.parametrize("length, blocks", [(128, 1), (256, 2), (480, 3), (800, 5)])
def test_blocks_count_as_dense_attention(monkeypatch, length, blocks):
    """Of short rows the program has fewer products, of long ones it chooses among them; counted is the same."""

    def count():
        q = k = jnp.zeros((2, length, 2, 8))
        mask = kernels.attention.causal(jnp.ones((2, length), jnp.int32))
        loss = lambda q, k, v: kernels.attention.attention(q, k, v, mask).sum()
        program = jax.make_jaxpr(lambda *x: jax.grad(loss, (0, 1, 2))(*x))(q, k, k)
        return flops.traced(program)["other"], flops.skipped(program)

    found, skipped = count()
    monkeypatch.setattr(dispatch, "MIN_PACKED", length + 1)
    expected, _ = count()
    product = 2 * 2 * 2 * length * length * 8
    expected["recompute"] += product if blocks > 4 else 0  # the scores
    assert found == pytest.approx(expected, rel=1e-2)
    share = 1 / 2 if blocks > 4 else (blocks - 1) / (2 * blocks)
    assert skipped == pytest.approx(share * sum(found.values()), rel=1e-2)


def test_tower_is_its_formula():
    cfg = VisionConfig(image_size=32, patch_size=8, width=48, layers=3, heads=3, mlp_width=80)
    needs = vision.Needs(last=2)
    params = jax.eval_shape(lambda: vision.init_params(cfg, jax.random.key(0)))
    images = jax.ShapeDtypeStruct((5, 32, 32, 3), jnp.uint8)
    counted = flops.traced(jax.make_jaxpr(lambda p, x: vision.encode(p, cfg, x, needs).last)(params, images))
    tokens = 1 + 16
    layer = 2 * tokens * (4 * 48 * 48 + 2 * 48 * 80) + 4 * tokens * tokens * 48
    assert counted == {"tower": dict(forward=5 * (2 * 16 * 192 * 48 + 2 * layer), backward=0, recompute=0)}


def test_a_step_trains_for_twice_its_forward_pass_and_recomputes_by_policy():
    none, full = flops.traced(trace(configure()).jaxpr), flops.traced(trace(configure("full")).jaxpr)
    for part in ("decoder", "logits"):
        assert none[part]["backward"] == 2 * none[part]["forward"]
    assert none["decoder"]["recompute"] == 0 < full["decoder"]["recompute"] < full["decoder"]["forward"]
    frozen = flops.traced(trace(configure(frozen=("^vision/", "^decoder/"))).jaxpr)
    assert frozen["tower"]["backward"] == 0
    assert none["decoder"]["forward"] < frozen["decoder"]["backward"] < 2 * none["decoder"]["forward"]
    microbatches = flops.traced(trace(configure(accumulation=4)).jaxpr)
    assert all(microbatches[part] == none[part] for part in ("tower", "decoder", "logits"))


def test_needed_leaves_out_what_is_masked_or_computed_twice():
    cfg = configure("full")
    counted, length = flops.traced(trace(cfg).jaxpr), 60 + 2 * 3
    masked = cfg.data.rows * cfg.model.decoder.layers * 4 * (length * (length - 1) // 2) * 32
    recomputed = flops.total(counted, ("recompute",))
    assert flops.needed(counted, cfg, [length]) == flops.total(counted) - recomputed - 3 * masked


@pytest.mark.parametrize("remat", ["none", "full"])
def test_xla_counts_the_same_in_a_program_without_loops(remat):
    cfg = configure(remat)
    cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, decoder=dataclasses.replace(
        cfg.model.decoder, width=128, mlp_width=512, kv_heads=1), projector=dataclasses.replace(
        cfg.model.projector, out_width=128)))  # fmt: skip
    with unrolled():
        traced = trace(cfg)
    ours, xla = flops.total(flops.traced(traced.jaxpr)), traced.lower().compile().cost_analysis()["flops"]
    assert ours == pytest.approx(xla, rel=0.15) and ours < xla  # element-wise work is large in small widths


def test_a_loop_of_unknown_length_is_refused():
    def forward(x):
        return jax.lax.while_loop(lambda y: y.sum() < 9, lambda y: y @ y, x)

    with pytest.raises(ValueError, match="unknown number of iterations"):
        flops.traced(jax.make_jaxpr(forward)(jnp.ones((4, 4))))
    convolution = jax.make_jaxpr(
        lambda x, k: jax.lax.conv_general_dilated(x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    )(jnp.ones((2, 8, 8, 3)), jnp.ones((3, 3, 3, 16)))
    assert flops.total(flops.traced(convolution)) == 2 * (2 * 8 * 8 * 16) * (3 * 3 * 3)

"""The train step: sharded = unsharded, accumulated = whole, one compile a signature, frozen stays frozen."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from deltallava_jax.config import MeshConfig, OptimizerConfig, override
from deltallava_jax.data.pipeline import elements
from deltallava_jax.errors import ConfigError
from deltallava_jax.models import llavolta, vlm
from deltallava_jax.models.names import flatten
from deltallava_jax.parallel import mesh as parallel_mesh
from deltallava_jax.parallel import rules
from deltallava_jax.parallel.mesh import AXES, make_mesh, put_rows
from deltallava_jax.training.optimizer import schedule, split
from deltallava_jax.training.step import TrainStep, batch_shapes, gradients, init_state
from tests import tiny


@functools.cache
def config(**changes):
    return override(tiny.get_config(), changes)


@functools.cache
def run_of(cfg):
    return tiny.make_run(cfg)


def losses(cfg, devices, steps):
    """(losses of the first steps, final state) on a mesh over ``devices``."""
    mesh = make_mesh(cfg, devices)
    step, state = TrainStep(cfg, mesh, 100), init_state(cfg, mesh, 100)
    rows, plan, _ = run_of(cfg)
    values = []
    for element in elements(rows, plan, 0, steps, workers=0):
        state, metrics = step(state, put_rows(element.batch, mesh), element.budget)
        values.append(float(metrics["loss"]))
    return values, state


def test_eight_devices_give_the_losses_of_one():
    cfg = config()
    sharded = dataclasses.replace(cfg, mesh=MeshConfig(data=2, fsdp=2, tensor=2))
    one, _ = losses(cfg, jax.devices()[:1], 5)
    eight, state = losses(sharded, jax.devices(), 5)
    np.testing.assert_allclose(eight, one, rtol=1e-5)
    assert one[0] != one[4]

    # Every moment of the optimizer has its parameter's sharding, and the large matrices are really sharded.
    adam = state.optimizer[1][0]
    for moments in (adam.mu, adam.nu):
        for path, leaf in flatten(state.trained).items():
            assert flatten(moments)[path].sharding == leaf.sharding, path
    q = state.trained["decoder"]["layers"]["q"]["kernel"]
    assert q.addressable_shards[0].data.size == q.size // 4


def test_a_sharding_rule_that_matches_nothing_is_refused(monkeypatch):
    monkeypatch.setattr(rules, "RULES", (*rules.RULES, ("decoder/layer/q/kernel$", PartitionSpec(None, "fsdp"))))
    with pytest.raises(ConfigError, match="'decoder/layer/q/kernel.*matches no parameter"):
        TrainStep(config(), make_mesh(config(), jax.devices()[:1]), 100)


def test_a_dimension_that_does_not_divide_is_refused():
    cfg = override(config(), {"mesh.fsdp": "8", "model.decoder.mlp_width": "60"})
    with pytest.raises(ConfigError, match="decoder/layers/down/kernel .*60 is not divisible by mesh tensor=8"):
        TrainStep(cfg, jax.make_mesh((1, 1, 8), AXES, devices=jax.devices()), 100)


def test_the_first_moment_in_bfloat16():
    cfg = config(**{"optimizer.mu_dtype": "bfloat16"})
    one, state = losses(cfg, jax.devices()[:1], 3)
    adam = state.optimizer[1][0]
    assert {leaf.dtype for leaf in jax.tree.leaves(adam.mu)} == {jnp.dtype(jnp.bfloat16)}
    assert {leaf.dtype for leaf in jax.tree.leaves((adam.nu, state.trained))} == {jnp.dtype(jnp.float32)}
    np.testing.assert_allclose(one, losses(config(), jax.devices()[:1], 3)[0], rtol=1e-3)


def test_gradients_are_in_the_dtype_of_the_setting():
    """Traced: of a layer's matrix, float32 products of bfloat16 factors, or bfloat16 ones."""

    def wide_products(dtype):
        cfg = config(**{"model.dtype": "bfloat16", "optimizer.gradient_dtype": dtype})
        params, frozen = jax.eval_shape(lambda: split(vlm.init_params(cfg.model, jax.random.key(1)), OptimizerConfig()))
        batch = batch_shapes(cfg, make_mesh(cfg, jax.devices()[:1]), 32, 1)
        run = lambda p, b: gradients(cfg, p, frozen, b, jax.random.key(0), 4)
        text = str(jax.make_jaxpr(run)(params, batch))
        return text.count(f"f32[{cfg.model.decoder.width},{cfg.model.decoder.mlp_width}] = dot_general")

    assert wide_products("float32") >= 2 and wide_products("bfloat16") == 0  # gate and up, and others of their shape


def test_accumulation_gives_the_gradient_of_the_whole_batch():
    cfg = config(**{"model.projector.drop_path": "0.0"})
    rows, plan, _ = run_of(cfg)
    batch = next(elements(rows, plan, 0, 1, workers=0)).batch
    batch = dataclasses.replace(batch, loss_mask=batch.loss_mask & (np.arange(8)[:, None] > 1))  # uneven parts
    params, frozen = split(vlm.init_params(cfg.model, jax.random.key(1)), OptimizerConfig())

    def of(parts, batch=batch, run=jax.jit):
        split_up = override(cfg, {"optimizer.accumulation": str(parts)})
        return run(lambda p, b: gradients(split_up, p, frozen, b, jax.random.key(0), 4))(params, batch)

    no_images = {name: getattr(batch, name)[:, :0] for name in ("image_positions", "images")}
    assert of(4, dataclasses.replace(batch, **no_images), jax.make_jaxpr).out_avals
    (loss, count, grads), (loss4, count4, grads4) = of(1), of(4)
    assert count == count4 == batch.loss_mask.sum()
    np.testing.assert_allclose(loss4, loss, rtol=1e-5)
    for path, leaf in flatten(grads).items():
        np.testing.assert_allclose(flatten(grads4)[path], leaf, rtol=1e-4, atol=1e-6, err_msg=path)


def test_elastic_training_compiles_once_for_each_signature():
    cfg = config(**{"model.projector.scale_factor": "(2,4,8)"})
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, seconds, **_: compiled.append(name) if name.endswith("backend_compile_duration") else None
    )
    mesh = make_mesh(cfg, jax.devices()[:1])
    step, state = TrainStep(cfg, mesh, 100), init_state(cfg, mesh, 100)
    rows, plan, _ = run_of(cfg)
    batches = [(put_rows(e.batch, mesh), e.budget) for e in elements(rows, plan, 0, 12, workers=0)]
    compiled.clear()
    for batch, budget in batches:
        state, metrics = step(state, batch, budget)
    assert {budget for _, budget in batches} == {16, 4, 1}
    assert len(compiled) == len(step.compiled) == 3
    assert jnp.isfinite(metrics["loss"])


def test_llavoltas_last_phase_is_the_plain_step_and_the_others_are_not():
    cfg = config(**{"training.llavolta": "((4, 1), (2, 0), (1, 0))"})
    mesh = make_mesh(cfg, jax.devices()[:1])
    rows, plan, _ = run_of(config())
    batch = put_rows(next(elements(rows, plan, 0, 1, workers=0)).batch, mesh)

    def one(cfg, number):
        pooling = llavolta.phase_at(cfg.training.llavolta, number, 9)
        state, metrics = TrainStep(cfg, mesh, 9)(init_state(cfg, mesh, 9), batch, 4, pooling)
        return float(metrics["loss"]), flatten(state.trained)

    plain, first, last = one(config(), 8), one(cfg, 0), one(cfg, 8)
    assert last[0] == plain[0] != first[0]
    for path, leaf in plain[1].items():
        np.testing.assert_array_equal(last[1][path], leaf, err_msg=path)
    assert all(np.isfinite(leaf).all() for leaf in first[1].values())


def test_rows_of_text_alone_are_one_program_for_all_budgets():
    cfg = config(**{"model.projector.scale_factor": "(2,4,8)"})
    mesh = make_mesh(cfg, jax.devices()[:1])
    step = TrainStep(cfg, mesh, 100)
    text = batch_shapes(cfg, mesh, 96, 0)
    assert step.compile(text, 16) is step.compile(text, 1) and len(step.compiled) == 1


def test_frozen_parameters_stay_and_have_no_optimizer_state():
    cfg = config(**{"optimizer.frozen": "('vision/', 'decoder/embed')"})
    before = init_state(cfg, make_mesh(cfg, jax.devices()[:1]), 100)
    _, after = losses(cfg, jax.devices()[:1], 2)
    assert {path.split("/")[0] for path in flatten(before.trained)} == {"projector", "decoder"}
    for path, leaf in flatten(before.frozen).items():
        assert leaf.dtype == jnp.bfloat16
        np.testing.assert_array_equal(flatten(after.frozen)[path], leaf)
    assert jax.tree.structure(after.optimizer[1][0].mu) == jax.tree.structure(after.trained)
    assert not np.array_equal(after.trained["projector"]["up"]["kernel"], before.trained["projector"]["up"]["kernel"])


def test_a_frozen_pattern_that_matches_nothing_is_refused():
    params = vlm.init_params(config().model, jax.random.key(0))
    with pytest.raises(ConfigError, match="'visoin/' matches no parameter"):
        split(params, OptimizerConfig(frozen=("visoin/",)))
    with pytest.raises(ConfigError, match="leaves no parameter to train"):
        split(params, OptimizerConfig(frozen=(".",)))


def test_a_loss_that_is_not_finite_leaves_the_parameters():
    cfg = config()
    mesh = make_mesh(cfg, jax.devices()[:1])
    step, state = TrainStep(cfg, mesh, 100), init_state(cfg, mesh, 100)
    rows, plan, _ = run_of(cfg)
    batch = put_rows(next(elements(rows, plan, 0, 1, workers=0)).batch, mesh)
    scale = state.trained["decoder"]["head"]["norm"]["scale"]
    state.trained["decoder"]["head"]["norm"]["scale"] = scale.at[0].set(jnp.nan)
    kept = np.array(state.trained["projector"]["up"]["kernel"])
    state, metrics = step(state, batch, 4)
    assert not metrics["finite"]
    np.testing.assert_array_equal(state.trained["projector"]["up"]["kernel"], kept)


def test_the_schedule_warms_up_and_decays():
    rate = schedule(override(tiny.get_config(), {"optimizer.warmup_ratio": "0.1"}).optimizer, 100)
    values = [float(rate(step)) for step in range(101)]
    assert values[0] == 0 and max(values) == values[10] == pytest.approx(1e-3)
    assert values[10:] == sorted(values[10:], reverse=True) and values[100] == pytest.approx(0, abs=1e-9)


def test_every_budget_is_the_mean_over_the_budgets():
    cfg = config(**{"model.projector.scale_factor": "(4,8)", "model.projector.drop_path": "0.0"})
    rows, _, _ = run_of(cfg)
    batch = next(elements(rows, rows.plan((4,), 0), 0, 1, workers=0)).batch
    params, _ = split(vlm.init_params(cfg.model, jax.random.key(1)), OptimizerConfig())
    both = override(cfg, {"training.every_budget": "True"})

    def loss(cfg, budget):
        return jax.jit(lambda params: gradients(cfg, params, {}, batch, jax.random.key(0), budget)[0])(params)

    expected = (loss(cfg, 4) + loss(cfg, 1)) / 2
    assert float(loss(both, 4)) == pytest.approx(float(expected), rel=1e-5)


def test_an_option_that_the_compiler_does_not_have_is_left_out(monkeypatch, capsys):
    mesh = make_mesh(config(), jax.devices()[:1])
    monkeypatch.setattr(parallel_mesh, "compiler_options", lambda mesh: {"xla_gpu_of_old": "True"})
    program = parallel_mesh.compiled(jax.jit(lambda x: 2 * x).lower(1.0), mesh)
    assert program(3.0) == 6 and "without xla_gpu_of_old: " in capsys.readouterr().err

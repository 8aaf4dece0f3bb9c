"""Muon: its update against a plain numpy one, what takes it, and that it shards and resumes as AdamW does."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import easy_vqa
from deltallava_jax.config import MeshConfig, OptimizerConfig, from_dict, override, to_dict
from deltallava_jax.config.run import Config
from deltallava_jax.data.pipeline import elements
from deltallava_jax.errors import CheckpointError, ConfigError
from deltallava_jax.models import vlm
from deltallava_jax.models.names import flatten, unflatten
from deltallava_jax.parallel.mesh import make_mesh, put_rows
from deltallava_jax.training.checkpoints import Checkpoints
from deltallava_jax.training.optimizer import kinds, make_optimizer, schedule
from deltallava_jax.training.step import TrainStep, init_state, state_shapes
from tests import tiny


def orthogonalised(matrix, iterations):
    """Newton and Schulz's quintic iteration with Jordan's coefficients."""
    x = matrix / np.linalg.norm(matrix)
    for _ in range(iterations):
        gram = x @ x.T
        x = 3.4445 * x - 4.7750 * gram @ x + 2.0315 * gram @ gram @ x
    return x


def test_a_stacked_kernel_takes_muons_update():
    cfg = OptimizerConfig(
        name="muon", lr=1e-2, warmup_ratio=0.0, weight_decay=0.1, clip_norm=0.0, muon_iterations=4, muon_rate=2.0
    )
    rng = np.random.default_rng(0)
    kernel = rng.standard_normal((3, 8, 5))
    params = unflatten({"decoder/layers/up/kernel": jnp.float32(kernel), "decoder/layers/norm/scale": jnp.ones((3, 8))})
    optimizer = make_optimizer(cfg, 10)
    state, rate, momentum = optimizer.init(params), schedule(cfg, 10), np.zeros_like(kernel)
    for step in range(3):
        grads = rng.standard_normal(kernel.shape)
        given = unflatten(
            {"decoder/layers/up/kernel": jnp.float32(grads), "decoder/layers/norm/scale": jnp.ones((3, 8))}
        )
        updates, state = jax.jit(optimizer.update)(given, state, params)
        params = optax.apply_updates(params, updates)
        # Nesterov's momentum, each part without the zeros that it began with.
        momentum = 0.95 * momentum + 0.05 * grads
        ahead = 0.95 * momentum / (1 - 0.95 ** (step + 2)) + 0.05 * grads / (1 - 0.95 ** (step + 1))
        moved = np.stack([orthogonalised(matrix, 4) for matrix in ahead]) * 0.2 * 8**0.5
        kernel = kernel - 2 * float(rate(step)) * (moved + 0.1 * kernel)
        np.testing.assert_allclose(params["decoder"]["layers"]["up"]["kernel"], kernel, rtol=2e-5, atol=2e-6)
    # AdamW moves all of what is no matrix by the rate while the gradient is the same, and does not decay it.
    moved = 1 - sum(float(rate(step)) for step in range(3))
    np.testing.assert_allclose(params["decoder"]["layers"]["norm"]["scale"], moved, rtol=1e-5)


def test_the_matrices_of_layers_and_projector_take_muon():
    shapes = jax.eval_shape(lambda: vlm.init_params(tiny.get_config().model, jax.random.key(0)))
    of = flatten(kinds(shapes))
    assert {path for path, kind in of.items() if kind == "muon"} == {
        path
        for path, leaf in flatten(shapes).items()
        if path.endswith(("kernel", "base")) and leaf.ndim < 4 and "embed" not in path and "decoder/head" not in path
    }
    adamw = {path for path, kind in of.items() if kind == "adamw"}
    assert {"decoder/embed/embedding", "decoder/head/out/kernel", "vision/embeddings/patch/kernel"} < adamw
    assert {"decoder/layers/attention_norm/scale", "vision/layers/up/bias"} < adamw


@functools.cache
def muon_run():
    """A config with frozen parts and microbatches, and its first batches."""
    cfg = override(
        tiny.get_config(),
        {"optimizer.name": "muon", "optimizer.frozen": "('vision/',)", "optimizer.accumulation": "2",
         "model.projector.drop_path": "0.0"},
    )  # fmt: skip
    rows, plan, _ = tiny.make_run(cfg)
    return cfg, list(elements(rows, plan, 0, 4, workers=0))


def continued(step, state, start):
    """(losses from a step on, final state)."""
    values = []
    for element in muon_run()[1][start:]:
        state, metrics = step(state, put_rows(element.batch, step.mesh), element.budget)
        values.append(float(metrics["loss"]))
    return values, state


def test_muon_resumes_to_the_bit_and_shards_over_eight_devices(tmp_path):
    cfg, batches = muon_run()
    mesh = make_mesh(cfg, jax.devices()[:1])
    step, state = TrainStep(cfg, mesh, 4), init_state(cfg, mesh, 4)
    for element in batches[:2]:
        state, _ = step(state, put_rows(element.batch, mesh), element.budget)
    saved = Checkpoints(tmp_path, create=True)
    saved.save(2, state, {"faults": 0, "records": 0})
    saved.wait()
    whole, end = continued(step, state, 2)
    assert whole[0] != whole[1] and np.isfinite(whole).all()

    again, resumed = continued(step, saved.restore(2, step.shapes)[0], 2)
    assert again == whole
    for one, other in zip(jax.tree.leaves(end), jax.tree.leaves(resumed), strict=True):
        np.testing.assert_array_equal(one, other)

    sharded = dataclasses.replace(cfg, mesh=MeshConfig(data=2, fsdp=2, tensor=2))
    eight = TrainStep(sharded, make_mesh(sharded, jax.devices()), 4)
    values, end = continued(eight, saved.restore(2, eight.shapes)[0], 2)
    np.testing.assert_allclose(values, whole, rtol=1e-5)
    moments = end.optimizer[1].inner_states["muon"].inner_state[0].mu["decoder"]["layers"]
    for name in ("q", "down"):
        assert moments[name]["kernel"].sharding == end.trained["decoder"]["layers"][name]["kernel"].sharding
        assert moments[name]["kernel"].addressable_shards[0].data.size == moments[name]["kernel"].size // 4

    other = override(cfg, {"optimizer.name": "adamw"})
    with pytest.raises(
        CheckpointError, match="state of another optimizer; resume with the optimizer.name of .*config.json"
    ):
        saved.restore(2, state_shapes(other, mesh, 4))


def test_the_first_moment_of_both_halves_has_its_dtype():
    params = unflatten({"decoder/layers/q/kernel": jnp.ones((2, 4, 4)), "decoder/embed/embedding": jnp.ones((8, 4))})
    state = make_optimizer(OptimizerConfig(name="muon", mu_dtype="bfloat16"), 10).init(params)
    halves = state[1].inner_states
    assert halves["muon"].inner_state[0].mu["decoder"]["layers"]["q"]["kernel"].dtype == jnp.bfloat16
    assert halves["adamw"].inner_state[0].mu["decoder"]["embed"]["embedding"].dtype == jnp.bfloat16


def test_configs_from_before_there_was_a_choice_are_adamw():
    values = to_dict(tiny.get_config())
    for key in ("name", "muon_rate", "muon_momentum", "muon_iterations"):
        del values["optimizer"][key]
    assert from_dict(Config, values).optimizer.name == "adamw"


@pytest.mark.parametrize("system", easy_vqa.SYSTEMS)
def test_every_system_trains_with_muon(system):
    """Of every system something takes it, and an update has the parameters' shapes."""
    cfg = easy_vqa.get_config(system)
    assert cfg.optimizer.name == "muon"
    params = jax.eval_shape(lambda: vlm.init_params(cfg.model, jax.random.key(0)))
    optimizer = make_optimizer(cfg.optimizer, 10)
    updates, _ = jax.eval_shape(lambda p: optimizer.update(p, optimizer.init(p), p), params)
    assert jax.tree.map(lambda x: x.shape, updates) == jax.tree.map(lambda x: x.shape, params)
    taken = {path: leaf.shape for path, leaf in flatten(params).items() if flatten(kinds(params))[path] == "muon"}
    assert any(path.startswith("projector/") for path in taken), system


def test_rates_of_parts_are_those_of_groups_of_their_own():
    """Each parameter moves as under AdamW at its own rate, weight decay included; the first pattern decides."""
    cfg = OptimizerConfig(lr=1e-3, weight_decay=0.1, clip_norm=0.0, rates={"^a/": 5e-4, "kernel$": "3x"})
    params = unflatten({path: jnp.ones((3, 3)) for path in ("a/kernel", "b/kernel", "b/bias")})
    grads = unflatten({path: 0.1 * (1 + jnp.arange(9.0).reshape(3, 3)) for path in flatten(params)})

    def after(cfg):
        optimizer = make_optimizer(cfg, 10)
        state, moved = optimizer.init(params), params
        for _ in range(2):
            updates, state = optimizer.update(grads, state, moved)
            moved = optax.apply_updates(moved, updates)
        return flatten(moved)

    mixed = after(cfg)
    for path, rate in {"a/kernel": 5e-4, "b/kernel": 3e-3, "b/bias": 1e-3}.items():
        alone = after(dataclasses.replace(cfg, rates=(), lr=rate))
        np.testing.assert_allclose(mixed[path], alone[path], rtol=1e-6)
    # The state has no place for rates, so that they may change when a run resumes.
    states = [make_optimizer(one, 10).init(params) for one in (cfg, dataclasses.replace(cfg, rates=()))]
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])


@pytest.mark.parametrize("value", ["fast", "0.1", ".x", 0, -1e-3, "0x", "1..2x", float("nan")])
def test_a_rate_that_is_none_is_refused(value):
    with pytest.raises(ConfigError, match="optimizer.rates has"):
        OptimizerConfig(rates={"^projector/": value})


def test_a_rate_for_what_does_not_train_is_refused_and_rates_come_from_the_command_line():
    cfg = override(tiny.get_config(), {"optimizer.rates": "{'^vision/': 2e-6}", "optimizer.frozen": "^vision/"})
    assert cfg.optimizer.rates == (("^vision/", 2e-6),) and from_dict(Config, to_dict(cfg)) == cfg
    with pytest.raises(ConfigError, match="pattern '.vision/' matches no trained parameter"):
        state_shapes(cfg, make_mesh(cfg, jax.devices()[:1]), 8)

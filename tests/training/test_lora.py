"""Training with adapters: begins at the base, is the same on every mesh, saves and resumes its own part alone."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deltallava_jax import load
from deltallava_jax.config import LoraConfig, MeshConfig, ModelConfig, OptimizerConfig
from deltallava_jax.data.pipeline import elements
from deltallava_jax.errors import CheckpointError, ConfigError
from deltallava_jax.models import lora, vlm
from deltallava_jax.models.names import flatten
from deltallava_jax.parallel.mesh import make_mesh, put_rows
from deltallava_jax.products import matmul
from deltallava_jax.training.checkpoints import Checkpoints, fingerprint
from deltallava_jax.training.loop import train
from deltallava_jax.training.step import TrainStep, init_frozen, init_state, whole_params
from deltallava_jax.workdir import Workdir
from tests import tiny

FROZEN = ("^vision/", "^decoder/")
SETTINGS = LoraConfig(rank=4, alpha=8, dropout=0.0)


@functools.cache
def config(**changes):
    cfg = tiny.get_config()
    cfg = dataclasses.replace(cfg, optimizer=dataclasses.replace(cfg.optimizer, frozen=FROZEN), lora=SETTINGS)
    return dataclasses.replace(cfg, **changes)


@functools.cache
def run():
    return tiny.make_run(tiny.get_config())


@functools.cache
def batches():
    rows, plan, _ = run()
    return list(elements(rows, plan, 0, 4, workers=0))


def losses(cfg, devices, steps=4):
    """(losses, the step, the state after them)"""
    mesh = make_mesh(cfg, jax.devices()[:devices])
    step, state = TrainStep(cfg, mesh, 8), init_state(cfg, mesh, 8)
    values = []
    for element in batches()[:steps]:
        state, metrics = step(state, put_rows(element.batch, mesh), element.budget)
        values.append(np.float32(metrics["loss"]))
    return np.array(values), step, state


@functools.cache
def alone():
    return losses(config(), 1)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_first_loss_is_that_of_the_base(dropout):
    """B is zero, so neither adapters nor their dropout matter. A product is the same to the bit; a compiled step with
    the tests' few optimisations may round its sums in another order."""
    cfg = config(lora=dataclasses.replace(SETTINGS, dropout=dropout))
    params = lora.added(tiny.random_params(cfg.model), cfg.lora, jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (50, 32))
    layers = lora.assembled(params, cfg.lora, jax.random.key(2))["decoder"]["layers"]
    one = jax.tree.map(lambda leaf: leaf[1], layers)
    np.testing.assert_array_equal(
        one["gate"]["kernel"].product(x), matmul(x, params["decoder"]["layers"]["gate"]["kernel"][1])
    )
    np.testing.assert_allclose(losses(cfg, 1, 1)[0], losses(config(lora=None), 1, 1)[0], rtol=2e-7)


def test_eight_devices_give_the_losses_of_one_and_the_adapters_are_divided():
    values, step, state = losses(config(mesh=MeshConfig(data=2, fsdp=2, tensor=2)), 8)
    np.testing.assert_allclose(values, alone()[0], rtol=1e-5)
    assert values[3] != values[0]
    q, down = (state.trained["decoder"]["layers"][name] for name in ("q", "down"))
    assert q["lora_a"].sharding.shard_shape(q["lora_a"].shape) == (2, 16, 4)  # inputs over fsdp
    assert q["lora_b"].sharding.shard_shape(q["lora_b"].shape) == (2, 4, 8)  # outputs over tensor and fsdp
    assert down["lora_a"].sharding.shard_shape(down["lora_a"].shape) == (2, 16, 4)
    # Beside the matrices on eight devices, and merged on one, the model answers the same.
    batch = put_rows(batches()[0].batch, step.mesh)
    with jax.set_mesh(step.mesh):
        ahead = jax.jit(lambda p, b: vlm.logits(lora.assembled(p, SETTINGS), step.cfg.model, b, budget=4))
        sharded = np.asarray(ahead(state.params, batch))
    merged = jax.device_put(whole_params(step.cfg, state), jax.devices()[0])
    plain = np.asarray(vlm.logits(merged, step.cfg.model, batches()[0].batch, budget=4))
    live = np.abs(plain).max(-1) > 0
    np.testing.assert_allclose(sharded[live], plain[live], atol=1e-3)


@pytest.mark.parametrize("base", ["nf4", "int8"])
def test_a_quantised_base_trains_and_is_that_which_is_evaluated(base):
    cfg = config(lora=dataclasses.replace(SETTINGS, base=base))
    values, step, state = losses(cfg, 1)
    assert 0 < abs(values[0] - alone()[0][0]) < 0.1 and values[3] != values[0]
    kernel = flatten(state.frozen)[f"decoder/layers/gate/kernel/{base}"]
    assert kernel.dtype == (jnp.uint8 if base == "nf4" else jnp.int8)
    assert flatten(state.frozen)["vision/layers/q/kernel"].dtype == jnp.bfloat16
    sharded, *_ = losses(dataclasses.replace(cfg, mesh=MeshConfig(data=1, fsdp=4, tensor=2)), 8)
    np.testing.assert_allclose(sharded, values, rtol=1e-4)


def test_a_batch_in_microbatches_gives_the_same_losses():
    model = config().model
    model = dataclasses.replace(model, projector=dataclasses.replace(model.projector, drop_path=0.0))
    cfg = dataclasses.replace(config(), model=model)
    parts = dataclasses.replace(cfg, optimizer=dataclasses.replace(cfg.optimizer, accumulation=2))
    np.testing.assert_allclose(losses(parts, 1, 3)[0], losses(cfg, 1, 3)[0], rtol=1e-5)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_recomputation_changes_no_loss(remat):
    cfg = config(lora=dataclasses.replace(SETTINGS, dropout=0.3))
    other = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, remat=remat))
    np.testing.assert_allclose(losses(other, 1, 3)[0], losses(cfg, 1, 3)[0], rtol=1e-5)


def test_only_adapters_and_the_projector_train():
    _, _, state = alone()
    parts = {path.split("/")[0] if not lora.is_adapter(path) else "adapter" for path in flatten(state.trained)}
    assert parts == {"adapter", "projector"}
    assert not any(lora.is_adapter(path) for path in flatten(state.frozen))


# ------------------------------------------------------------------ whole runs


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A workdir of the tiny model, as a conversion or a first stage leaves it."""
    home = Workdir(tmp_path_factory.mktemp("lora") / "base")
    cfg = tiny.get_config()
    home.path.mkdir()
    home.write(cfg, run()[2])
    made = Checkpoints(home.path, create=True)
    made.save_params(tiny.random_params(cfg.model))
    made.close()
    return home.path


def trained(workdir, base, steps=8, stop=None, **changes):
    """A run of train.py's loop in this process, to ``steps`` of 8; returns its losses."""
    cfg = config(init_from=str(base), **changes)
    cfg = dataclasses.replace(cfg, training=dataclasses.replace(cfg.training, checkpoint_every=2))
    rows, plan, _ = run()
    Workdir(workdir).begin(cfg, rows.source.texts)
    step = TrainStep(cfg, make_mesh(cfg, jax.devices()[: 8 if changes.get("mesh") else 1]), 8)
    train(cfg, step, rows, plan, workdir, steps)
    return [json.loads(line)["loss"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def undisturbed(base, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("lora") / "run"
    return workdir, trained(workdir, base)


def test_a_checkpoint_holds_what_trains_alone(undisturbed):
    saved = Checkpoints(undisturbed[0])._saved_params(8)
    assert not saved["frozen"]
    kept = flatten(saved["trained"])
    assert {path.split("/")[0] for path in kept if not lora.is_adapter(path)} == {"projector"}
    assert set(json.loads((undisturbed[0] / "base.json").read_text())["checksums"]) == {
        path for path in flatten(tiny.random_params(config().model)) if not path.startswith("projector/")
    }


def test_resumed_the_losses_are_the_same_to_the_bit_and_on_another_mesh_close(undisturbed, base, tmp_path):
    first = trained(tmp_path / "run", base, steps=4)
    assert first == undisturbed[1][:4]
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    assert trained(tmp_path / "run", base) == undisturbed[1]
    other = trained(tmp_path / "other", base, mesh=MeshConfig(data=2, fsdp=2, tensor=2))
    np.testing.assert_allclose(other, undisturbed[1], rtol=1e-5)


def test_a_workdir_of_adapters_loads_as_it_is(undisturbed, base):
    workdir, _ = undisturbed
    model = load(workdir, dtype="float32")
    params, adapters = Workdir(workdir).parts()
    flat, start = flatten(params), flatten(Workdir(base).params())
    assert all(np.array_equal(flat[path], start[path]) for path in flat if not path.startswith("projector/"))
    assert any(not np.array_equal(flat[path], start[path]) for path in flat if path.startswith("projector/"))
    a, b = (np.float64(adapters[f"decoder/layers/up/{leaf}"]) for leaf in (lora.A, lora.B))
    expected = np.float64(start["decoder/layers/up/kernel"]) + 2.0 * a @ b
    np.testing.assert_allclose(
        np.stack([layer["up"]["kernel"].T for layer in model.params["decoder"]["layers"]]), expected, atol=1e-5
    )
    assert np.abs(b).max() > 0


def test_another_run_can_begin_with_the_merged_model(undisturbed, base, tmp_path):
    values = trained(tmp_path / "next", undisturbed[0], steps=2)
    assert np.isfinite(values).all() and values[0] != undisturbed[1][0]


def test_what_begins_with_a_run_of_adapters_has_them_in_its_matrices(tmp_path):
    """Adapters on adapters, and a run whose decoder is frozen; with a base in float16, as many are published."""
    base = tmp_path / "base"
    Workdir(base).path.mkdir()
    Workdir(base).write(tiny.get_config(), run()[2])
    made = Checkpoints(base, create=True)
    made.save_params(jax.tree.map(lambda leaf: leaf.astype("float16"), tiny.random_params(config().model)))
    made.close()
    trained(tmp_path / "one", base, steps=4)
    trained(tmp_path / "two", tmp_path / "one", steps=2)
    trained(tmp_path / "frozen", tmp_path / "one", steps=2, lora=None)
    start, one, two, frozen = (flatten(Workdir(tmp_path / name).params()) for name in ("base", "one", "two", "frozen"))
    adapters = Workdir(tmp_path / "two").parts()[1]
    for path in (path for path in start if path.startswith("decoder/")):
        np.testing.assert_array_equal(frozen[path], one[path])
        module = path.removesuffix("/kernel")
        if f"{module}/{lora.A}" in adapters:
            assert not np.array_equal(one[path], start[path])
            a, b = (np.float32(adapters[f"{module}/{leaf}"]) for leaf in (lora.A, lora.B))
            np.testing.assert_allclose(np.float32(two[path]), np.float32(one[path]) + 2 * a @ b, rtol=1e-3, atol=1e-6)


def test_a_quantised_base_is_the_same_in_training_and_when_loaded(base, tmp_path):
    cfg = config(lora=dataclasses.replace(SETTINGS, base="nf4", targets="q,v"), init_from=str(base))
    trained(tmp_path, base, steps=2, lora=cfg.lora)
    step = TrainStep(cfg, make_mesh(cfg, jax.devices()[:1]), 8)
    saved, _ = Checkpoints(tmp_path).restore(2, dataclasses.replace(step.shapes, frozen={}))
    frozen = init_frozen(cfg, step.mesh, Workdir(base).newest(cfg.model))
    in_training = flatten(whole_params(cfg, dataclasses.replace(saved, frozen=frozen)))
    loaded = flatten(Workdir(tmp_path).params())
    for path in (path for path in loaded if path.startswith("decoder/layers/") and path.endswith("/kernel")):
        np.testing.assert_array_equal(in_training[path], loaded[path])
    with pytest.raises(ConfigError, match="lora.base=nf4 is for matrices that do not train, but decoder/layers/"):
        whole = dataclasses.replace(cfg, optimizer=dataclasses.replace(cfg.optimizer, frozen=("^vision/",)))
        TrainStep(whole, step.mesh, 8)


def test_a_changed_or_missing_base_is_one_line(undisturbed, base, tmp_path):
    moved, changed = tmp_path / "run", tmp_path / "base"
    shutil.copytree(undisturbed[0], moved)
    made = Checkpoints(changed, create=True)
    params = tiny.random_params(config().model)
    layers = params["decoder"]["layers"]
    layers["q"]["kernel"] = layers["q"]["kernel"].at[1, 2, 3].add(0.1)
    made.save_params(params)
    made.close()
    Workdir(changed).write(tiny.get_config(), run()[2])
    for file in (moved / "config.json", moved / "base.json"):
        values = json.loads(file.read_text())
        file.write_text(json.dumps(values | {"init_from": str(changed)}))
    with pytest.raises(CheckpointError, match="decoder/layers/q/kernel has changed there since"):
        Workdir(moved).params()
    with pytest.raises(CheckpointError, match="decoder/layers/q/kernel has changed"):
        trained(moved, changed)
    (moved / "base.json").rename(tmp_path / "elsewhere.json")
    for use in (lambda: load(moved), lambda: trained(moved, changed)):
        with pytest.raises(CheckpointError, match="base.json is missing"):
            use()
    (tmp_path / "elsewhere.json").rename(moved / "base.json")
    shutil.rmtree(changed)
    with pytest.raises(CheckpointError, match="which is missing; put it back there"):
        load(moved)


def test_other_adapters_are_refused_on_resume_and_adapters_need_a_base(undisturbed, base, tmp_path):
    with pytest.raises(ConfigError, match="holds other adapters: lora.alpha is 16.0; the run was started with 8.0"):
        trained(undisturbed[0], base, lora=dataclasses.replace(SETTINGS, alpha=16.0))
    with pytest.raises(ConfigError, match="lora adapts a pretrained model; give its workdir with --config.init_from"):
        trained(tmp_path / "x", "")


def test_the_fingerprint_sees_values_places_and_dtypes_that_round():
    x = jax.random.normal(jax.random.key(0), (6, 8))
    sums = lambda x: fingerprint({"x": x})["x"]
    assert sums(x) == sums(x.astype(jnp.bfloat16)) == sums(jnp.asarray(np.asarray(x)))
    assert len({sums(x), sums(x.T.reshape(6, 8)), sums(x.at[0, 0].add(1)), sums(x[::-1]), sums(x[:, ::-1])}) == 5
    mesh = make_mesh(config(), jax.devices()[:2])
    placed = jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data")))
    assert sums(placed) == sums(x)


def test_rates_and_model_of_a_task(base):
    """A configuration for one's own data has no model: that of init_from is adapted."""
    cfg = OptimizerConfig(lr=2e-4, rates={"^projector/": 2e-5, "lora_b$": "4x"})
    assert cfg.rate_of("projector/up/kernel") == 2e-5
    assert cfg.rate_of("decoder/layers/q/lora_b") == pytest.approx(8e-4)
    assert cfg.rate_of("decoder/layers/q/lora_a") == 2e-4
    assert Workdir("nowhere").model_for(str(base)) == tiny.get_config().model != ModelConfig()

"""Checkpoints: restored bit for bit onto any mesh, the best kept, damage and full disks reported, nothing lost."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deltallava_jax.config import override
from deltallava_jax.data.pipeline import elements
from deltallava_jax.errors import CheckpointError, ConfigError
from deltallava_jax.models.names import flatten
from deltallava_jax.parallel.mesh import make_mesh, put_rows
from deltallava_jax.training.checkpoints import Checkpoints
from deltallava_jax.training.step import TrainStep, init_state
from tests import tiny

RECORD = {"epoch": 0, "records": 0, "faults": 0}


def on(devices, **mesh):
    """(the step on a mesh, its config)"""
    cfg = override(tiny.get_config(), {f"mesh.{axis}": str(size) for axis, size in mesh.items()})
    return TrainStep(cfg, make_mesh(cfg, jax.devices()[:devices]), 100), cfg


@pytest.fixture(scope="module")
def batches():
    cfg = tiny.get_config()
    rows, plan, _ = tiny.make_run(cfg)
    return list(elements(rows, plan, 0, 4, workers=0))


def run_steps(step, state, batches):
    losses = []
    for element in batches:
        state, metrics = step(state, put_rows(element.batch, step.mesh), element.budget)
        losses.append(float(metrics["loss"]))
    return state, losses


def arrays(state):
    return {**flatten(state.params), **{str(path): leaf for path, leaf in jax.tree.leaves_with_path(state.optimizer)}}


@pytest.fixture(scope="module")
def trained(batches):
    """(step, state) after two steps on four devices that share the parameters."""
    step, cfg = on(4, fsdp=4)
    return step, run_steps(step, init_state(cfg, step.mesh, 100), batches[:2])[0]


@pytest.fixture(scope="module")
def state(trained):
    return trained[1]


def test_restored_onto_another_mesh_to_the_bit(tmp_path, trained, batches):
    step, state = trained
    checkpoints = Checkpoints(tmp_path, create=True)
    checkpoints.save(2, state, RECORD)
    checkpoints.wait()
    saved = {path: np.array(leaf) for path, leaf in arrays(state).items()}
    _, expected = run_steps(step, jax.tree.map(jnp.copy, state), batches[2:])
    for other, _ in (on(4, data=2, tensor=2), on(1)):
        restored, record = Checkpoints(tmp_path).restore(2, other.shapes)
        assert record == RECORD and int(restored.step) == 2
        for path, leaf in arrays(restored).items():
            np.testing.assert_array_equal(leaf, saved[path], err_msg=path)
        kernel = lambda state: state.trained["decoder"]["layers"]["gate"]["kernel"]
        assert kernel(restored).sharding == kernel(other.shapes).sharding != kernel(state).sharding
        _, losses = run_steps(other, restored, batches[2:])
        np.testing.assert_allclose(losses, expected, rtol=1e-5)


def steps_in(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


def test_the_newest_and_the_best_are_kept(tmp_path, state):
    accuracies = {1: 0.5, 2: 0.9, 3: None, 4: 0.7, 5: 0.6}
    for first, last in ((1, 3), (4, 5)):  # the accuracies outlive the process
        checkpoints = Checkpoints(tmp_path, keep=2, best=1, create=True)
        for step in range(first, last + 1):
            checkpoints.save(step, state, RECORD, accuracies[step])
        checkpoints.close()
        assert steps_in(tmp_path) == sorted({2, last - 1, last})
    assert Checkpoints(tmp_path).latest() == 5


def test_keeping_the_best_needs_evaluations():
    with pytest.raises(ConfigError, match="training.keep_best=2 needs training.eval_every"):
        override(tiny.get_config(), {"training.keep_best": "2"})


def test_a_checkpoint_with_a_missing_file_is_refused_or_whole(tmp_path, state):
    checkpoints = Checkpoints(tmp_path, create=True)
    for step in (1, 2):
        checkpoints.save(step, state, RECORD)
    checkpoints.close()
    folder, refused, saved = tmp_path / "checkpoints" / "2", 0, arrays(state)
    shapes = on(1)[0].shapes
    files = [path for path in folder.rglob("*") if path.is_file()]
    for file in files:
        content = file.read_bytes()
        file.unlink()
        try:
            restored, _ = Checkpoints(tmp_path).restore(2, shapes)
            for path, leaf in arrays(restored).items():
                np.testing.assert_array_equal(leaf, saved[path], err_msg=path)
        except CheckpointError as error:
            assert f"checkpoint {folder} cannot be restored" in str(error)
            assert "or move the folder 2 away to resume from step 1" in str(error)
            refused += 1
        file.write_bytes(content)
    assert 8 <= refused < len(files)
    Checkpoints(tmp_path).restore(2, shapes)
    shutil.rmtree(folder)  # as the message advises
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.latest() == 1 and int(checkpoints.restore(1, shapes)[0].step) == 2

"""The loop in one process: broken records are left out and counted, a non-finite loss stops the run."""

import json
import shutil

import jax
import numpy as np
import pytest

from deltallava_jax.config import override
from deltallava_jax.data import easy_vqa
from deltallava_jax.data.packing import PackPlan
from deltallava_jax.data.records import Record
from deltallava_jax.errors import BadSample, CheckpointError, NonFiniteLoss, TooManyFaults
from deltallava_jax.parallel.mesh import make_mesh
from deltallava_jax.training.checkpoints import Checkpoints
from deltallava_jax.training.loop import train
from deltallava_jax.training.step import TrainStep
from tests import tiny


class Folder:
    """Records over copies of easy-VQA pictures; the files of ``broken`` ones are cut short, ``silent`` ones have no
    text."""

    def __init__(self, folder, count, broken=(), silent=()):
        self.silent, self.paths = silent, [folder / f"{index}.png" for index in range(count)]
        for index, path in enumerate(self.paths):
            shutil.copy(easy_vqa.image_path("train", index), path)
            if index in broken:
                path.write_bytes(path.read_bytes()[:60])

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        if index in self.silent:
            raise BadSample(f"record-{index} has no text")
        turns = [{"from": "human", "value": "<image>\nwhat shape is present?"}, {"from": "gpt", "value": "circle"}]
        return Record(f"record-{index}", (self.paths[index],), turns)

    def texts(self):
        return ["what shape is present? circle"]


def run(workdir, source=None, steps=4, **changes):
    settings = {"training.checkpoint_every": "1", **changes}
    cfg = override(tiny.get_config(), settings)
    rows, plan, _ = tiny.make_run(cfg, source)
    step = TrainStep(cfg, make_mesh(cfg, jax.devices()[:1]), steps)
    workdir.mkdir(exist_ok=True)
    return train(cfg, step, rows, plan, workdir, steps)


def test_a_corrupt_picture_is_left_out_named_and_counted(tmp_path):
    source = Folder(tmp_path, 100, broken=(3,))
    assert run(tmp_path / "run", source, **{"data.max_bad_fraction": "0.05"})
    faults = (tmp_path / "run" / "faults.txt").read_text().splitlines()
    assert faults and all(line.startswith("record-3: image ") and "3.png" in line for line in faults)
    record = json.loads((tmp_path / "run" / "checkpoints" / "4" / "record" / "metadata").read_text())
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert record["epoch"] == 1 and record["faults"] == len(faults) - 1  # counted by epochs, of 100 records
    assert sum(step["conversations"] for step in steps) == 100 + record["records"] - len(faults)


def test_too_many_faults_stop_the_run(tmp_path):
    source = Folder(tmp_path, 40, broken=range(10))
    with pytest.raises(TooManyFaults, match=r"more than data.max_bad_fraction=0.01; they are listed in .*faults.txt"):
        run(tmp_path / "run", source)


def test_records_of_no_use_are_not_planned_and_do_not_count_as_broken_on_the_way(tmp_path):
    source = Folder(tmp_path, 100, silent=(0, 31, 99))
    assert run(tmp_path / "run", source, **{"data.max_bad_fraction": "0.05"})
    assert not (tmp_path / "run" / "faults.txt").exists()
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    record = json.loads((tmp_path / "run" / "checkpoints" / "4" / "record" / "metadata").read_text())
    assert record["epoch"] == 1 and record["faults"] == 0
    assert sum(step["conversations"] for step in steps) == 97 + record["records"]


def poison(monkeypatch, at):
    """Makes the loss of a step NaN."""

    def poisoned(step, state, *rest, call=TrainStep.__call__):
        if int(state.step) == at - 1:
            state.trained["projector"]["up"]["kernel"] *= float("nan")
        return call(step, state, *rest)

    monkeypatch.setattr(TrainStep, "__call__", poisoned)


def test_a_nan_names_its_batch_even_if_a_record_of_it_is_broken(tmp_path, monkeypatch):
    poison(monkeypatch, at=2)
    cfg = override(tiny.get_config(), {"training.checkpoint_every": "1", "data.max_bad_fraction": "1"})
    source = Folder(tmp_path, 8, silent=(5,))
    rows, _, _ = tiny.make_run(cfg, source)
    plan = PackPlan(np.full(8, 12), np.ones(8, int), budgets=(4,), rows=8, row_length=96)  # the broken one, too
    with pytest.raises(NonFiniteLoss) as error:
        train(cfg, TrainStep(cfg, make_mesh(cfg, jax.devices()[:1]), 4), rows, plan, tmp_path, 4)
    message = str(error.value)
    assert "at step 2; the checkpoint of step 1 is kept. The batch: epoch 1, budget 4, 8 records: " in message
    assert "record 5" in message and "record-4" in message
    assert Checkpoints(tmp_path).latest() == 1


@pytest.mark.parametrize("at", [1, 3])
def test_a_nan_stops_the_run_at_its_step_and_keeps_the_last_good_checkpoint(at, tmp_path, monkeypatch):
    poison(monkeypatch, at)
    with pytest.raises(NonFiniteLoss) as error:
        run(tmp_path)
    message = str(error.value)
    kept = "no checkpoint was saved yet" if at == 1 else f"the checkpoint of step {at - 1} is kept"
    assert f"at step {at}; {kept}. The batch: epoch 0, budget 4" in message
    assert "train/" in message  # the records by name
    assert Checkpoints(tmp_path).latest() == (None if at == 1 else at - 1)


def test_a_checkpoint_with_a_missing_file_is_refused(tmp_path):
    assert run(tmp_path, steps=1)
    for path in (tmp_path / "checkpoints" / "1" / "params").glob("*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(CheckpointError, match="checkpoint .*1 cannot be re"):
        run(tmp_path, steps=2)

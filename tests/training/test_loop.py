"""The loop in one process: broken records are left out and counted, a loss that is not finite stops the run."""

import json
import shutil

import jax
import pytest
import tiny

from deltallava_jax.config import override
from deltallava_jax.data import easy_vqa
from deltallava_jax.data.records import Record
from deltallava_jax.errors import CheckpointError, NonFiniteLoss, TooManyFaults
from deltallava_jax.parallel.mesh import make_mesh
from deltallava_jax.training.checkpoints import Checkpoints
from deltallava_jax.training.loop import train
from deltallava_jax.training.step import TrainStep


class Folder:
    """Records over copies of easy-VQA pictures; the files of ``broken`` ones are cut short."""

    def __init__(self, folder, count, broken=()):
        self.paths = [folder / f"{index}.png" for index in range(count)]
        for index, path in enumerate(self.paths):
            shutil.copy(easy_vqa.image_path("train", index), path)
            if index in broken:
                path.write_bytes(path.read_bytes()[:60])

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
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
    assert record["faults"] == len(faults) and record["records"] >= 100
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert sum(step["conversations"] for step in steps) == record["records"] - record["faults"]


def test_too_many_faults_stop_the_run(tmp_path):
    source = Folder(tmp_path, 40, broken=range(10))
    with pytest.raises(TooManyFaults, match=r"more than data.max_bad_fraction=0.01; they are listed in .*faults.txt"):
        run(tmp_path / "run", source)


@pytest.mark.parametrize("at", [1, 3])
def test_a_nan_stops_the_run_at_its_step_and_keeps_the_last_good_checkpoint(at, tmp_path, monkeypatch):
    def poisoned(step, state, *rest, call=TrainStep.__call__):
        if int(state.step) == at - 1:
            state.trained["projector"]["up"]["kernel"] *= float("nan")
        return call(step, state, *rest)

    monkeypatch.setattr(TrainStep, "__call__", poisoned)
    with pytest.raises(NonFiniteLoss) as error:
        run(tmp_path)
    message = str(error.value)
    kept = "no checkpoint was saved yet" if at == 1 else f"the checkpoint of step {at - 1} is kept"
    assert f"at step {at}; {kept}. The batch: epoch 0, budget 4" in message
    assert "train/" in message  # the records by name
    assert Checkpoints(tmp_path).latest() == (None if at == 1 else at - 1)


def test_a_checkpoint_with_a_missing_file_is_refused_in_words(tmp_path):
    assert run(tmp_path, steps=1)
    for path in (tmp_path / "checkpoints" / "1" / "params").glob("*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(CheckpointError, match="checkpoint .*1 cannot be re"):
        run(tmp_path, steps=2)

"""Several real processes as one run: the losses of one, each other's end noticed, resumed by any number of them."""

import re
import signal
import time

import numpy as np
import pytest
from processes import finish, lines, start, start_several, wait_for

from deltallava_jax.training.checkpoints import Checkpoints

SETTINGS = ("--config.training.steps=40", "--config.training.checkpoint_every=5")
COUNTS = ("tokens", "images", "conversations", "supervised")  # of the whole batch: they tell batches apart


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """metrics.jsonl of one process with one device."""
    workdir = tmp_path_factory.mktemp("alone")
    finish(start(workdir, *SETTINGS))
    return lines(workdir)


def of(records, name):
    return [record[name] for record in records]


def assert_told_of(process, other):
    """The process ends within a minute with one line about the other, and nothing else after its progress."""
    began = time.monotonic()
    _, err = finish(process, code=1)
    assert time.monotonic() - began < 60
    assert len(re.findall("error:", err)) == 1 and "Traceback" not in err and "stack trace" not in err, err
    line = rf"error: ({other}|another process) stopped.*; start the same command again .*"
    assert re.fullmatch(line, err.splitlines()[-1]), err


def test_runs_of_several_processes(alone, tmp_path):
    """Two processes, one killed; two again, one of them told to stop; four, the coordinator killed; one to the end."""
    sharded = (*SETTINGS, "--config.mesh.fsdp=2")
    first, second = start_several(2, tmp_path, *sharded, "--config.training.eval_every=6",
                                  "--config.evaluation.limit=64", devices=2)  # fmt: skip
    wait_for(tmp_path, 8, first, second)
    second.kill()
    assert_told_of(first, "process 1")
    np.testing.assert_allclose(
        [line["loss"] for line in lines(tmp_path)[:5]], [line["loss"] for line in alone[:5]], rtol=1e-5
    )
    assert Checkpoints(tmp_path).latest() == 5

    first, second = start_several(2, tmp_path, *sharded, devices=2)
    wait_for(tmp_path, 12, first, second)
    second.send_signal(signal.SIGTERM)
    (_, told), (_, silent) = finish(first), finish(second)
    stopped = len(lines(tmp_path))
    assert "resuming from step 5 of 40" in told and f"SIGTERM: saving step {stopped};" in told and stopped < 40
    assert "decoder/embed" in told and not {"decoder/embed", "resuming", "SIGTERM:"} & set(silent.split())  # one logs
    assert Checkpoints(tmp_path).latest() == stopped

    four = start_several(4, tmp_path, *sharded)
    wait_for(tmp_path, stopped + 3, *four)
    four[0].kill()
    for process in four[1:]:
        assert_told_of(process, "process 0, the coordinator,")
    finish(four[0], code=-signal.SIGKILL)

    _, err = finish(start(tmp_path, *SETTINGS))
    assert "resuming from step" in err
    ours = lines(tmp_path)
    for name in COUNTS:
        assert of(ours, name) == of(alone, name)
    np.testing.assert_allclose(of(ours, "loss"), of(alone, "loss"), rtol=1e-3)

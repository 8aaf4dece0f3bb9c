"""Runs of train.py with adapters in separate processes: killed, stopped, several, resumed, evaluated."""

import os
import signal

import numpy as np
import pytest

from deltallava_jax.training.checkpoints import Checkpoints
from tests.training.processes import evaluate, finish, lines, start, start_several, wait_for

STEPS = 40
ADAPTERS = (
    "--config.lora.rank=4", "--config.lora.base=nf4", "--config.optimizer.frozen=('^vision/', '^decoder/')",
    f"--config.training.steps={STEPS}", "--config.training.checkpoint_every=3",
)  # fmt: skip


def losses(workdir):
    return [line["loss"] for line in lines(workdir)]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("lora_runs") / "base"
    finish(start(workdir, "--config.training.steps=2"))
    return f"--config.init_from={workdir}"


@pytest.fixture(scope="module")
def undisturbed(base, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("lora_runs") / "undisturbed"
    finish(start(workdir, *ADAPTERS, base))
    return workdir


def test_killed_and_stopped_the_losses_are_the_same_to_the_bit(undisturbed, base, tmp_path):
    process = start(tmp_path, *ADAPTERS, base)
    wait_for(tmp_path, 10, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    process = start(tmp_path, *ADAPTERS, base)
    wait_for(tmp_path, len(lines(tmp_path)) + 6, process)
    os.killpg(process.pid, signal.SIGTERM)
    _, err = finish(process)
    stopped = Checkpoints(tmp_path).latest()
    assert "resuming from step" in err and f"SIGTERM: saving step {stopped}" in err and stopped < STEPS
    finish(start(tmp_path, *ADAPTERS, base))
    assert len(losses(tmp_path)) == STEPS and losses(tmp_path) == losses(undisturbed)
    finish(evaluate(tmp_path, "--limit", "64"))


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one_and_one_goes_on(undisturbed, base, tmp_path):
    first, second = start_several(2, tmp_path, *ADAPTERS, base, "--config.mesh.fsdp=2", devices=2)
    wait_for(tmp_path, 10, first, second)
    second.kill()
    finish(first, code=1)
    second.communicate()
    finish(start(tmp_path, *ADAPTERS, base))
    np.testing.assert_allclose(losses(tmp_path), losses(undisturbed), rtol=1e-4)

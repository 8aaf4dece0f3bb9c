"""Several real processes as one run: the losses of one, each other's end noticed, resumed by any number of them."""

import argparse
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from deltallava_jax.errors import ConfigError
from deltallava_jax.models.names import flatten
from deltallava_jax.parallel import hosts
from deltallava_jax.training.checkpoints import Checkpoints
from tests import tiny
from tests.training import meshes
from tests.training.processes import (
    GUARD,
    ROOT,
    environment,
    finish,
    free_port,
    lines,
    start,
    start_as_slurm,
    start_meshes,
    start_several,
    wait_for,
)  # fmt: skip

SETTINGS = ("--config.training.steps=60", "--config.training.checkpoint_every=5")
COUNTS = ("tokens", "images", "conversations", "supervised")  # of the whole batch: they distinguish batches


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """metrics.jsonl of one process with one device."""
    workdir = tmp_path_factory.mktemp("alone")
    finish(start(workdir, *SETTINGS))
    return lines(workdir)


def of(records, name):
    return [record[name] for record in records]


def assert_reports_loss_of(process, other):
    """The process ends within a minute with one line about the other, and nothing else after its progress."""
    began = time.monotonic()
    _, err = finish(process, code=1)
    assert time.monotonic() - began < 60
    assert len(re.findall("error:", err)) == 1 and "Traceback" not in err and "stack trace" not in err, err
    line = rf"error: ({other}|another process) stopped.*; start the same command again .*"
    assert re.fullmatch(line, err.splitlines()[-1]), err


@pytest.mark.slow
def test_runs_of_several_processes(alone, tmp_path):
    """Two processes, one killed; two again, stopped by a signal; one; two that hold the same rows, the coordinator
    killed: in all the same batches, and the losses of one process."""
    sharded = (*SETTINGS, "--config.mesh.fsdp=2")
    first, second = start_several(2, tmp_path, *sharded, "--config.training.eval_every=6",
                                  "--config.evaluation.limit=64", devices=2)  # fmt: skip
    wait_for(tmp_path, 8, first, second)
    second.kill()
    assert_reports_loss_of(first, "process 1")
    np.testing.assert_allclose(
        [line["loss"] for line in lines(tmp_path)[:5]], [line["loss"] for line in alone[:5]], rtol=1e-5
    )
    assert Checkpoints(tmp_path).latest() == 5

    first, second = start_several(2, tmp_path, *sharded, devices=2)
    wait_for(tmp_path, len(lines(tmp_path)) + 3, first, second)
    os.killpg(first.pid, signal.SIGINT)  # Ctrl-C in its terminal; the other one is stopped by its cluster
    second.send_signal(signal.SIGTERM)
    (_, logged), (_, silent) = finish(first, code=130), finish(second)
    stopped = len(lines(tmp_path))
    assert "resuming from step 5 of 60" in logged and f"Ctrl-C: saving step {stopped};" in logged and stopped < 40
    assert "decoder (trained)" in logged and not {"(trained):", "resuming", "saving"} & set(silent.split())  # one logs
    assert Checkpoints(tmp_path).latest() == stopped

    half = start(tmp_path, *SETTINGS)
    wait_for(tmp_path, stopped + 6, half)
    half.kill()
    half.communicate()

    coordinator, other = start_as_slurm(2, tmp_path, *SETTINGS, "--config.mesh.tensor=2")
    wait_for(tmp_path, len(lines(tmp_path)) + 3, coordinator, other)
    coordinator.kill()
    assert_reports_loss_of(other, "process 0, the coordinator,")
    finish(coordinator, code=-signal.SIGKILL)

    ours = lines(tmp_path)
    assert len(ours) > stopped + 6
    for name in ("step", *COUNTS):
        assert of(ours, name) == of(alone[: len(ours)], name)
    np.testing.assert_allclose(of(ours, "loss"), of(alone[: len(ours)], "loss"), rtol=1e-4)


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_every_mesh_gives_the_losses_and_parameters_of_one_device(one_device, processes, tmp_path):
    """Whichever rows a process holds: some, all, those that another one holds too; and each fault is reported once."""
    if processes == 1:
        results = meshes.train(jax.devices()[:4])
        found = [(losses, params, [faults]) for losses, params, faults in results.values()]
    else:
        for process in start_meshes(processes, tmp_path):
            finish(process)
        parts = [json.loads((tmp_path / f"{processes}.{number}.json").read_text()) for number in range(processes)]
        arrays = np.load(tmp_path / f"{processes}.npz")
        found = [
            (each[0][0], {path: arrays[f"{number}/{path}"] for path in one_device[1]}, [faults for _, faults in each])
            for number, each in enumerate(zip(*parts, strict=True))
        ]
    assert len(found) == len(meshes.MESHES)
    losses, params, faults = one_device
    for ours, end, reported in found:
        np.testing.assert_allclose(ours, losses, rtol=1e-6)
        for path, leaf in end.items():
            np.testing.assert_allclose(leaf, params[path], atol=1e-6, err_msg=path)
        assert sorted(itertools.chain(*reported)) == sorted(faults)


@pytest.fixture(scope="module")
def one_device():
    """(losses, parameters, faults) of a mesh of one."""
    (result,) = meshes.train(jax.devices()[:1], [(1, 1, 1)]).values()
    losses, params, faults = result
    assert losses[0] != losses[-1] and len(faults) > 1
    before = flatten(meshes.make_params(tiny.get_config()))
    assert all((leaf != before[path]).any() for path, leaf in params.items())
    return losses, {path: np.asarray(leaf) for path, leaf in params.items()}, faults


def test_processes_that_do_not_find_each_other_report_it():
    arguments = ["--coordinator", f"127.0.0.1:{free_port()}", "--processes", "2", "--process", "1"]
    program = f"""
import argparse
from deltallava_jax.parallel import hosts
hosts.PATIENCE = 5
hosts.supervise({arguments})
parser = argparse.ArgumentParser()
hosts.add_arguments(parser)
hosts.connect(parser.parse_args({arguments}))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=GUARD)
    assert done.returncode == 1 and done.stderr.startswith("error: the processes of this run did not connect")
    assert len(done.stderr.splitlines()) == 1


SRUN = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "node[1-2]", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, False),
        (SRUN | {"SLURM_NTASKS": "2"}, True),
        (SRUN | {"SLURM_NTASKS": "1"}, False),
        (SRUN | {"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "1"}, False),  # srun --pty in an allocation of four
        (SRUN | {"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "4"}, True),
        (SRUN | {"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": ""}, True),
        (SRUN | {"SLURM_NTASKS": ""}, False),
        (SRUN, False),
        ({"SLURM_NTASKS": "", "MEGASCALE_NUM_SLICES": ""}, False),
        ({"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, False),  # in a batch script, without srun
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, True),
    ],
)
def test_where_several_processes_are_recognised(monkeypatch, variables, expected):
    for name in (*SRUN, "SLURM_NTASKS", "SLURM_STEP_NUM_TASKS", "TPU_WORKER_HOSTNAMES", "MEGASCALE_NUM_SLICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(hosts, "glob", lambda pattern: [])  # no TPU here
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert hosts.several(options()) == expected


def test_a_number_of_tasks_that_is_none_is_refused(monkeypatch):
    for name, value in (SRUN | {"SLURM_STEP_NUM_TASKS": "2(x3)"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"SLURM_STEP_NUM_TASKS is '2\(x3\)'; expected a number"):
        hosts.several(options())


def options(*arguments):
    parser = argparse.ArgumentParser()
    hosts.add_arguments(parser)
    return parser.parse_args(arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--coordinator", "a:1", "--processes", "2"), "--coordinator, --processes and --process go together"),
        (("--coordinator", "a:1", "--processes", "2", "--process", "2"), "a process from 0 to 1"),
        (("--coordinator", "a", "--processes", "2", "--process", "0"), "expected HOST:PORT"),
    ],
)
def test_options_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        hosts.several(options(*arguments))


def test_every_process_gets_the_texts_of_all():
    """Of unequal length, one of them empty."""
    port, program = (
        free_port(),
        (
            "import jax, sys; jax.distributed.initialize(sys.argv[1], 3, int(sys.argv[2]));"
            "from deltallava_jax.parallel import hosts;"
            "print(hosts.gather(['', 'é' * 5, 'three'][int(sys.argv[2])]))"
        ),
    )
    command = lambda number: [sys.executable, "-c", program, f"127.0.0.1:{port}", str(number)]
    each = [
        subprocess.Popen(command(number), stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment())
        for number in range(3)
    ]
    for process in each:
        assert process.communicate(timeout=GUARD)[0].splitlines()[-1] == "['', 'ééééé', 'three']"

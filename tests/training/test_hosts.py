"""Several real processes as one run: the losses of one, each other's end noticed, resumed by any number of them."""

import argparse
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from processes import GUARD, ROOT, environment, finish, free_port, lines, start, start_as_slurm, start_several, wait_for

from deltallava_jax.errors import ConfigError
from deltallava_jax.parallel import hosts
from deltallava_jax.training.checkpoints import Checkpoints

SETTINGS = ("--config.training.steps=60", "--config.training.checkpoint_every=5")
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
    """Two processes, one killed; as many again, one of them told to stop; half as many; twice as many, the coordinator
    killed: in all the same batches, and the losses of one process."""
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
    wait_for(tmp_path, len(lines(tmp_path)) + 3, first, second)
    second.send_signal(signal.SIGTERM)
    (_, told), (_, silent) = finish(first), finish(second)
    stopped = len(lines(tmp_path))
    assert "resuming from step 5 of 60" in told and f"SIGTERM: saving step {stopped};" in told and stopped < 40
    assert "decoder/embed" in told and not {"decoder/embed", "resuming", "SIGTERM:"} & set(silent.split())  # one logs
    assert Checkpoints(tmp_path).latest() == stopped

    half = start(tmp_path, *SETTINGS)
    wait_for(tmp_path, stopped + 6, half)
    half.kill()
    half.communicate()

    coordinator, other = start_as_slurm(2, tmp_path, *sharded)
    wait_for(tmp_path, len(lines(tmp_path)) + 3, coordinator, other)
    coordinator.kill()
    assert_told_of(other, "process 0, the coordinator,")
    finish(coordinator, code=-signal.SIGKILL)

    ours = lines(tmp_path)
    assert len(ours) > stopped + 6
    for name in ("step", *COUNTS):
        assert of(ours, name) == of(alone[: len(ours)], name)
    np.testing.assert_allclose(of(ours, "loss"), of(alone[: len(ours)], "loss"), rtol=1e-4)


def test_processes_that_do_not_find_each_other_say_so():
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
    assert done.returncode == 1 and done.stderr.startswith("error: the processes of this run did not find each other")
    assert len(done.stderr.splitlines()) == 1


SRUN = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "node[1-2]", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, False),
        (SRUN | {"SLURM_NTASKS": "2"}, True),
        (SRUN | {"SLURM_NTASKS": "1"}, False),
        ({"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, False),  # in a batch script, without srun
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, True),
    ],
)
def test_where_several_processes_are_recognised(monkeypatch, variables, expected):
    for name in (*SRUN, "SLURM_NTASKS", "TPU_WORKER_HOSTNAMES", "MEGASCALE_NUM_SLICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(hosts, "glob", lambda pattern: [])  # no TPU here
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert hosts.several(options()) == expected


def options(*arguments):
    parser = argparse.ArgumentParser()
    hosts.add_arguments(parser)
    return parser.parse_args(arguments)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--coordinator", "a:1", "--processes", "2"), "--coordinator, --processes and --process belong together"),
        (("--coordinator", "a:1", "--processes", "2", "--process", "2"), "a process from 0 to 1"),
        (("--coordinator", "a", "--processes", "2", "--process", "0"), "expected HOST:PORT"),
    ],
)
def test_options_that_do_not_fit_are_refused(arguments, told):
    with pytest.raises(ConfigError, match=told):
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

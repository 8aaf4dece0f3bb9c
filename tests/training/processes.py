"""train.py in separate processes, one or several for a run, over the tiny configuration."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

from tests import tiny
from tests.xla import FAST_COMPILES

ROOT = tiny.FILE.parent.parent
GUARD = 1200  # seconds: against hanging, not a measurement

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in the background of a shell; the processes would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)


def environment(devices=1):
    """Fake devices; the programs that are compiled stay for the next process."""
    return {**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {FAST_COMPILES}"}


def start(workdir, *settings, devices=1, variables={}):
    return _run(
        "train.py", "--config", tiny.FILE, "--workdir", workdir, *settings, devices=devices, variables=variables
    )


def evaluate(workdir, *settings):
    return _run("eval.py", "--workdir", workdir, *settings)


def _run(*command, devices=1, variables={}):
    return subprocess.Popen(
        [sys.executable, *map(str, command)], cwd=ROOT, env=environment(devices) | variables,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,  # its own process group, for signals
    )  # fmt: skip


def start_several(count, workdir, *settings, devices=1):
    """``count`` processes as one run, each with so many devices."""
    explicit = as_one_run(count)
    return [start(workdir, *settings, *explicit, number, devices=devices) for number in range(count)]


def evaluate_several(count, workdir, *settings):
    explicit = as_one_run(count)
    return [evaluate(workdir, *settings, *explicit, number) for number in range(count)]


def as_one_run(count):
    """The options of each of ``count`` processes, but for its number."""
    return ["--coordinator", f"127.0.0.1:{free_port()}", "--processes", count, "--process"]


def start_as_slurm(count, workdir, *settings):
    """The same with the variables of srun on one node."""
    job = free_port(61440) - 61440  # jax derives the coordinator's port from the job's number
    shared = {"SLURM_JOB_ID": str(job), "SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_NTASKS": str(count),
              "SLURM_STEP_NUM_TASKS": str(count)}  # fmt: skip
    tasks = [{"SLURM_PROCID": str(number), "SLURM_LOCALID": str(number)} for number in range(count)]
    return [start(workdir, *settings, variables=shared | task) for task in tasks]


def start_meshes(count, folder):
    """tests/training/meshes.py as ``count`` processes with four devices in all; the results go into the folder."""
    common = ["-m", "tests.training.meshes", folder, f"127.0.0.1:{free_port()}", count]
    return [_run(*common, number, devices=4 // count) for number in range(count)]


def free_port(start=0):
    """A port that nothing listens on: any, or the first from ``start`` on."""
    while True:
        with socket.socket() as candidate:
            try:
                candidate.bind(("127.0.0.1", start))
                return candidate.getsockname()[1]
            except OSError:
                start += 1


def finish(process, code=0):
    out, err = process.communicate(timeout=GUARD)
    assert process.returncode == code, err
    return out, err


def lines(workdir):
    """The steps of metrics.jsonl as dicts; the last one may still be written."""
    path = workdir / "metrics.jsonl"
    whole = path.read_text().split("\n")[:-1] if path.exists() else []
    return [record for record in map(json.loads, whole) if "loss" in record]


def wait_for(workdir, steps, *processes):
    while len(lines(workdir)) < steps:
        for process in processes:
            assert process.poll() is None, process.communicate()
        time.sleep(0.01)

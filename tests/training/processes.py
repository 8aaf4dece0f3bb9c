"""train.py in processes of their own, alone or several as one run, over the tiny configuration."""

import json
import os
import socket
import subprocess
import sys
import time

import tiny

ROOT = tiny.FILE.parent.parent
GUARD = 1200  # seconds: against hanging, not a measurement


def environment(devices=1):
    """Fake devices; the programs that are compiled stay for the next process."""
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    return {**os.environ, "XLA_FLAGS": flags}


def start(workdir, *settings, devices=1):
    return _run("train.py", "--config", tiny.FILE, "--workdir", workdir, *settings, devices=devices)


def evaluate(workdir, *settings):
    return _run("eval.py", "--workdir", workdir, *settings)


def _run(*command, devices=1):
    command = [sys.executable, *map(str, command)]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment(devices), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def start_several(count, workdir, *settings, devices=1):
    """``count`` processes as one run, each with so many devices."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    explicit = ["--coordinator", address, "--processes", count, "--process"]
    return [start(workdir, *settings, *explicit, number, devices=devices) for number in range(count)]


def finish(process, code=0):
    out, err = process.communicate(timeout=GUARD)
    assert process.returncode == code, err
    return out, err


def lines(workdir):
    """metrics.jsonl as dicts; the last one may still be written."""
    path = workdir / "metrics.jsonl"
    whole = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in whole]


def wait_for(workdir, steps, *processes):
    while len(lines(workdir)) < steps:
        for process in processes:
            assert process.poll() is None, process.communicate()
        time.sleep(0.01)

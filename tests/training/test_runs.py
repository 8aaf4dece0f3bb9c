"""Whole runs of train.py and eval.py in separate processes: killed, stopped, resumed, evaluated, refused."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deltallava_jax.training.checkpoints import Checkpoints
from tests.training.processes import (
    GUARD,
    ROOT,
    environment,
    evaluate,
    evaluate_several,
    finish,
    lines,
    start,
    wait_for,
)

LONG = ("--config.training.steps=160", "--config.training.checkpoint_every=30")
OFTEN = ("--config.training.steps=160", "--config.training.checkpoint_every=1")  # some save is always under way


def losses(workdir):
    return [line["loss"] for line in lines(workdir)]


def wait_for_a_save(workdir, process):
    """Returns while a checkpoint is being written."""
    while not list((workdir / "checkpoints").glob("*-tmp*")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.001)


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """The workdir of an uninterrupted run of 160 steps."""
    workdir = tmp_path_factory.mktemp("runs") / "undisturbed"
    finish(start(workdir, *LONG, "--profile", "3:5"))
    return workdir


def test_killed_during_a_save_and_started_again_the_losses_are_the_same_to_the_bit(undisturbed, tmp_path):
    process = start(tmp_path, *OFTEN, "--config.data.workers=1")
    wait_for(tmp_path, 70, process)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    wait_for_a_save(tmp_path, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    while any(Path(f"/proc/{worker}").exists() for worker in workers):  # they end with it
        time.sleep(0.1)
    done = len(lines(tmp_path))
    assert 70 <= done < 160 and done - 3 <= Checkpoints(tmp_path).latest() <= done  # only finished ones
    _, err = finish(start(tmp_path, *LONG))
    assert "resuming from step" in err
    assert len(losses(tmp_path)) == 160 and losses(tmp_path) == losses(undisturbed)
    assert not list((tmp_path / "checkpoints").glob("*-tmp*"))  # the interrupted save is removed


@pytest.mark.slow
def test_sigterm_during_a_save_and_ctrl_c_save_the_current_step(undisturbed, tmp_path):
    process = start(tmp_path, *OFTEN, "--config.data.workers=1")
    wait_for(tmp_path, 50, process)
    wait_for_a_save(tmp_path, process)
    os.killpg(process.pid, signal.SIGTERM)  # as clusters do: to the data workers too
    _, err = finish(process)
    done = len(losses(tmp_path))
    assert f"SIGTERM: saving step {done}" in err and done < 160
    assert Checkpoints(tmp_path).latest() == done
    assert "leaked" not in err

    process = start(tmp_path, *LONG, "--config.data.workers=1")
    wait_for(tmp_path, done + 5, process)
    os.killpg(process.pid, signal.SIGINT)  # as terminals do
    _, err = finish(process, code=130)
    stopped = len(losses(tmp_path))
    assert f"Ctrl-C: saving step {stopped}; the same command resumes from it" in err and stopped < 160
    assert Checkpoints(tmp_path).latest() == stopped

    _, err = finish(start(tmp_path, *LONG, "--config.data.workers=1"))
    assert losses(tmp_path) == losses(undisturbed)
    assert "leaked" not in err  # shared memory, at the end of Python
    assert "\r" not in err and max(map(len, err.splitlines())) < 300  # stderr is no terminal
    assert "training: 160 of 160 steps, loss" in err


def test_ctrl_c_before_the_first_step_names_no_checkpoint(tmp_path):
    process = start(tmp_path / "run")
    while not (tmp_path / "run" / "config.json").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    _, err = finish(process, code=130)
    assert "interrupted; nothing is lost, run the same command again" in err
    assert "checkpoint" not in err and "Traceback" not in err and Checkpoints(tmp_path / "run").latest() is None


def test_a_second_ctrl_c_ends_at_once():
    program = """
import os, signal, time
from deltallava_jax.training.loop import _stopping
with _stopping() as stop:
    assert stop(1) is None
    os.kill(os.getpid(), signal.SIGINT)
    assert stop(2) == "Ctrl-C"
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(600)
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=GUARD)
    assert done.returncode == -signal.SIGINT
    assert done.stderr.splitlines()[-1] == "Ctrl-C: saving after this step; press it again to stop at once"


@pytest.mark.slow
def test_two_kills_at_random_change_nothing(tmp_path):
    """benchmarks/load/soak.py, in short: the same final parameters and losses, bit for bit."""
    settings = ["--steps=40", "--every=5", "--kills=2", "--saves-alone=6", "--out", tmp_path / "soak"]
    command = [sys.executable, "-m", "benchmarks.load.soak", *settings]
    subprocess.run(command, cwd=ROOT, env=environment(), check=True, capture_output=True, timeout=GUARD)
    result = json.loads((tmp_path / "soak").read_text())
    assert result["parameters_equal_to_the_bit"] and result["losses_equal_to_the_bit"]
    assert len(result["killed_after_steps"]) == 2


@pytest.fixture
def small_disk(tmp_path):
    """A separate file system, too small for many checkpoints."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mounting a small file system is not allowed here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.slow
def test_a_full_disk_ends_the_run_with_one_error_and_it_resumes_when_there_is_space(undisturbed, small_disk):
    run = small_disk / "run"
    _, err = finish(start(run, *OFTEN, "--config.training.keep_checkpoints=99"), code=2)
    kept = Checkpoints(run).latest()
    (error,) = [line for line in err.splitlines() if line.startswith("error:")]
    assert f"No space left on device; the checkpoint of step {kept} is kept. Free space on that disk" in error
    assert kept > 1 and err.rstrip().endswith(error)  # after whatever orbax's threads print
    for step in range(1, kept):
        shutil.rmtree(run / "checkpoints" / str(step))
    _, err = finish(start(run, *LONG))
    assert f"resuming from step {kept} of 160" in err
    assert losses(run) == losses(undisturbed)


def test_training_learns_and_writes_its_files(undisturbed):
    values = losses(undisturbed)
    assert sum(values[-20:]) < 0.5 * sum(values[:20])
    assert list((undisturbed / "tensorboard").iterdir()) and list((undisturbed / "profile").rglob("*.xplane.pb"))
    assert min(line["teraflops_per_second_per_device"] for line in lines(undisturbed)) > 0
    assert 0.1 < lines(undisturbed)[-1]["host_memory"] < 32  # GiB
    assert (undisturbed / "tokenizer.json").exists() and (undisturbed / "config.json").exists()
    assert len(list((undisturbed / "checkpoints").iterdir())) == 2
    table = (undisturbed / "parameters.txt").read_text()
    assert "decoder/layers/q/kernel" in table and "projector (trained)" in table


def test_eval_writes_the_report(undisturbed):
    out, _ = finish(evaluate(undisturbed, "--limit", 200, "--blind"))
    assert not (undisturbed / "eval" / "easy_vqa.json").exists()  # a control's result is never the run's
    report = json.loads((undisturbed / "eval" / "easy_vqa_4_noise_limit200.json").read_text())
    assert report["task"] == "easy_vqa" and report["n"] == 200 and report["budget"] == 4
    assert report["images"] == "noise"
    assert sum(kind["n"] for kind in report["by_type"].values()) == 200
    hits = sum(kind["accuracy"] * kind["n"] for kind in report["by_type"].values())
    assert report["accuracy"] == pytest.approx(hits / 200) and report["seconds"] > 0
    assert f"{report['accuracy']:.4f}" in out


def test_several_processes_share_the_questions_and_one_prints(undisturbed):
    alone, _ = finish(evaluate(undisturbed, "--limit", 51))
    results = {file: json.loads(file.read_text()) for file in (undisturbed / "eval").glob("*_limit51.json")}
    assert len(results) == 2
    for file in results:
        file.unlink()
    (printed, _), (silent, _) = [finish(process) for process in evaluate_several(2, undisturbed, "--limit", 51)]
    ours = lambda text: [line for line in text.splitlines() if not line.startswith("[Gloo]")]  # by jax's library
    without_seconds = lambda text: [re.sub(r" +\d+\.\d  ", " ", line) for line in ours(text)]  # of any width
    assert ours(silent) == [] and without_seconds(printed) == without_seconds(alone)
    for file, report in results.items():
        assert json.loads(file.read_text()) | {"seconds": 0} == report | {"seconds": 0}


@pytest.mark.slow
def test_an_elastic_model_trains_and_answers_at_every_budget(tmp_path):
    _, err = finish(start(tmp_path, "--config.model.projector.scale_factor=(1,2,4,8)", "--config.training.steps=12",
                          "--config.training.eval_every=12", "--config.evaluation.limit=64"))  # fmt: skip
    assert all(f"at {budget} tokens" in err for budget in (64, 16, 4, 1))
    finish(evaluate(tmp_path, "--limit", 64))
    for budget in (64, 16, 4, 1):
        report = json.loads((tmp_path / "eval" / f"easy_vqa_{budget}_limit64.json").read_text())
        assert report["budget"] == budget and report["n"] == 64
    _, err = finish(evaluate(tmp_path, "--budgets", "9"), code=2)
    assert err.strip() == "error: delta makes 64, 16, 4, 1 tokens an image, not 9"


def test_bad_workdirs_are_refused(undisturbed, tmp_path):
    workdir = tmp_path / "copy"
    shutil.copytree(undisturbed, workdir)
    for setting, now, before in (("decoder.mlp_width", 96, 64), ("projector.scale_factor", 2, 4)):  # 4: the same shapes
        message = (
            f"error: {workdir} holds a different model: model.{setting} is {now}; the run was started with {before}."
        )
        _, err = finish(start(workdir, f"--config.model.{setting}={now}"), code=2)
        assert f"{message} Use that, or another --workdir" in err and "Traceback" not in err

    (workdir / "tokenizer.json").unlink()
    for process in (start(workdir, *LONG), evaluate(workdir)):
        _, err = finish(process, code=2)
        assert f"error: tokenizer file {workdir / 'tokenizer.json'} is missing" in err and "Traceback" not in err

    assert (workdir / "checkpoints" / "160").is_dir()  # nothing was lost
    _, err = finish(evaluate(tmp_path / "nowhere"), code=2)
    assert err.startswith("error:") and "config.json" in err

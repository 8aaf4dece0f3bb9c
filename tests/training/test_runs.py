"""Whole runs of train.py and eval.py in processes of their own: killed, stopped, resumed, evaluated, refused."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import tiny

ROOT = tiny.FILE.parent.parent


@pytest.fixture(scope="session")
def environment(tmp_path_factory):
    """One device, and compiled programs shared between the runs."""
    return {
        **os.environ,
        "XLA_FLAGS": "",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("xla")),
    }


@pytest.fixture(scope="session")
def start(environment):
    def start(script, *arguments):
        command = [sys.executable, script, *map(str, arguments)]
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    return start


@pytest.fixture(scope="session")
def train(start):
    return lambda workdir, *settings: start("train.py", "--config", tiny.FILE, "--workdir", workdir, *settings)


def losses(workdir):
    path = workdir / "metrics.jsonl"
    return [json.loads(line)["loss"] for line in path.read_text().splitlines()] if path.exists() else []


def wait_for(workdir, steps, process):
    while len(losses_so_far(workdir)) < steps:
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)


def losses_so_far(workdir):
    path = workdir / "metrics.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def finish(process, code=0):
    out, err = process.communicate(timeout=1200)  # a guard against hanging; compiling four budgets takes minutes
    assert process.returncode == code, err
    return out, err


LONG = ("--config.training.steps=160", "--config.training.checkpoint_every=30")


@pytest.fixture(scope="session")
def undisturbed(train, tmp_path_factory):
    """The workdir of an uninterrupted run of 160 steps."""
    workdir = tmp_path_factory.mktemp("runs") / "undisturbed"
    finish(train(workdir, *LONG))
    return workdir


def test_killed_and_started_again_the_losses_are_the_same_to_the_bit(train, undisturbed, tmp_path):
    process = train(tmp_path, *LONG)
    wait_for(tmp_path, 70, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert 70 <= len(losses_so_far(tmp_path)) < 160
    _, err = finish(train(tmp_path, *LONG))
    assert "resuming from step" in err
    assert len(losses(tmp_path)) == 160 and losses(tmp_path) == losses(undisturbed)


def test_sigterm_saves_the_current_step(train, undisturbed, tmp_path):
    process = train(tmp_path, *LONG)
    wait_for(tmp_path, 50, process)
    process.send_signal(signal.SIGTERM)
    _, err = finish(process)
    done = len(losses(tmp_path))
    assert f"SIGTERM: saving step {done}" in err and done < 160
    assert (tmp_path / "checkpoints" / str(done)).is_dir()
    finish(train(tmp_path, *LONG))
    assert losses(tmp_path) == losses(undisturbed)


def test_training_learns_and_leaves_what_it_says(undisturbed):
    values = losses(undisturbed)
    assert sum(values[-20:]) < 0.5 * sum(values[:20])
    assert list((undisturbed / "tensorboard").iterdir())
    assert (undisturbed / "tokenizer.json").exists() and (undisturbed / "config.json").exists()
    assert len(list((undisturbed / "checkpoints").iterdir())) == 2


def test_eval_writes_the_report(start, undisturbed):
    out, _ = finish(start("eval.py", "--workdir", undisturbed, "--limit", 200, "--blind"))
    report = json.loads((undisturbed / "eval" / "easy_vqa.json").read_text())
    assert report["task"] == "easy_vqa" and report["n"] == 200 and report["budget"] == 4 and report["blind"]
    assert sum(kind["n"] for kind in report["by_type"].values()) == 200
    hits = sum(kind["accuracy"] * kind["n"] for kind in report["by_type"].values())
    assert report["accuracy"] == pytest.approx(hits / 200) and report["seconds"] > 0
    assert f"{report['accuracy']:.4f}" in out


def test_an_elastic_model_trains_and_answers_at_every_budget(train, start, tmp_path):
    _, err = finish(train(tmp_path, "--config.model.projector.scale_factor=(1,2,4,8)", "--config.training.steps=12",
                          "--config.training.eval_every=12", "--config.evaluation.limit=64"))  # fmt: skip
    assert all(f"at {budget} tokens" in err for budget in (64, 16, 4, 1))
    finish(start("eval.py", "--workdir", tmp_path, "--limit", 64))
    for budget in (64, 16, 4, 1):
        report = json.loads((tmp_path / "eval" / f"easy_vqa_{budget}.json").read_text())
        assert report["budget"] == budget and report["n"] == 64
    _, err = finish(start("eval.py", "--workdir", tmp_path, "--budgets", "9"), code=1)
    assert err.strip() == "error: delta makes 64, 16, 4, 1 tokens an image, not 9"


def test_bad_workdirs_are_refused_in_words(train, start, undisturbed, tmp_path):
    workdir = tmp_path / "copy"
    shutil.copytree(undisturbed, workdir)
    _, err = finish(train(workdir, "--config.model.decoder.mlp_width=96"), code=1)
    assert "is of another model; use its config or another --workdir" in err and "Traceback" not in err
    assert "decoder/layers/down/kernel: saved (2, 64, 32), expected (2, 96, 32)" in err

    (workdir / "tokenizer.json").unlink()
    for process in (train(workdir, *LONG), start("eval.py", "--workdir", workdir)):
        _, err = finish(process, code=1)
        assert f"error: tokenizer file {workdir / 'tokenizer.json'} is missing" in err and "Traceback" not in err

    assert (workdir / "checkpoints" / "160").is_dir()  # nothing was lost
    _, err = finish(start("eval.py", "--workdir", tmp_path / "nowhere"), code=1)
    assert err.startswith("error:") and "config.json" in err

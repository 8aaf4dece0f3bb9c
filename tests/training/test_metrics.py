"""A run's metrics: a line for each step, speed and memory where they are due, and nothing twice after a restart."""

import json
from datetime import UTC, datetime, timedelta

import jax
import numpy as np
import pytest

from deltallava_jax.analysis.targets import CHIPS, peak_flops
from deltallava_jax.errors import NonFiniteLoss
from deltallava_jax.training.metrics import Metrics

PEAK = 2e12


def values(loss=1.0):
    finite = np.bool_(np.isfinite(loss))
    return {"loss": np.float32(loss), "grad_norm": np.float32(2), "finite": finite,
            "tokens": np.int32(300), "images": np.int32(4)}  # fmt: skip


def written(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def write(workdir, start, stop, **options):
    metrics = Metrics(workdir, start, 9, 2, **options)
    for step in range(start + 1, stop + 1):
        metrics.push(step, values(), operations=6e9)
    metrics.flush()
    metrics.close()


def test_speed_is_of_the_steps_since_the_last_report(tmp_path):
    write(tmp_path, 0, 4, peak=PEAK)
    one, two, three, four = written(tmp_path)
    assert "mfu" not in one and "mfu" not in three and one["loss"] == 1.0
    for line in (two, four):
        seconds, devices = line["seconds_per_step"], jax.device_count()
        assert line["tokens_per_second"] == pytest.approx(300 / seconds)
        assert line["tokens_per_second_per_device"] == pytest.approx(300 / seconds / devices)
        assert line["images_per_second"] == pytest.approx(4 / seconds)
        assert line["teraflops_per_second_per_device"] == pytest.approx(6e9 / seconds / devices / 1e12)
        assert line["mfu"] == pytest.approx(6e9 / seconds / devices / PEAK)
        assert 0.05 < line["host_memory"] < 32  # GiB


def test_after_a_restart_no_step_is_there_twice(tmp_path):
    counted = []
    write(tmp_path, 0, 5)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # cut short by a kill
    write(tmp_path, 3, 6, on_step=lambda step, values: counted.append((step, values["loss"])))
    assert [line["step"] for line in written(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert counted == [(4, 1.0), (5, 1.0), (6, 1.0)]
    assert "mfu" not in written(tmp_path)[-1]  # without a known peak


def test_every_line_has_its_time_epoch_and_budget_and_evaluations_are_lines_of_their_own(tmp_path):
    before = datetime.now(UTC)
    metrics = Metrics(tmp_path, 0, 9, 2, budgets=(16, 4))
    for step, budget in ((1, 16), (2, 4), (3, 16)):
        metrics.push(step, values(), epoch=step / 4, budget=budget)
    metrics.flush()
    metrics.log_evaluation(3, {"easy_vqa_16": 0.5, "easy_vqa_4": 0.25})
    metrics.close()
    board = b"".join(path.read_bytes() for path in (tmp_path / "tensorboard").iterdir())
    assert b"train/loss_4" in board and b"eval/easy_vqa_16" in board
    metrics = Metrics(tmp_path, 3, 9, 2)  # resumes after the evaluation
    metrics.push(4, values(), epoch=1.0)  # of all budgets
    metrics.flush()
    metrics.close()
    found = written(tmp_path)
    assert [line["step"] for line in found] == [1, 2, 3, 3, 4]
    assert [line.get("budget") for line in found] == [16, 4, 16, None, None]
    assert [line.get("epoch") for line in found] == [0.25, 0.5, 0.75, None, 1.0]
    assert found[3]["evaluation"] == {"easy_vqa_16": 0.5, "easy_vqa_4": 0.25} and "loss" not in found[3]
    times = [datetime.fromisoformat(line["time"]) for line in found]
    assert times == sorted(times) and timedelta(seconds=-1) < times[0] - before and times[-1] <= datetime.now(UTC)


def test_a_step_that_is_not_finite_is_not_written(tmp_path):
    metrics = Metrics(tmp_path, 0, 9, 1)
    metrics.push(1, values(float("nan")))
    with pytest.raises(NonFiniteLoss, match="loss nan, gradient norm 2.0 at step 1"):
        metrics.push(2, values())
    metrics.close()
    assert written(tmp_path) == []


def test_the_peak_of_a_device_that_is_there():
    assert peak_flops("TPU v5 lite") == CHIPS["v5e"].peak_flops != peak_flops("TPU v5p") == CHIPS["v5p"].peak_flops
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989.4e12 and peak_flops("cpu") is None

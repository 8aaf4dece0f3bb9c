"""The share of records that cannot be read, tested against the binomial distribution."""

import math
from pathlib import Path

import numpy as np
import pytest

from deltallava_jax.config import load_config
from deltallava_jax.data.packing import PackPlan, plan_for
from deltallava_jax.errors import BadSample, TooManyFaults
from deltallava_jax.training import faults

WORKDIR = Path("run")


@pytest.fixture(scope="module")
def plan() -> PackPlan:
    """In the shape of configs/finetune_7b.py: about 128 conversations a step, some of text alone."""
    cfg, rng = load_config(Path(__file__).parents[2] / "configs" / "finetune_7b.py"), np.random.default_rng(0)
    return plan_for(cfg.data, rng.integers(60, 540, 8000), (rng.random(8000) < 0.94).astype(int), (144,), 0)


def ends_after(plan, broken: set, limit: float = 0.01, epochs: int = 1, record: dict | None = None) -> int | None:
    """The records that a run has read when its broken ones stop it; None if they do not."""
    record = {} if record is None else record
    count = 0
    for step in range(1, plan.steps_for(epochs) + 1):
        records = [index for row in plan.step(step - 1).rows for index in row]
        count += len(records)
        try:
            faults.count_step(limit, WORKDIR, record, plan, step, {"conversations": len(set(records) - broken)})
        except TooManyFaults:
            return count
    return None


def drawn(seed: int, share: float, records: int = 8000) -> set:
    return set(np.random.default_rng((seed, 99)).permutation(records)[: round(share * records)].tolist())


@pytest.mark.parametrize("share", [0.002, 0.004, 0.006])
def test_a_share_below_the_bound_never_ends_a_run(plan, share):
    assert [ends_after(plan, drawn(seed, share)) for seed in range(20)] == [None] * 20


def test_a_share_far_above_the_bound_ends_it_soon(plan):
    ends = [ends_after(plan, drawn(seed, 0.03)) for seed in range(20)]
    assert all(end is not None and end < 2500 for end in ends) and np.median(ends) < 1200
    assert ends_after(plan, set(range(8000))) < 150  # at once


def test_a_share_just_above_the_bound_ends_it_within_the_epoch(plan):
    assert ends_after(plan, drawn(0, 0.011)) is not None
    assert ends_after(plan, drawn(0, 0.01), epochs=2) is None  # just the bound, whatever was read first


def test_a_handful_at_the_beginning_does_not_stop_a_run(plan):
    first = [index for row in plan.step(0).rows for index in row][: faults.HANDFUL - 1]
    assert ends_after(plan, set(first)) is None


def test_a_limit_of_zero_allows_no_fault(plan):
    first = plan.step(0).rows[0][0]
    assert ends_after(plan, {first}, limit=0.0) is not None and ends_after(plan, set(), limit=0.0) is None


def test_what_was_left_out_before_counts_too():
    lengths, images = np.full(1000, 100), np.ones(1000, int)
    known = {index: BadSample("x: broken") for index in range(8)}
    plan = PackPlan(lengths, images, budgets=(16,), rows=8, row_length=512, faults=known)
    assert ends_after(plan, {500, 700}) is None
    record = {}
    assert ends_after(plan, {500, 700, 900}, record=record) is not None and record["faults"] == 3
    with pytest.raises(
        TooManyFaults, match=r"3 of [\d,]+ records of epoch 0 could not be read, in addition to 8 left out"
    ):
        faults.count_step(0.01, WORKDIR, record, plan, 1, {"conversations": sum(map(len, plan.step(0).rows))})


def test_counts_continue_after_a_resume_and_restart_with_an_epoch(plan):
    record, whole, one = {}, {}, plan.steps_for(1)
    broken = drawn(0, 0.004)
    count = lambda record, step: faults.count_step(
        0.01, WORKDIR, record, plan, step,
        {"conversations": len({index for row in plan.step(step - 1).rows for index in row} - broken)},
    )  # fmt: skip
    for step in range(1, 21):
        count(record, step)
        count(whole, step)
    record = dict(record)  # as a checkpoint keeps it
    for step in range(21, one + 1):
        count(record, step)
        count(whole, step)
    assert record == whole == {"epoch": 0, "records": 8000, "faults": 32}
    count(record, one + 1)
    assert record["epoch"] == 1 and record["records"] < 300
    before = {"faults": 70, "records": 6000}  # of a version that did not count by epochs
    count(before, one + 2)
    assert before["epoch"] == 1 and before["records"] < 300


def test_the_probability_is_the_binomial_tail():
    exact = sum(math.comb(300, k) * 0.01**k * 0.99 ** (300 - k) for k in range(9, 301))
    assert faults._tail(9, 300, 0.01) == pytest.approx(exact, rel=1e-9)

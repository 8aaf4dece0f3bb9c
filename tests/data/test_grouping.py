"""LLaVA-1.5's batches: a conversation a row, one modality a batch, every record once, long enough and no longer."""

from collections import Counter

import numpy as np
import pytest

from deltallava_jax.config import DataConfig
from deltallava_jax.data.packing import BUCKET, GroupedPlan, PackPlan, plan_for
from deltallava_jax.errors import ConfigError

ROWS, LENGTH = 8, 2048


def mixture(count=501, seed=0):
    rng = np.random.default_rng(seed)
    images = (rng.random(count) < 0.8).astype(int) * rng.integers(1, 3, count)
    return rng.integers(20, 2500, count), images


def make(**changes):
    lengths, images = mixture()
    return GroupedPlan(lengths, images, **dict(budgets=(64,), rows=ROWS, row_length=LENGTH) | changes)


@pytest.fixture(scope="module")
def epochs():
    plan = make()
    return plan, [plan.step(number) for number in range(plan.steps_for(2))]


def test_every_record_comes_once_an_epoch_in_a_row_of_its_own(epochs):
    plan, steps = epochs
    for epoch in (0, 1):
        rows = [row for step in steps if step.epoch == epoch for row in step.rows]
        assert Counter(record for row in rows for record in row) == Counter(range(501))
        assert max(map(len, rows)) == 1
        # Rows are empty only where the last batch is.
        assert sum(not row for row in rows) == (-501) % ROWS


def test_a_batch_is_of_one_modality_but_for_the_remainder(epochs):
    plan, steps = epochs
    for epoch in (0, 1):
        own = [step for step in steps if step.epoch == epoch]
        kinds = [{bool(plan.images[row[0]]) for row in step.rows if row} for step in own]
        assert all(len(kind) == 1 for kind in kinds[:-2]) and {True} in kinds and {False} in kinds
        assert kinds[:-2] != sorted(kinds[:-2], key=max)  # mixed, not one after the other
        text_only = [step for step, kind in zip(own, kinds, strict=True) if kind == {False}]
        assert all(step.images == 0 for step in text_only)


def test_rows_are_as_long_as_the_longest_needs_and_fit_the_limit(epochs):
    plan, steps = epochs
    for step in steps:
        lengths = [plan.lengths[row[0]] for row in step.rows if row]
        capacity = LENGTH - step.images * 63
        assert lengths == sorted(lengths, reverse=True)
        assert min(max(lengths), capacity) <= step.text <= capacity and step.text + step.images * 63 <= LENGTH
        assert step.text == capacity or step.text - max(lengths) < BUCKET and step.text % BUCKET == 0
        assert step.images == max(plan.images[row[0]] for row in step.rows if row)


def test_steps_are_random_access_and_follow_the_seed(epochs):
    plan, steps = epochs
    again, other = make(), make(seed=1)
    assert [again.step(number) for number in (70, 3, 0)] == [steps[number] for number in (70, 3, 0)]
    assert other.step(0) != steps[0] and steps[0].rows != steps[plan.steps_for(1)].rows


def test_a_row_that_cannot_hold_the_images_is_refused():
    with pytest.raises(ConfigError, match="row_length=2048 cannot hold 2 images of 1025 tokens"):
        make(budgets=(4, 1025))


def test_the_configuration_chooses():
    lengths, images = mixture()
    for packed, kind in ((True, PackPlan), (False, GroupedPlan)):
        cfg = DataConfig(packed=packed, rows=ROWS, row_length=4096)
        plan = plan_for(cfg, lengths, images, (64,), 3)
        assert type(plan) is kind and (plan.seed, plan.rows) == (3, ROWS)

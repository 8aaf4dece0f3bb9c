"""The pack plan: nothing lost, nothing overfull, the same for everybody."""

import itertools
import pickle
from collections import Counter

import numpy as np
import pytest

from deltallava_jax.data.packing import PackPlan
from deltallava_jax.errors import ConfigError
from deltallava_jax.sequence import budget_at


def easy_like(records: int = 1500, seed: int = 0):
    """(lengths, images) like easy-VQA's conversations: one image, 91 tokens on average, 19 to 197."""
    lengths = np.random.default_rng(seed).normal(91, 27, records).round().clip(19, 197).astype(int)
    return lengths, np.ones(records, int)


def mixed(records: int = 400, seed: int = 0):
    """(lengths, images) of zero to three images, some text alone, some broken records of length 0."""
    rng = np.random.default_rng(seed)
    lengths, images = rng.integers(8, 160, records), rng.integers(0, 4, records)
    lengths[::50] = images[::50] = 0
    return lengths, images


CASES = {
    "easy": (easy_like(600), dict(budgets=(16,), rows=8, row_length=512)),
    "elastic": (easy_like(600), dict(budgets=(16, 4, 1), rows=4, row_length=512)),
    "mixed": (mixed(), dict(budgets=(64, 16), rows=3, row_length=700)),
    "one image place": (easy_like(200), dict(budgets=(36,), rows=4, row_length=256, images_per_row=1)),
    "text alone": ((mixed()[0], np.zeros(400, int)), dict(budgets=(16,), rows=4, row_length=256)),
    "long records": ((np.full(30, 300), np.ones(30, int)), dict(budgets=(16,), rows=2, row_length=128)),
}

each_case = pytest.mark.parametrize("case", CASES)


def make(case: str, **changes) -> PackPlan:
    (lengths, images), settings = CASES[case]
    return PackPlan(lengths, images, **{**settings, **changes})


def planned(plan: PackPlan, epochs: int):
    return [plan.step(number) for number in range(plan.steps_for(epochs))]


@each_case
def test_every_record_comes_exactly_once_an_epoch(case):
    plan = make(case)
    for epoch in range(3):
        counts = Counter(r for step in planned(plan, 3) if step.epoch == epoch for row in step.rows for r in row)
        assert counts == Counter(range(len(plan.lengths)))


@each_case
def test_no_row_holds_more_than_it_has_room_for(case):
    plan = make(case)
    for budget, (text, images) in plan.capacities.items():
        assert text + images * (budget - 1) == plan.row_length
        assert text >= 2 and images >= plan.images.max()
    for step in planned(plan, 2):
        text, images = step.text, step.images
        assert (text, images) in (plan.capacities[step.budget], (plan.row_length, 0)) and len(step.rows) == plan.rows
        for row in step.rows:  # a record longer than a row is truncated and has a row alone
            assert np.minimum(plan.lengths[row], text).sum() <= text
            assert plan.images[row].sum() <= images


@each_case
def test_the_plan_follows_from_its_arguments_alone(case):
    steps = planned(make(case, seed=5), 2)
    np.random.seed(1)  # a host's global state plays no part
    assert planned(make(case, seed=5), 2) == steps
    assert planned(make(case, seed=6), 2) != steps
    orders = [[step.rows for step in steps if step.epoch == epoch] for epoch in (0, 1)]
    assert orders[0] != orders[1]


@each_case
def test_any_step_can_be_asked_for_first(case):
    expected = planned(make(case), 3)
    for number in (len(expected) - 1, 0, len(expected) // 2):
        assert make(case).step(number) == expected[number]
    plan = make(case)
    assert [plan.step(number) for number in reversed(range(len(expected)))] == expected[::-1]


def test_a_plan_does_not_grow_over_the_epochs():
    plan, sizes = make("easy"), []
    for epoch in range(2, 42):
        plan.step(plan.steps_for(epoch) - 1)
        sizes.append(len(pickle.dumps(plan)))
    assert max(sizes) < 1.1 * sizes[0]


def test_a_few_overlong_records_do_not_empty_the_rows_of_all_others():
    lengths, images = easy_like(1000)
    whole = PackPlan(lengths, images, budgets=(16,), rows=4, row_length=512).capacities
    lengths[::100] = 5000
    assert PackPlan(lengths, images, budgets=(16,), rows=4, row_length=512).capacities == whole


def test_texts_without_image_share_steps_and_are_not_cut():
    lengths, images = easy_like(400)
    lengths[::20], images[::20] = 400, 0
    plan = PackPlan(lengths, images, budgets=(64, 16), rows=4, row_length=512)
    steps = planned(plan, 1)
    apart = [step for step in steps if not step.images]
    assert {record for step in apart for row in step.rows for record in row} == set(range(0, 400, 20))
    assert all(step.text == 512 for step in apart) and 0 < len(apart) <= 6
    assert steps[0] not in apart and any(not a.images and b.images for a, b in itertools.pairwise(steps))  # spread
    assert all(lengths[row].max(initial=0) <= step.text for step in steps for row in step.rows)
    images[:] = 1  # the same lengths with an image each stay together with the others
    assert all(step.images for step in planned(PackPlan(lengths, images, budgets=(16,), rows=4, row_length=512), 1))


def test_budgets_are_the_ones_drawn_for_each_step():
    plan = make("elastic", seed=3)
    drawn = [step.budget for step in planned(plan, 4)]
    assert drawn == [budget_at(3, number, (16, 4, 1)) for number in range(len(drawn))]
    assert set(drawn) == {16, 4, 1}
    assert set(plan.capacities) == {16, 4, 1}


def test_fewer_tokens_an_image_leave_room_for_more_conversations():
    steps = {budget: make("easy", budgets=(budget,)).steps_for(1) for budget in (64, 16, 1)}
    assert steps[64] > steps[16] > steps[1]


def test_steps_for_counts_whole_epochs_and_rounds_a_part_up():
    plan = make("easy")
    one, two = plan.steps_for(1), plan.steps_for(2)
    assert [plan.step(number).epoch for number in range(two)] == [0] * one + [1] * (two - one)
    assert plan.steps_for(0.5) == -(-one // 2)
    assert plan.steps_for(0.001) == 1
    assert plan.steps_for(1.25) == one + -(-(two - one) // 4)
    assert PackPlan(*easy_like(600), budgets=(16,), rows=8, row_length=512).steps_for(1.25) == plan.steps_for(1.25)


@pytest.mark.parametrize("budget", [16, 4])
def test_rows_are_at_least_nine_tenths_full(budget):
    lengths, images = easy_like()
    plan = PackPlan(lengths, images, budgets=(budget,), rows=8, row_length=512)
    live = lengths.sum() + images.sum() * (budget - 1)
    assert live / (plan.steps_for(1) * 8 * 512) >= 0.9


@pytest.mark.parametrize("budget", [144, 36, 1])
def test_rows_of_an_instruction_mixture_are_nineteen_twentieths_full(budget):
    rng, kinds = (
        np.random.default_rng(0),
        [(0.62, 60, 400, 1), (0.24, 100, 600, 1), (0.08, 60, 200, 1), (0.06, 200, 2000, 0)],
    )
    kind = rng.choice(4, 12_000, p=[share for share, *_ in kinds])
    lengths = np.array([rng.integers(kinds[k][1], kinds[k][2] + 1) for k in kind])
    images = np.array([kinds[k][3] for k in kind])
    plan = PackPlan(lengths, images, budgets=(budget,), rows=8, row_length=2048)
    live = lengths.sum() + images.sum() * (budget - 1)
    assert live / (plan.steps_for(1) * 8 * 2048) >= 0.95


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(budgets=(576,), row_length=512), ["data.row_length=512", "1 images of 576 tokens"]),
        (dict(budgets=(16, 576), row_length=512), ["data.row_length=512", "576 tokens"]),
        (dict(budgets=(16,), row_length=128, images_per_row=9), ["data.row_length=128", "9 images of 16 tokens"]),
    ],
)
def test_a_row_that_cannot_hold_its_images(settings, words):
    with pytest.raises(ConfigError) as caught:
        PackPlan(*easy_like(20), rows=2, **settings)
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)


def test_a_record_with_more_images_than_a_row_has_places():
    with pytest.raises(ConfigError, match="data.images_per_row=2, but a record has 3 images"):
        PackPlan(*mixed(), budgets=(16,), rows=2, row_length=512, images_per_row=2)


def test_a_data_set_without_records():
    with pytest.raises(ConfigError, match="no records"):
        PackPlan(np.zeros(0, int), np.zeros(0, int), budgets=(16,), rows=2, row_length=512)

"""The estimates of the plan beside measured steps: the result file is whole, and within what is promised."""

import json

from benchmarks.measure import plan_accuracy


def test_estimates_are_within_a_factor_of_one_and_a_half_of_measured_steps():
    rows = json.loads(plan_accuracy.FILE.read_text())["sizes"]
    sizes = {tuple(row[key] for key in ("width", "layers", "rows", "row_length")): row for row in rows}
    assert set(sizes) == set(plan_accuracy.SIZES)
    for size, row in sizes.items():
        assert 1 / 1.5 < row["estimate"] / row["measured"] < 1.5, size
        assert row["chosen_with"] == (size in plan_accuracy.CHOSEN_WITH)
    assert sum(not row["chosen_with"] for row in rows) >= 2

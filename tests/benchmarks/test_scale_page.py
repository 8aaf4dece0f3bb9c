"""docs/scale.md is what benchmarks/measure/scale.py makes of the result files, to the letter."""

import json

from benchmarks.measure import scale


def test_the_page_is_made_of_the_result_files():
    assert scale.PAGE.read_text() == scale.page()


def test_the_recipes_fit_and_more_chips_take_less_memory_for_as_many_bytes():
    read = lambda config, target: json.loads(scale.file_of(config, target).read_text())["plan"]
    assert all(read(*recipe)["fits"] for recipe in scale.RECIPES)
    plans = [read("finetune_7b", target) for target, _ in scale.SCALING]
    assert [plan["batch"]["rows"] for plan in plans] == [chips * scale.ROWS_A_CHIP for _, chips in scale.SCALING]
    memory = [plan["per_device"]["total_bytes"] for plan in plans]
    moved = [sum(one["bytes"] for one in plan["collectives"]) for plan in plans]
    assert memory == sorted(set(memory), reverse=True) and max(moved) <= 1.1 * min(moved)

"""The search for the fastest setting: what is compiled, what is passed over, and what is to be pasted."""

from deltallava_jax.analysis import best
from deltallava_jax.analysis.best import Bound, Setting
from deltallava_jax.analysis.targets import Target
from deltallava_jax.config import REMAT_LADDER, MeshConfig, override
from tests import tiny

NONE, DOTS, ATTENTION, FULL = REMAT_LADDER
on = lambda policy, accumulation=1, fsdp=4: Setting(4 // fsdp, fsdp, 1, policy, accumulation)


def plan(estimate, used=50, capacity=100):
    memory = dict(program_bytes=used, capacity_bytes=capacity)
    return dict(per_device=memory, step_seconds=dict(estimate=estimate, collectives=0.0), flops_per_step=1)


def search(bounds: dict, plans: dict, tries=9):
    compiled = []

    def compile(setting):
        compiled.append(setting)
        return plans[setting]

    tried, passed = best.search(bounds.items(), compile, 100, tries)
    return [setting for setting, _ in tried], compiled, dict(passed)


def test_settings_are_compiled_by_their_bound_and_sorted_by_their_estimate():
    bounds = {on(DOTS): Bound(2, 10), on(NONE): Bound(1, 10), on(FULL, fsdp=2): Bound(3, 10)}
    plans = {on(NONE): plan(9, used=95), on(DOTS): plan(5), on(FULL, fsdp=2): plan(4)}
    tried, compiled, passed = search(bounds, plans)
    assert compiled == [on(NONE), on(DOTS), on(FULL, fsdp=2)] and passed == {}
    assert tried == [on(FULL, fsdp=2), on(DOTS), on(NONE)]  # the last one leaves less than 8 % free


def test_what_cannot_fit_or_win_is_not_compiled():
    bounds = {
        on(NONE): Bound(1, 93),  # state and saved activations alone leave too little
        on(DOTS): Bound(2, 10),
        on(DOTS, accumulation=2): Bound(2, 5),  # splits a batch that fits whole
        on(FULL): Bound(2.5, 5),  # recomputes more than dots, which fits
        on(FULL, fsdp=2): Bound(3, 5),
        on(FULL, fsdp=1): Bound(5, 5),  # its products alone take as long as the best
    }
    plans = {on(DOTS): plan(6), on(FULL, fsdp=2): plan(5)}
    tried, compiled, passed = search(bounds, plans)
    assert compiled == [on(DOTS), on(FULL, fsdp=2)] and tried == compiled[::-1]
    assert passed == {"memory": 1, "more": 2, "slower": 1}


def test_a_setting_that_needs_more_than_one_that_did_not_fit_is_not_compiled():
    bounds = {on(NONE): Bound(1, 10), on(NONE, fsdp=2): Bound(1, 20), on(NONE, 2): Bound(1, 10), on(DOTS): Bound(2, 9)}
    plans = {on(NONE): plan(4, used=99), on(NONE, 2): plan(4, used=98), on(DOTS): plan(5)}
    tried, compiled, passed = search(bounds, plans)
    assert compiled == [on(NONE), on(NONE, 2), on(DOTS)] and passed == {"memory": 1}


def test_less_memory_is_tried_after_what_did_not_fit_and_tries_are_limited():
    bounds = {on(NONE): Bound(1, 10), on(DOTS): Bound(2, 10), on(FULL): Bound(3, 10)}
    plans = {on(NONE): plan(4, used=99), on(DOTS): plan(5, used=93), on(FULL): plan(6)}
    assert search(bounds, plans)[1] == [on(NONE), on(DOTS), on(FULL)]
    tried, compiled, passed = search(bounds, plans, tries=2)
    assert compiled == [on(NONE), on(DOTS)] and passed == {"left": 1}


def test_a_program_that_the_compiler_refuses_does_not_fit():
    refused = plan(1, used=10) | dict(step_seconds=None)
    tried, *_ = search({on(NONE): Bound(1, 10), on(FULL): Bound(2, 10)}, {on(NONE): refused, on(FULL): plan(9)})
    assert tried == [on(FULL), on(NONE)]


def test_settings_divide_devices_rows_and_heads():
    cfg = tiny.get_config()  # 8 rows, 2 heads
    found = list(best.settings(cfg, 4))
    assert {(s.data, s.fsdp, s.tensor) for s in found} == {(1, 4, 1), (2, 2, 1), (4, 1, 1), (1, 2, 2), (2, 1, 2)}
    assert {s.accumulation for s in found if s.fsdp == 4} == {1, 2} and {s.remat for s in found} == set(REMAT_LADDER)
    assert len(set(found)) == len(found)


def test_overrides_make_the_setting():
    cfg = tiny.get_config()
    for setting in (Setting(1, 2, 2, DOTS, 2), Setting(2, 2, 1, FULL, 1)):
        pasted = dict(part.removeprefix("--config.").split("=") for part in setting.overrides.split())
        assert override(cfg, pasted) == setting.of(cfg)
    assert setting.of(cfg).mesh == MeshConfig(2, 2, 1)


def test_the_search_as_an_object_and_as_text(monkeypatch):
    cfg = tiny.get_config()
    seconds = lambda setting: 1 + REMAT_LADDER.index(setting.remat) + setting.tensor
    monkeypatch.setattr(best, "Bounds", lambda *arguments: lambda setting: Bound(seconds(setting) - 1, 10))
    compiled = []

    def one(cfg, target, text):
        compiled.append((cfg.mesh, cfg.model.remat, text))
        return plan(3.0 + len(compiled), used=99 if cfg.model.remat == NONE else 60)

    monkeypatch.setattr(best.plan, "one", one)
    found = best.measure(cfg, Target("cpu", (4,), memory=100), text=20, tries=5)
    assert len(compiled) == len(found["tried"]) == 5 and found["best"] == found["tried"][0]
    assert found["settings"] == 5 + sum(found["passed_over"].values()) and found["best"]["estimate"] > 3
    assert f"remat={DOTS}" in found["best"]["overrides"]
    text = best.format_best(found)
    assert found["best"]["overrides"] in text.splitlines()[-1] and "5 compiled" in text and "does not fit" in text


def test_a_search_in_which_nothing_fits_says_so(monkeypatch):
    monkeypatch.setattr(best, "Bounds", lambda *arguments: lambda setting: Bound(1, 1000))
    found = best.measure(tiny.get_config(), Target("cpu", (4,), memory=100))
    assert found["best"] is None and not found["tried"] and "none of them fits" in best.format_best(found)

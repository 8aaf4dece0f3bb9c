"""Targets: their names, their devices, and one clear line for an unknown one."""

import pytest

from deltallava_jax.analysis import targets
from deltallava_jax.analysis.targets import Target, parse_target
from deltallava_jax.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "kind", "shape", "count"),
    [
        ("cpu:8", "cpu", (8,), 8),
        ("v5e:4x4", "v5e", (4, 4), 16),
        ("v5p:2x2x2", "v5p", (2, 2, 2), 8),
        ("h100:8", "h100", (8,), 8),
        ("h100:2x8", "h100", (2, 8), 16),
    ],
)
def test_targets_by_name(text, kind, shape, count):
    target = parse_target(text)
    assert (target.kind, target.shape, target.count, str(target)) == (kind, shape, count, text)
    assert target.larger().count == 2 * count and target.larger().kind == kind
    assert parse_target(str(target.larger())) == target.larger()


@pytest.mark.parametrize(
    "text", ["v5e", "v5e:", "v5e:4", "v5p:2x2", "h100:2x8x2", "cpu:0", "b100:8", "h10:8", "v5e:4x4 "]
)
def test_what_is_no_target_is_refused_with_examples(text):
    with pytest.raises(ConfigError, match=r"v5p:2x2x2"):
        parse_target(text)


def test_the_nearest_known_kind_is_named():
    with pytest.raises(ConfigError, match="did you mean 'h100'"):
        parse_target("h10:8")


@pytest.mark.parametrize(("text", "needed"), [("v5e:4x4", "requirements-plan.txt"), ("h100:8", "jax\\[cuda13\\]")])
def test_a_compiler_that_is_missing_is_named(monkeypatch, text, needed):
    monkeypatch.setattr(targets.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=f"{text}: its compiler is not installed; pip install .*{needed}"):
        targets.devices(parse_target(text))


def test_cpu_devices_are_those_of_the_process():
    assert len(targets.devices(Target("cpu", (3,)))) == 3
    with pytest.raises(ConfigError, match="has 8 CPU devices"):
        targets.devices(Target("cpu", (9,)))
    assert Target("cpu", (2,)).capacity == 2 * Target("cpu", (4,)).capacity

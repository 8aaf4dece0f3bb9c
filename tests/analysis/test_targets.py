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
        ("b200:8", "b200", (8,), 8),
        ("rtx4090:1", "rtx4090", (1,), 1),
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


def test_memory_replaces_that_of_the_chip_and_stays_with_larger_slices():
    target = parse_target("a100:8", 40)
    assert target.capacity == 40 * 2**30 == target.larger().capacity and str(target) == "a100:8"
    assert parse_target("a100:8").capacity == pytest.approx(0.95 * 79.15 * 2**30, rel=1e-3)
    with pytest.raises(ConfigError, match="--memory -2: expected GiB"):
        parse_target("a100:8", -2)


@pytest.mark.parametrize("chip", [chip for chip in targets.CHIPS.values() if chip.gpu], ids=lambda chip: chip.name)
def test_gpus_are_described_to_the_compiler_and_known_by_their_kind(chip):
    text = targets.description(chip)
    assert "$" not in text and f"memory_bandwidth: {int(chip.bandwidth)}\n" in text
    assert f'device_description_str: "{chip.gpu.name}"' in text
    assert targets.peak_flops(chip.gpu.name) == chip.peak_flops > chip.float32_flops > 0


def test_every_chip_has_a_memory_that_feeds_its_products():
    for chip in targets.CHIPS.values():
        assert 100 < chip.peak_flops / chip.bandwidth < 700, chip.name  # operations a byte


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA H200", 989.4e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12), ("NVIDIA GeForce RTX 4090 D", None), ("NVIDIA GeForce RTX 3090", None),
    ],
)  # fmt: skip
def test_peaks_by_the_kind_of_device(kind, peak):
    assert targets.peak_flops(kind) == peak

"""The probe of this machine's CPU."""

from deltallava_jax.analysis import probe
from deltallava_jax.analysis.targets import Chip


def test_rates_of_a_cpu_and_of_its_shares(monkeypatch):
    monkeypatch.setattr(probe, "SIDE", 256)
    monkeypatch.setattr(probe, "COPIED", 2**20)
    chip = probe.measure()
    assert isinstance(chip, Chip)
    # From a slow core to a large server.
    assert 1e8 < chip.float32_flops < 1e14 and 1e8 < chip.bandwidth < 1e13 and chip.peak_flops > 1e7


def test_devices_share_what_is_measured_and_the_fastest_repeat_counts(monkeypatch):
    monkeypatch.setattr(probe, "SIDE", 8)
    monkeypatch.setattr(probe, "COPIED", 16)
    seconds = iter([x for call in range(6) for slow in (9, 2, 4, 5, 7) for x in (100 * call, 100 * call + slow)])
    clock = lambda: next(seconds)  # of three calls for each of two machines: all have a fastest repeat of 2 s
    one, four = probe.measure(1, clock), probe.measure(4, clock)
    assert one.float32_flops == 2 * 8**3 / 2 and one.bandwidth == probe.TIMES * 2 * 4 * 16 / 2
    assert four.float32_flops == one.float32_flops / 4 and four.bandwidth == one.bandwidth / 4

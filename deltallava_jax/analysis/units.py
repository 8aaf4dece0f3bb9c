"""Readable quantities: three digits with a fitting unit."""

from __future__ import annotations


def size(count: float) -> str:
    """Bytes: "1.50 GiB"."""
    return _scaled(count, 1024, ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB"))


def operations(count: float) -> str:
    """Floating point operations: "12.3 GFLOP"."""
    return _scaled(count, 1000, ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP"))


def seconds(value: float) -> str:
    """A time: "4.56 ms"; one second and more in seconds."""
    if value >= 1:
        return _scaled(value, 1e9, ("s", "s"))
    return _scaled(1e9 * value, 1000, ("ns", "µs", "ms", "s"))


def _scaled(value: float, base: float, units: tuple[str, ...]) -> str:
    place = 0
    while place < len(units) - 1 and round(value) >= base:
        value /= base
        place += 1
    digits = 0 if value == int(value) and place == 0 or value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{value:,.{digits}f} {units[place]}"

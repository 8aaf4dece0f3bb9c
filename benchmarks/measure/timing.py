"""Seconds of calls that take turns, and the device that they run on."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

LIBRARIES = ("jax", "jaxlib", "torch", "libtpu", "jax-cuda13-plugin")  # what a kernel's speed depends on


def alternate(calls: dict[str, Callable], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call in every round. They alternate, so that they share what else the machine does."""
    seconds = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            if number:  # the first compiles
                seconds[name].append(time.perf_counter() - began)
    return seconds


def best(calls: dict[str, Callable], rounds: int) -> dict[str, float]:
    """The shortest seconds of each call."""
    return {name: min(values) for name, values in alternate(calls, rounds).items()}


def device() -> tuple[str, str]:
    """(platform, kind)."""
    import jax

    found = jax.devices()[0]
    return found.platform, found.device_kind


def two_threads() -> None:
    """To be called before jax and torch are imported."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])

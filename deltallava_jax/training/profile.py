"""A profiler trace of some steps, for TensorBoard's profile tab, XProf or Perfetto."""

from __future__ import annotations

from pathlib import Path

import jax

from deltallava_jax.errors import ConfigError
from deltallava_jax.parallel import hosts


def parse_steps(text: str) -> tuple[int, int]:
    """(N, M) of "N:M". Raises ConfigError."""
    first, colon, last = text.partition(":")
    if not (colon and first.isdigit() and last.isdigit() and 1 <= int(first) <= int(last)):
        raise ConfigError(f"--profile {text}: expected N:M, the first and last step to trace, e.g. 20:24")
    return int(first), int(last)


class Trace:
    """Traces the steps N to M of this run, in the leading process, into a folder."""

    def __init__(self, steps: tuple[int, int] | None, folder: Path):
        self._steps = steps if hosts.leads() else None
        self._folder = folder
        self._running = False

    def before(self, step: int) -> None:
        if self._steps and self._steps[0] <= step <= self._steps[1] and not self._running:
            jax.profiler.start_trace(self._folder)
            self._running = True

    def after(self, step: int, values: dict) -> str | None:
        """Ends the trace at its last step, once that step's ``values`` are computed; returns a line to log, or None."""
        if not self._running or step < self._steps[1]:
            return None
        jax.block_until_ready(values)
        self.close()
        return f"trace of steps {self._steps[0]} to {step}: {self._folder}"

    def close(self) -> None:
        if self._running:
            jax.profiler.stop_trace()
            self._running = False

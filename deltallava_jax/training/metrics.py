"""What a run tells: a progress line, metrics.jsonl (one line a step), TensorBoard files. One process tells."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
from tqdm import tqdm

from deltallava_jax.errors import NonFiniteLoss
from deltallava_jax.parallel import hosts
from deltallava_jax.workdir import Workdir

GIB = 2**30


def host_memory() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Metrics:
    """Takes each step's device values without waiting for them: a step is written when the next one is pushed.

    seen(step, values) is called for each step that is written, on all processes; only the leading one writes and
    prints. peak: operations a second that one of the devices can do, for the MFU. After a restart the records of steps
    that are trained again are cut from metrics.jsonl."""

    def __init__(
        self,
        workdir: Path,
        start: int,
        steps: int,
        log_every: int,
        *,
        seen: Callable[[int, dict], None] | None = None,
        peak: float | None = None,
    ):
        self._leads, self._log_every, self._seen, self._peak = hosts.leads(), max(log_every, 1), seen, peak
        if self._leads:
            from tensorboardX import SummaryWriter

            path = Workdir(workdir).metrics
            _cut(path, start)
            self._file = path.open("a")
            self._board = SummaryWriter(str(Workdir(workdir).tensorboard), purge_step=start + 1)
        else:
            self._file = open(os.devnull, "w")
            self._board = None
        interval = 0.5 if sys.stderr.isatty() else 15.0
        self._bar = tqdm(
            total=steps, initial=start, unit="step", mininterval=interval, dynamic_ncols=True, disable=not self._leads
        )
        self._pending: tuple[int, dict, float] | None = None
        self.restart_clock()

    def push(self, step: int, values: dict, operations: float = 0.0) -> None:
        """Queues a step's values, and the operations that it needs, and writes the step before. Raises NonFiniteLoss
        for that one."""
        self.flush()
        self._pending = (step, values, operations)

    def flush(self) -> None:
        """Writes the queued step, waiting for its values. Raises NonFiniteLoss."""
        if self._pending is None:
            return
        (step, values, operations), self._pending = self._pending, None
        values = {name: value.item() for name, value in jax.device_get(values).items()}
        if not values.pop("finite"):
            raise NonFiniteLoss(f"loss {values['loss']}, gradient norm {values['grad_norm']} at step {step}", step)
        self._tokens, self._images = self._tokens + values["tokens"], self._images + values["images"]
        self._steps, self._operations = self._steps + 1, self._operations + operations
        told = step % self._log_every == 0
        rates = self._rates() if told else {}
        self._file.write(json.dumps({"step": step, **values, **rates}) + "\n")
        self._file.flush()
        if self._seen is not None:
            self._seen(step, values)
        self._bar.update(1)
        if told:
            self._bar.set_postfix_str(
                f"loss {values['loss']:.4f}, {rates['tokens_per_second']:,.0f} tokens/s, "
                f"{rates['images_per_second']:,.1f} images/s",
                refresh=False,
            )
            self.scalars(step, {**values, **rates})
            self.restart_clock()

    def _rates(self) -> dict[str, float]:
        """Speed since the last report; memory in GiB: of this process now, and where the device tells, the most that
        was taken on its first device. docs/clusters.md has the formulas."""
        elapsed, devices = time.monotonic() - self._since, jax.device_count()
        rates = {
            "seconds_per_step": elapsed / self._steps,
            "tokens_per_second": self._tokens / elapsed,
            "tokens_per_second_per_device": self._tokens / elapsed / devices,
            "images_per_second": self._images / elapsed,
            "host_memory": host_memory() / GIB,
        }
        if self._operations:
            rates["teraflops_per_second_per_device"] = self._operations / elapsed / devices / 1e12
            if self._peak is not None:
                rates["mfu"] = self._operations / elapsed / devices / self._peak
        device = jax.local_devices()[0].memory_stats() or {}
        if "peak_bytes_in_use" in device:
            rates["device_memory"] = device["peak_bytes_in_use"] / GIB
        return rates

    def scalars(self, step: int, values: dict[str, float], group: str = "train") -> None:
        """Adds scalars to the TensorBoard files."""
        for name, value in values.items() if self._board else ():
            if math.isfinite(value):
                self._board.add_scalar(f"{group}/{name}", value, step)

    def restart_clock(self) -> None:
        """Leaves the time since the last report (compiling, evaluating, saving) out of the rates."""
        self._steps = self._tokens = self._images = self._operations = 0
        self._since = time.monotonic()

    def say(self, line: str) -> None:
        """A line above the progress bar."""
        if self._leads:
            self._bar.write(line, file=sys.stderr)

    def close(self) -> None:
        self._bar.close()
        with contextlib.suppress(OSError):  # a full disk: what is lost is of steps after the last checkpoint
            self._file.close()
            if self._board is not None:
                self._board.close()


def _cut(path: Path, last: int) -> None:
    """Cuts off the lines after step ``last``; what stays is not written again."""
    if not path.exists():
        return
    length = 0
    with path.open("rb+") as file:
        for line in file:
            if _step_of(line) > last:
                break
            length += len(line)
        file.truncate(length)


def _step_of(line: bytes) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):  # a line cut short by a kill
        return math.inf

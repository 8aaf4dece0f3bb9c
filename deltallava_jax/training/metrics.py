"""A run's progress, metrics.jsonl (a line for each step or evaluation) and TensorBoard files, by one process."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import jax

from deltallava_jax.errors import NonFiniteLoss
from deltallava_jax.parallel import hosts
from deltallava_jax.progress import progress_bar
from deltallava_jax.workdir import Workdir

GIB = 2**30


def host_memory() -> int:
    """Resident memory of this process in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Metrics:
    """Takes each step's device values without waiting for them: a step is written when the next one is pushed.

    on_step(step, values) is called for each step that is written, on all processes; only the leading one writes and
    prints. peak: operations per second of one device, for the MFU. budgets: those that the steps alternate between;
    TensorBoard gets a curve of each. On resume, the lines of steps that are trained again are cut from
    metrics.jsonl."""

    def __init__(
        self,
        workdir: Path,
        start: int,
        steps: int,
        log_every: int,
        *,
        on_step: Callable[[int, dict], None] | None = None,
        peak: float | None = None,
        budgets: Sequence[int] = (),
    ):
        self._budgets = budgets
        self._leads = hosts.leads()
        self._log_every = max(log_every, 1)
        self._on_step = on_step
        self._peak = peak
        if self._leads:
            from tensorboardX import SummaryWriter

            path = Workdir(workdir).metrics
            _cut(path, start)
            self._file = path.open("a")
            self._board = SummaryWriter(str(Workdir(workdir).tensorboard), purge_step=start + 1)
        else:
            self._file = open(os.devnull, "w")
            self._board = None
        self._bar = progress_bar(what="training", total=steps, start=start, unit="steps", shown=self._leads, keep=True)
        self._pending: tuple[int, dict, dict, float] | None = None
        self.restart_clock()

    def push(
        self, step: int, values: dict, operations: float = 0.0, *, epoch: float = 0.0, budget: int | None = None
    ) -> None:
        """Queues a step's values and operations, and writes the previous step. Raises NonFiniteLoss for that one.

        epoch: epochs completed with this step. budget: visual tokens per image; None where a step trains all
        budgets."""
        self.flush()
        labels = {"epoch": round(epoch, 6)} | ({} if budget is None else {"budget": budget})
        self._pending = (step, values, labels, operations)

    def flush(self) -> None:
        """Writes the queued step, waiting for its values. Raises NonFiniteLoss."""
        if self._pending is None:
            return
        step, values, labels, operations = self._pending
        self._pending = None
        values = {name: value.item() for name, value in jax.device_get(values).items()}
        if not values.pop("finite"):
            raise NonFiniteLoss(f"loss {values['loss']}, gradient norm {values['grad_norm']} at step {step}", step)
        self._steps += 1
        self._tokens += values["tokens"]
        self._images += values["images"]
        self._operations += operations
        due = step % self._log_every == 0
        rates = self._rates() if due else {}
        self._write(step, {**labels, **values, **rates})
        if self._on_step is not None:
            self._on_step(step, values)
        if due:
            self._bar.set_postfix_str(
                f"loss {values['loss']:.4f}, {rates['tokens_per_second']:,.0f} tokens/s, "
                f"{rates['images_per_second']:,.1f} images/s",
                refresh=False,
            )
            self.scalars(step, {**values, **rates})
            if len(self._budgets) > 1:
                self.scalars(step, {f"loss_{labels['budget']}": values["loss"]})
            self.restart_clock()
        self._bar.update(1)

    def log_evaluation(self, step: int, values: dict[str, float]) -> None:
        """Writes the results of an evaluation after a step, by name."""
        self._write(step, {"evaluation": values})
        self.scalars(step, values, "eval")

    def _write(self, step: int, values: dict) -> None:
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        self._file.write(json.dumps({"step": step, "time": now, **values}) + "\n")
        self._file.flush()

    def _rates(self) -> dict[str, float]:
        """Speed since the last report, and memory in GiB: of this process now, and the peak of its first device where
        the device reports it. docs/clusters.md has the formulas."""
        elapsed = time.monotonic() - self._since
        devices = jax.device_count()
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
        if self._board is None:
            return
        for name, value in values.items():
            if math.isfinite(value):
                self._board.add_scalar(f"{group}/{name}", value, step)

    def restart_clock(self) -> None:
        """Excludes the time since the last report (compiling, evaluating, saving) from the rates."""
        self._steps = self._tokens = self._images = self._operations = 0
        self._since = time.monotonic()

    def log(self, line: str) -> None:
        """Prints a line above the progress bar."""
        if self._leads:
            self._bar.write(line, file=sys.stderr)

    def close(self) -> None:
        self._bar.close()
        with contextlib.suppress(OSError):  # a full disk loses only steps after the last checkpoint
            self._file.close()
            if self._board is not None:
                self._board.close()


def _cut(path: Path, last: int) -> None:
    """Truncates the file after the lines of step ``last``."""
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

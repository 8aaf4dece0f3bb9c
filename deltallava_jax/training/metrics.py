"""What a run tells: a progress line, metrics.jsonl (one line a step), TensorBoard files."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path

import jax
from tqdm import tqdm


class NonFiniteLoss(RuntimeError):
    """The loss or a gradient is NaN or infinite at ``step``."""

    def __init__(self, message: str, step: int):
        super().__init__(message)
        self.step = step


class Metrics:
    """Takes each step's device values without waiting for them: a step is written when the next one is pushed.

    After a restart the records of steps that are trained again are cut from metrics.jsonl."""

    def __init__(self, workdir: Path, start: int, steps: int, log_every: int):
        from tensorboardX import SummaryWriter

        self._path, self._log_every = workdir / "metrics.jsonl", max(log_every, 1)
        kept = []
        if self._path.exists():
            kept = [line for line in self._path.read_text().splitlines(True) if _step_of(line) <= start]
        self._file = self._path.open("w")
        self._file.writelines(kept)
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=start + 1)
        interval = 0.5 if sys.stderr.isatty() else 15.0
        self._bar = tqdm(total=steps, initial=start, unit="step", mininterval=interval, dynamic_ncols=True)
        self._pending: tuple[int, dict] | None = None
        self._tokens = self._images = 0
        self._since = time.monotonic()

    def push(self, step: int, values: dict) -> None:
        """Queues a step's values and writes the step before. Raises NonFiniteLoss for that one."""
        self.flush()
        self._pending = (step, values)

    def flush(self) -> None:
        """Writes the queued step, waiting for its values. Raises NonFiniteLoss."""
        if self._pending is None:
            return
        (step, values), self._pending = self._pending, None
        values = {name: value.item() for name, value in jax.device_get(values).items()}
        if not values.pop("finite"):
            raise NonFiniteLoss(f"loss {values['loss']}, gradient norm {values['grad_norm']} at step {step}", step)
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        self._tokens, self._images = self._tokens + values["tokens"], self._images + values["images"]
        self._bar.update(1)
        if step % self._log_every == 0:
            elapsed = time.monotonic() - self._since
            rates = {"tokens_per_second": self._tokens / elapsed, "images_per_second": self._images / elapsed}
            self._bar.set_postfix_str(
                f"loss {values['loss']:.4f}, {rates['tokens_per_second']:,.0f} tokens/s, "
                f"{rates['images_per_second']:,.1f} images/s",
                refresh=False,
            )
            self.scalars(step, {**values, **rates})
            self.restart_clock()

    def scalars(self, step: int, values: dict[str, float], group: str = "train") -> None:
        """Adds scalars to the TensorBoard files."""
        for name, value in values.items():
            if math.isfinite(value):
                self._board.add_scalar(f"{group}/{name}", value, step)

    def restart_clock(self) -> None:
        """Leaves the time since the last report (compiling, evaluating, saving) out of the rates."""
        self._tokens = self._images = 0
        self._since = time.monotonic()

    def say(self, line: str) -> None:
        """A line above the progress bar."""
        self._bar.write(line, file=sys.stderr)

    def close(self) -> None:
        self._bar.close()
        self._file.close()
        self._board.close()


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):  # a line cut short by a kill
        return math.inf

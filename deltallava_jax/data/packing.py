"""The pack plan: which conversations share a row, known before any of them is read.

From the token lengths and image counts of all records, (seed, epoch, budgets) determine every batch as rows of record
ids. A batch is therefore random access by its step number, the data iterator's whole state is one integer, and any
number of processes agrees on the plan without talking.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from deltallava_jax.config import ConfigError
from deltallava_jax.sequence import budget_at

LOOKAHEAD = 16  # records set aside for the next batch before this one counts as full


@dataclass(frozen=True)
class Step:
    """One batch of the plan: record ids of each row, and the budget its rows were filled for."""

    epoch: int
    budget: int
    rows: list[list[int]]


class PackPlan:
    """Fills rows of S slots: sum of text lengths <= T, images <= I, T + I * (V - 1) = S for the step's budget V."""

    def __init__(
        self,
        lengths: np.ndarray,
        images: np.ndarray,
        *,
        budgets: tuple[int, ...],
        rows: int,
        row_length: int,
        images_per_row: int = 0,
        seed: int = 0,
    ):
        """lengths: text tokens of each record with one placeholder an image; images: image count of each record.

        Raises ConfigError if a row of ``row_length`` cannot hold the images."""
        if not len(lengths):
            raise ConfigError("the data set has no records")
        self.lengths, self.images = np.asarray(lengths), np.asarray(images)
        self.budgets, self.rows, self.row_length, self.seed = budgets, rows, row_length, seed
        self.capacities = {budget: self._capacity(budget, images_per_row) for budget in budgets}
        self._epochs: list[list[Step]] = []
        self._starts = [0]

    def _capacity(self, budget: int, images_per_row: int) -> tuple[int, int]:
        """(T, I): I from the data's mean text per image unless given, leaving room for the longest record."""
        most, total = int(self.images.max()), int(self.images.sum())
        if total == 0:
            return self.row_length, 0
        mean = max(self.lengths.sum() / total, 1.0)
        wanted = images_per_row
        if not wanted:  # the number of images that fills rows of average records best
            room = (self.row_length - int(self.lengths.max())) // max(budget - 1, 1)
            candidates = range(most, max(most, min(room, self.row_length)) + 1)
            wanted = max(candidates, key=lambda count: min(count, (self.row_length - count * (budget - 1)) / mean))
        text = self.row_length - wanted * (budget - 1)
        if text < 2 or wanted < most:
            raise ConfigError(
                f"data.row_length={self.row_length} cannot hold {max(wanted, most)} images of {budget} tokens and text"
            )
        return text, wanted

    def _plan_epoch(self, epoch: int, first_step: int) -> list[Step]:
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self.lengths))
        waiting, taken, steps = [], 0, []
        while waiting or taken < len(order):
            budget = budget_at(self.seed, first_step + len(steps), self.budgets)
            text, images = self.capacities[budget]
            text_left, images_left = np.full(self.rows, text), np.full(self.rows, images)
            rows: list[list[int]] = [[] for _ in range(self.rows)]
            candidates, waiting = waiting, []
            while len(waiting) < LOOKAHEAD:
                if candidates:
                    record = candidates.pop(0)
                elif taken < len(order):
                    record, taken = int(order[taken]), taken + 1
                else:
                    break
                length = min(int(self.lengths[record]), text)
                fits = (text_left >= length) & (images_left >= self.images[record])
                if not fits.any():
                    waiting.append(record)
                    continue
                row = int(np.where(fits, text_left, text + 1).argmin())  # the fullest row that still has room
                rows[row].append(record)
                text_left[row] -= length
                images_left[row] -= self.images[record]
            steps.append(Step(epoch, budget, rows))
        return steps

    def _reach(self, *, epoch: int | None = None, step: int | None = None) -> None:
        while (epoch is not None and len(self._epochs) <= epoch) or (step is not None and self._starts[-1] <= step):
            planned = self._plan_epoch(len(self._epochs), self._starts[-1])
            self._epochs.append(planned)
            self._starts.append(self._starts[-1] + len(planned))

    def step(self, number: int) -> Step:
        """The batch of a step, counted from 0 over all epochs."""
        self._reach(step=number)
        epoch = int(np.searchsorted(self._starts, number, side="right")) - 1
        return self._epochs[epoch][number - self._starts[epoch]]

    def steps_for(self, epochs: float) -> int:
        """Steps that ``epochs`` epochs take, a fraction of the last one rounded up."""
        whole = int(epochs)
        self._reach(epoch=int(np.ceil(epochs)) - 1)
        part = int(np.ceil((epochs - whole) * len(self._epochs[whole]) - 1e-9)) if epochs > whole else 0
        return self._starts[whole] + part

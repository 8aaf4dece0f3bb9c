"""The plan of all batches: which conversations share a batch and a row, fixed before any record is read.

Given the token lengths and image counts of all records, (seed, epoch, budgets) determine every batch as rows of record
ids. Batches are therefore random access by step number, the data iterator's whole state is one integer, and any number
of processes agree on the plan without communicating.
"""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass

import numpy as np

from deltallava_jax.config import DataConfig
from deltallava_jax.errors import BadSample, ConfigError, TooManyFaults, count_faults
from deltallava_jax.sequence import budget_at

PLANNING = threading.Lock()  # the training loop and the prefetching thread share a plan


@dataclass(frozen=True)
class Step:
    """One batch of the plan: the record ids of each row, the budget that its rows were filled for, and their T and
    I."""

    epoch: int
    budget: int
    rows: list[list[int]]
    text: int
    images: int


class Plan:
    """The base of all plans: the steps of all epochs, one after the other.

    faults: the errors of the records that are left out, by index; records: the indices of all others. notes: the number
    of repairs of each kind of conversation.NOTES."""

    def __init__(
        self,
        lengths: np.ndarray,
        images: np.ndarray,
        budgets: tuple[int, ...],
        rows: int,
        row_length: int,
        seed: int,
        faults: dict[int, BadSample],
    ):
        if not len(lengths):
            raise ConfigError("the data set has no records")
        self.lengths = np.asarray(lengths)
        self.images = np.asarray(images)
        self.budgets = budgets
        self.rows = rows
        self.row_length = row_length
        self.seed = seed
        self.faults: dict[int, BadSample] = {}
        self.notes: Counter[str] = Counter()
        self._starts = [0]  # the first step of every planned epoch, and of the next
        self._recent: dict[int, list[Step]] = {}  # two epochs at most; earlier ones are planned again on demand
        self.leave_out(faults)

    def leave_out(self, faults: dict[int, BadSample]) -> None:
        """Also leaves out these records; to be called before ``step``. Raises TooManyFaults if no record remains."""
        self.faults |= faults
        self.records = np.delete(np.arange(len(self.lengths)), sorted(self.faults))
        if not len(self.records):
            counts = count_faults(error.kind for error in self.faults.values())
            first = self.faults[min(self.faults)]
            raise TooManyFaults(f"none of the {len(self.lengths):,} records is usable: {counts}; the first: {first}")

    @property
    def text_capacity(self) -> np.ndarray:
        """[records] The most text tokens of each record that fit a row, whatever its step's budget."""
        raise NotImplementedError

    @property
    def cut(self) -> int:
        """The number of records that are longer than that."""
        return int((self.lengths > self.text_capacity)[self.records].sum())

    def _plan_epoch(self, epoch: int, first_step: int) -> list[Step]:
        raise NotImplementedError

    def _epoch(self, epoch: int) -> list[Step]:
        if epoch not in self._recent:
            for older in list(self._recent)[:-1]:
                del self._recent[older]
            self._recent[epoch] = self._plan_epoch(epoch, self._starts[epoch])
        return self._recent[epoch]

    def _reach(self, *, epoch: int = -1, step: int = -1) -> None:
        while len(self._starts) - 1 <= epoch or self._starts[-1] <= step:
            planned = self._epoch(len(self._starts) - 1)
            self._starts.append(self._starts[-1] + len(planned))

    def step(self, number: int) -> Step:
        """The batch of a step, counted from 0 over all epochs."""
        with PLANNING:
            self._reach(step=number)
            epoch = int(np.searchsorted(self._starts, number, side="right")) - 1
            return self._epoch(epoch)[number - self._starts[epoch]]

    def epochs_at(self, steps: int) -> float:
        """Epochs completed after ``steps`` steps, at least one."""
        with PLANNING:
            self._reach(step=steps - 1)
            epoch = int(np.searchsorted(self._starts, steps - 1, side="right")) - 1
            first, end = self._starts[epoch : epoch + 2]
        return epoch + (steps - first) / (end - first)

    def steps_for(self, epochs: float) -> int:
        """Steps in ``epochs`` epochs, a fraction of the last one rounded up."""
        whole = int(epochs)
        with PLANNING:
            self._reach(epoch=int(np.ceil(epochs)) - 1)
        if epochs == whole:
            return self._starts[whole]
        return self._starts[whole] + int(np.ceil((epochs - whole) * np.diff(self._starts)[whole] - 1e-9))


# How PackPlan plans, in three steps:
#   1. Once for each budget, choose the images I of a row, which leave T = S - I * (V - 1) text tokens (_capacity): try
#      counts around the average row's, and take the least that fills the rows of a sample nearly best.
#   2. For each epoch, shuffle the records and draw them in that order, through a pool of the oldest that are not yet in
#      a row (_plan_epoch, _fill).
#   3. For each row, take the oldest of the pool until the row is nearly full, then the records closest to an even share
#      of the rest, until none fits (_choose).

# The image counts tried, relative to the average row's. Measured, like the constants below, on lengths like easy-VQA's
# and LLaVA's: a wider range changes nothing; without the highest, 3% more of the tokens are padding.
COUNTS_TRIED = np.arange(-2, 2)
# The share of a row's tokens given up to padding for fewer images: each costs a tower pass, used or not.
FILL_TOLERANCE = 0.005
# The share of the records with an image that fit a row untruncated. Fitting the longest 0.1% too would leave space for
# few images in every row.
UNTRUNCATED = 0.999
# Records on which the counts are tried: four times as many give the same counts and take three times as long.
SAMPLE = 4096
# Records that a row is filled from. Fewer leave the end of a row empty more often; twice as many fill no better, and
# delay records longer.
POOL = 256
# The oldest records are taken while the row has space for this many average records after them. With 1 the last record
# has to fit what the oldest happen to leave, with 2 more of a row goes by fit alone: both leave 0.5% more padding.
SPACE_AFTER_OLDEST = 1.5


class PackPlan(Plan):
    """Fills rows of S tokens: sum of text lengths <= T, images <= I, T + I * (V - 1) = S for the step's budget V.

    If some records have images, those without share separate steps with T = S and I = 0: they are not truncated at the
    shorter T and skip the tower."""

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
        faults: dict[int, BadSample] = {},
    ):
        """lengths: text tokens of each record, with one placeholder per image; images: image count of each record.

        Raises ConfigError if a row of ``row_length`` cannot hold the images."""
        super().__init__(lengths, images, budgets, rows, row_length, seed, faults)
        self._apart = (self.images == 0) & (self.lengths > 0) & self.images[self.records].any()
        self.capacities = {budget: self._capacity(budget, images_per_row) for budget in budgets}

    @property
    def text_capacity(self) -> np.ndarray:
        return np.where(self._apart, self.row_length, min(text for text, _ in self.capacities.values()))

    def _capacity(self, budget: int, images_per_row: int) -> tuple[int, int]:
        """(T, I) of a row. images_per_row: I; 0 to choose it."""
        most = int(self.images[self.records].max())
        if most == 0:
            return self.row_length, 0
        count = images_per_row or self._images_per_row(budget, most)
        if count < most:
            raise ConfigError(f"data.images_per_row={count}, but a record has {most} images; expected {most} or more")
        return require_text_capacity(self.row_length, count, budget), count

    def _images_per_row(self, budget: int, most: int) -> int:
        """The least I, ``most`` or more, that fills rows of a sample nearly best and leaves enough text tokens for
        nearly every record with an image."""
        lengths = self.lengths[self.records]
        images = self.images[self.records]
        fit = (images > 0) & (lengths <= self.row_length - most * (budget - 1))  # the others are truncated anyway
        longest = int(np.quantile(lengths[fit], UNTRUNCATED)) if fit.any() else self.row_length
        beside_longest = (self.row_length - longest) // max(budget - 1, 1)
        text_per_image = lengths[fit].sum() / max(images[fit].sum(), 1)
        average = self.row_length / max(text_per_image + budget - 1, 1)
        highest = max(most, min(beside_longest, self.row_length))
        counts = np.unique(np.clip(COUNTS_TRIED + round(average), most, highest))
        fills = np.array([self._fill_of_sample(budget, int(count)) for count in counts])
        nearly_best = fills >= fills.max() - FILL_TOLERANCE
        return int(counts[np.argmax(nearly_best)])

    def _fill_of_sample(self, budget: int, images: int) -> float:
        """The share of tokens that are not padding, in rows of a sample with I = ``images``."""
        text = self.row_length - images * (budget - 1)
        if text < 2:
            return 0.0
        order = np.random.default_rng(0).permutation(self.records[~self._apart[self.records]])[:SAMPLE]
        tokens = np.minimum(self.lengths[order], text).sum() + self.images[order].sum() * (budget - 1)
        filled = 0
        pool = order[:0]
        while len(order) or len(pool):
            rows, pool, order = self._fill(pool, order, text, images)
            filled += sum(bool(row) for row in rows)
        return tokens / max(filled * self.row_length, 1)

    def _plan_epoch(self, epoch: int, first_step: int) -> list[Step]:
        order = np.random.default_rng((self.seed, epoch)).permutation(self.records)
        together = order[~self._apart[order]]
        apart = order[self._apart[order]]
        text_batches = []
        pool = order[:0]
        while len(apart) or len(pool):
            rows, pool, apart = self._fill(pool, apart, self.row_length, 0)
            text_batches.append(rows)
        # Spread over the epoch, whose length is estimated: one after every ``every`` others.
        every = int(self.lengths[together].sum() / max(len(text_batches), 1) / (self.rows * self.row_length)) + 1
        steps = []
        pool = order[:0]
        while len(together) or len(pool) or text_batches:
            budget = budget_at(self.seed, first_step + len(steps), self.budgets)
            due = (len(steps) + 1) % (every + 1) == 0
            only_text_left = not (len(together) or len(pool))
            if text_batches and (due or only_text_left):
                steps.append(Step(epoch, budget, text_batches.pop(0), self.row_length, 0))
                continue
            text, images = self.capacities[budget]
            rows, pool, together = self._fill(pool, together, text, images)
            steps.append(Step(epoch, budget, rows, text, images))
        return steps

    def _fill(
        self, pool: np.ndarray, order: np.ndarray, text: int, images: int
    ) -> tuple[list[list[int]], np.ndarray, np.ndarray]:
        """(rows of a batch, the pool of records left for the next batch, the rest of the order)."""
        rows = []
        for _ in range(self.rows):
            free = POOL - len(pool)
            pool = np.concatenate([pool, order[:free]])
            order = order[free:]
            chosen = self._choose(np.minimum(self.lengths[pool], text), self.images[pool], text, images)
            rows.append(pool[chosen].tolist())
            pool = np.delete(pool, chosen)
        return rows, pool, order

    def _choose(self, lengths: np.ndarray, images: np.ndarray, text: int, capacity: int) -> list[int]:
        """The records, ordered from the oldest, that fill a row of ``text`` text tokens and ``capacity`` images."""
        if not len(lengths):
            return []
        units = np.maximum(images, 1)  # one per image, and one for a record without images
        mean = max(lengths.sum() / max(units.sum(), 1), 1.0)  # text tokens per unit

        # The oldest, while there is space for more after them; the first always.
        text_left = text - np.cumsum(lengths)
        images_left = capacity - np.cumsum(images)
        units_left = np.minimum(text_left / mean, images_left if capacity else np.inf)
        oldest = max(int((units_left >= SPACE_AFTER_OLDEST).cumprod().sum()), 1)
        chosen = list(range(oldest))
        text = text_left[oldest - 1]
        capacity = images_left[oldest - 1]

        # Then, of those that fit, the one closest to an even share of the text tokens that are left.
        free = np.arange(len(lengths)) >= oldest
        while True:
            fits = free & (lengths <= text) & (images <= capacity)
            if not fits.any():
                return chosen
            count = max(round(min(text / mean, capacity or np.inf)), 1)
            share = text / count * units
            record = int(np.where(fits, np.abs(lengths - share), np.inf).argmin())
            chosen.append(record)
            free[record] = False
            text -= lengths[record]
            capacity -= images[record]


# Text lengths of padded batches are multiples of this, so that few programs are compiled; it costs half of it in
# padding per row on average.
BUCKET = 256


class GroupedPlan(Plan):
    """LLaVA-1.5's batches: one conversation per row, padded to the longest; either all rows have images or none has,
    so that batches of text skip the tower; longer rows first (haotian-liu/LLaVA, llava/train/llava_trainer.py)."""

    def __init__(
        self,
        lengths: np.ndarray,
        images: np.ndarray,
        *,
        budgets: tuple[int, ...],
        rows: int,
        row_length: int,
        seed: int = 0,
        faults: dict[int, BadSample] = {},
    ):
        """As PackPlan; ``row_length``: the most tokens of a row. Raises ConfigError if it cannot hold the images."""
        super().__init__(lengths, images, budgets, rows, row_length, seed, faults)
        self._least = require_text_capacity(row_length, int(self.images[self.records].max()), max(budgets))

    @property
    def text_capacity(self) -> np.ndarray:
        return np.full(len(self.lengths), self._least)

    def _plan_epoch(self, epoch: int, first_step: int) -> list[Step]:
        rng = np.random.default_rng((self.seed, epoch))
        whole = []
        rest = []
        has_image = self.images[self.records] > 0
        for group in (self.records[has_image], self.records[~has_image]):
            group = rng.permutation(group)
            end = len(group) // self.rows * self.rows
            whole += list(group[:end].reshape(-1, self.rows))
            rest.append(group[end:])
        rest = np.concatenate(rest)
        batches = [whole[index] for index in rng.permutation(len(whole))]
        batches += [rest[start : start + self.rows] for start in range(0, len(rest), self.rows)]
        return [self._step(epoch, first_step + number, batch) for number, batch in enumerate(batches)]

    def _step(self, epoch: int, number: int, batch: np.ndarray) -> Step:
        budget = budget_at(self.seed, number, self.budgets)
        batch = batch[np.argsort(-self.lengths[batch], kind="stable")]
        images = int(self.images[batch].max())
        text = -(-int(self.lengths[batch].max()) // BUCKET) * BUCKET
        text = min(max(text, BUCKET), self.row_length - images * (budget - 1))
        rows = [[int(record)] for record in batch] + [[] for _ in range(self.rows - len(batch))]
        return Step(epoch, budget, rows, text, images)


def require_text_capacity(row_length: int, images: int, budget: int) -> int:
    """The text tokens of a row with ``images`` images. Raises ConfigError if there are none."""
    text = row_length - images * (budget - 1)
    if text < 2:
        least = images * (budget - 1) + 2
        raise ConfigError(
            f"data.row_length={row_length} cannot hold {images} images of {budget} tokens and text; "
            f"expected {least} or more"
        )
    return text


def plan_for(
    cfg: DataConfig,
    lengths: np.ndarray,
    images: np.ndarray,
    budgets: tuple[int, ...],
    seed: int,
    faults: dict[int, BadSample] = {},
) -> Plan:
    """The plan of a configuration, without the records of ``faults``."""
    settings = dict(budgets=budgets, rows=cfg.rows, row_length=cfg.row_length, seed=seed, faults=faults)
    if cfg.packed:
        return PackPlan(lengths, images, images_per_row=cfg.images_per_row, **settings)
    return GroupedPlan(lengths, images, **settings)

"""The plan of all batches: which conversations share a batch and a row, known before any of them is read.

From the token lengths and image counts of all records, (seed, epoch, budgets) determine every batch as rows of record
ids. A batch is therefore random access by its step number, the data iterator's whole state is one integer, and any
number of processes agrees on the plan without talking.
"""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass

import numpy as np

from deltallava_jax.config import DataConfig
from deltallava_jax.errors import BadSample, ConfigError, TooManyFaults, count_faults
from deltallava_jax.sequence import budget_at

PLANNING = threading.Lock()  # the loop and the thread that reads ahead ask the same plan


@dataclass(frozen=True)
class Step:
    """One batch of the plan: record ids of each row, the budget its rows were filled for, and their T and I."""

    epoch: int
    budget: int
    rows: list[list[int]]
    text: int
    images: int


class Plan:
    """What plans have in common: the steps of all epochs, one after the other.

    faults: what is wrong with the records that are left out, by index; records: the index of each of the others.
    notes: how often each of conversation.NOTES was done so that records can be used."""

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
        self._starts = [0]  # of every epoch that was planned, and of the next
        self._recent: dict[int, list[Step]] = {}  # two epochs at most: those before are planned again when asked for
        self.leave_out(faults)

    def leave_out(self, faults: dict[int, BadSample]) -> None:
        """Takes these records out, too, before any step is asked for. Raises TooManyFaults if none remains."""
        self.faults |= faults
        self.records = np.delete(np.arange(len(self.lengths)), sorted(self.faults))
        if not len(self.records):
            told = count_faults(error.kind for error in self.faults.values())
            first = self.faults[min(self.faults)]
            raise TooManyFaults(f"none of the {len(self.lengths):,} records can be used: {told}; the first: {first}")

    @property
    def text_capacity(self) -> np.ndarray:
        """[records] The fewest text tokens that a row has for each record, in any of its steps."""
        raise NotImplementedError

    @property
    def cut(self) -> int:
        """How many records are longer than that."""
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
        """Epochs that are done after so many steps, one at least."""
        with PLANNING:
            self._reach(step=steps - 1)
            epoch = int(np.searchsorted(self._starts, steps - 1, side="right")) - 1
            first, end = self._starts[epoch : epoch + 2]
        return epoch + (steps - first) / (end - first)

    def steps_for(self, epochs: float) -> int:
        """Steps that ``epochs`` epochs take, a fraction of the last one rounded up."""
        whole = int(epochs)
        with PLANNING:
            self._reach(epoch=int(np.ceil(epochs)) - 1)
        if epochs == whole:
            return self._starts[whole]
        return self._starts[whole] + int(np.ceil((epochs - whole) * np.diff(self._starts)[whole] - 1e-9))


# How PackPlan plans, in three steps:
#   1. Once for each budget, choose a row's image places I, which leave T = S - I * (V - 1) text tokens (_capacity): try
#      the counts around what an average row would hold, and take the least that fills rows of a sample nearly best.
#   2. For each epoch, shuffle the records and hand them out in that order, through a pool of the oldest that are not in
#      a row yet (_plan_epoch, _fill).
#   3. For each row, take the oldest of the pool until little room is left, then the records that come closest to an
#      even share of the rest, until none fits (_choose).

# The image places tried, less the average row's. Measured, as is what follows, on lengths like easy-VQA's and LLaVA's:
# more counts on either side change nothing, without the highest 3% of the tokens are padding.
PLACES_TRIED = np.arange(-2, 2)
# The share of tokens that is given up to padding for fewer image places: each costs a pass of the tower, filled or not.
FILL_TOLERANCE = 0.005
# The share of the records with an image that a row can hold whole. One in a thousand is cut: room for the very longest
# would leave places for few images in every row.
FITTING_WHOLE = 0.999
# Records that the counts are tried on: four times as many give the same counts and take three times as long.
SAMPLE = 4096
# Records that a row is filled from. With fewer the last place of a row stays empty more often; twice as many fill no
# better, and let a record wait longer.
POOL = 256
# The oldest are taken while the row has room for so many average records after them. With 1 the last record has to fit
# what the oldest happen to leave, with 2 more of a row goes by fit alone: both leave 0.5% more padding.
ROOM_FOR_OLDEST = 1.5


class PackPlan(Plan):
    """Fills rows of S tokens: sum of text lengths <= T, images <= I, T + I * (V - 1) = S for the step's budget V.

    Where there are images, records without one share steps of their own, with T = S and no image: they are not cut at
    the shorter T and do not pay for the tower."""

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
        """lengths: text tokens of each record with one placeholder an image; images: image count of each record.

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
        places = images_per_row or self._image_places(budget, most)
        if places < most:
            raise ConfigError(f"data.images_per_row={places}, but a record has {most} images")
        return require_text_capacity(self.row_length, places, budget), places

    def _image_places(self, budget: int, most: int) -> int:
        """The least number of image places, ``most`` or more, that fills rows of a sample nearly best and leaves room
        for nearly every record that has an image."""
        lengths = self.lengths[self.records]
        images = self.images[self.records]
        fit = (images > 0) & (lengths <= self.row_length - most * (budget - 1))  # others are cut anyhow
        longest = int(np.quantile(lengths[fit], FITTING_WHOLE)) if fit.any() else self.row_length
        room = (self.row_length - longest) // max(budget - 1, 1)
        text_per_image = lengths[fit].sum() / max(images[fit].sum(), 1)
        average = self.row_length / max(text_per_image + budget - 1, 1)
        highest = max(most, min(room, self.row_length))
        counts = np.unique(np.clip(PLACES_TRIED + round(average), most, highest))
        fills = np.array([self._fill_of_sample(budget, int(count)) for count in counts])
        nearly_best = fills >= fills.max() - FILL_TOLERANCE
        return int(counts[np.argmax(nearly_best)])

    def _fill_of_sample(self, budget: int, images: int) -> float:
        """The share of tokens that are not padding, in rows of a sample with that many image places."""
        text = self.row_length - images * (budget - 1)
        if text < 2:
            return 0.0
        order = np.random.default_rng(0).permutation(self.records[~self._apart[self.records]])[:SAMPLE]
        live = np.minimum(self.lengths[order], text).sum() + self.images[order].sum() * (budget - 1)
        filled = 0
        pool = order[:0]
        while len(order) or len(pool):
            rows, pool, order = self._fill(pool, order, text, images)
            filled += sum(bool(row) for row in rows)
        return live / max(filled * self.row_length, 1)

    def _plan_epoch(self, epoch: int, first_step: int) -> list[Step]:
        order = np.random.default_rng((self.seed, epoch)).permutation(self.records)
        together = order[~self._apart[order]]
        apart = order[self._apart[order]]
        text_batches = []
        pool = order[:0]
        while len(apart) or len(pool):
            rows, pool, apart = self._fill(pool, apart, self.row_length, 0)
            text_batches.append(rows)
        # Spread over the epoch, whose length is estimated: one after so many others.
        every = int(self.lengths[together].sum() / max(len(text_batches), 1) / (self.rows * self.row_length)) + 1
        steps = []
        pool = order[:0]
        while len(together) or len(pool) or text_batches:
            budget = budget_at(self.seed, first_step + len(steps), self.budgets)
            turn = (len(steps) + 1) % (every + 1) == 0
            rest = not (len(together) or len(pool))
            if text_batches and (turn or rest):
                steps.append(Step(epoch, budget, text_batches.pop(0), self.row_length, 0))
                continue
            text, images = self.capacities[budget]
            rows, pool, together = self._fill(pool, together, text, images)
            steps.append(Step(epoch, budget, rows, text, images))
        return steps

    def _fill(
        self, pool: np.ndarray, order: np.ndarray, text: int, images: int
    ) -> tuple[list[list[int]], np.ndarray, np.ndarray]:
        """(rows of a batch, the pool of records that wait for the next one, the rest of the order)."""
        rows = []
        for _ in range(self.rows):
            free = POOL - len(pool)
            pool = np.concatenate([pool, order[:free]])
            order = order[free:]
            chosen = self._choose(np.minimum(self.lengths[pool], text), self.images[pool], text, images)
            rows.append(pool[chosen].tolist())
            pool = np.delete(pool, chosen)
        return rows, pool, order

    def _choose(self, lengths: np.ndarray, images: np.ndarray, text: int, places: int) -> list[int]:
        """Which of the records, the oldest first, fill a row of so many text tokens and image places."""
        if not len(lengths):
            return []
        units = np.maximum(images, 1)  # a record counts as its images, and as one without any
        mean = max(lengths.sum() / max(units.sum(), 1), 1.0)  # text of a unit

        # The oldest, as long as there is room for more behind them; the first one always.
        text_left = text - np.cumsum(lengths)
        places_left = places - np.cumsum(images)
        units_left = np.minimum(text_left / mean, places_left if places else np.inf)
        oldest = max(int((units_left >= ROOM_FOR_OLDEST).cumprod().sum()), 1)
        chosen = list(range(oldest))
        text = text_left[oldest - 1]
        places = places_left[oldest - 1]

        # Then, of those that fit, the one nearest to its share of the text that is left, if all get the same.
        free = np.arange(len(lengths)) >= oldest
        while True:
            fits = free & (lengths <= text) & (images <= places)
            if not fits.any():
                return chosen
            count = max(round(min(text / mean, places or np.inf)), 1)
            share = text / count * units
            record = int(np.where(fits, np.abs(lengths - share), np.inf).argmin())
            chosen.append(record)
            free[record] = False
            text -= lengths[record]
            places -= images[record]


# Padded batches have text lengths that are multiples of this, so that few programs are compiled; a row is on average
# half of it too long.
BUCKET = 256


class GroupedPlan(Plan):
    """LLaVA-1.5's batches: a conversation a row, padded to the longest; all rows have images or none has, so that text
    alone does not pay for the tower; longer rows come first (haotian-liu/LLaVA, llava/train/llava_trainer.py)."""

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
        """As PackPlan; ``row_length`` is the most tokens of a row. Raises ConfigError if it cannot hold the images."""
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
        batches = [whole[place] for place in rng.permutation(len(whole))]
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
    """The text tokens of a row with so many images. Raises ConfigError if there are none."""
    text = row_length - images * (budget - 1)
    if text < 2:
        raise ConfigError(f"data.row_length={row_length} cannot hold {images} images of {budget} tokens and text")
    return text


def plan_for(
    cfg: DataConfig,
    lengths: np.ndarray,
    images: np.ndarray,
    budgets: tuple[int, ...],
    seed: int,
    faults: dict[int, BadSample] = {},
) -> Plan:
    """The plan that a configuration asks for, without the records of ``faults``."""
    settings = dict(budgets=budgets, rows=cfg.rows, row_length=cfg.row_length, seed=seed, faults=faults)
    if cfg.packed:
        return PackPlan(lengths, images, images_per_row=cfg.images_per_row, **settings)
    return GroupedPlan(lengths, images, **settings)

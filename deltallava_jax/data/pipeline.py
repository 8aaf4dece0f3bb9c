"""From the pack plan to batches: tokenize, decode and place in worker processes (grain), one step an element.

The iterator's whole state is the step number. A record that cannot be read becomes a hole in its row; its reason
travels with the batch, so that the parent can count it.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import grain
import numpy as np

from deltallava_jax.config import DataConfig, VisionConfig
from deltallava_jax.data.conversation import TEMPLATES, Tokenized, known_template, tokenize
from deltallava_jax.data.images import load_image
from deltallava_jax.data.lengths import Lengths, measure, read
from deltallava_jax.data.packing import Plan, plan_for, require_text_capacity
from deltallava_jax.data.records import Record, Source
from deltallava_jax.data.tokens import Tokenizer
from deltallava_jax.errors import BadSample, ConfigError
from deltallava_jax.progress import progress_bar
from deltallava_jax.sequence import Batch


@dataclass(frozen=True)
class Element:
    """One step's rows in this process (numpy), its budget, and "record: reason" for each record left out.

    A worker sends it whole through a pipe: to grain it is no tree of arrays, which would travel in shared memory. That
    is freed by a thread that the end of the program cuts short, and containers have little of it."""

    batch: Batch
    budget: int
    faults: tuple[str, ...]


class Rows:
    """Builds rows from record ids; sent to the workers."""

    def __init__(
        self, source: Source, tokenizer: Tokenizer, cfg: DataConfig, vision: VisionConfig, question_length: int = 0
    ):
        """question_length: tokens of a question that the projector reads; 0: it reads none."""
        template = known_template(cfg.template, tokenizer, setting="data.template")
        if cfg.independent_rounds and not template.user.startswith("{}"):
            raise ConfigError(f"data.independent_rounds needs a template without a question prefix, not {cfg.template}")
        self.source = source
        self.tokenizer = tokenizer
        self.cfg = cfg
        self.vision = vision
        self.question_length = question_length

    def read(self, index: int, room: int) -> tuple[Record, Tokenized]:
        """A record and its tokens. Raises BadSample, naming the record, if it cannot be trained on in a row with room
        for so many text tokens."""
        record, conversation = read(self.source, index)
        template = TEMPLATES[self.cfg.template]
        tokenized = tokenize(conversation, template, self.tokenizer, question_length=self.question_length)
        if (tokenized.image_positions >= room).any():
            raise BadSample(f"{record.id}: an image lies beyond the row's {room} text tokens", "beyond")
        if not tokenized.loss_mask[:room].any():
            raise BadSample(f"{record.id}: no supervised token in its first {room} tokens", "unsupervised")
        return record, tokenized

    def lengths(self) -> Lengths:
        """Text tokens and images of every record."""
        return measure(self.source, TEMPLATES[self.cfg.template], self.tokenizer)

    def plan(self, budgets: tuple[int, ...], seed: int) -> Plan:
        """The plan that the configuration asks for, without the records whose text can already be told to be of no
        use: ``Plan.faults``. What else breaks does so when images are read.

        Raises ConfigError for rows too short for any image, TooManyFaults if no record can be used."""
        lengths = self.lengths()
        cfg = self.cfg
        budget = max(budgets)
        tokens, images = lengths.tokens, lengths.images
        if images.any():
            require_text_capacity(cfg.row_length, cfg.images_per_row or 1, budget)
        faults = self._faults(np.flatnonzero(tokens == 0), np.full(len(tokens), cfg.row_length))
        alone = cfg.row_length - images.astype(int) * (budget - 1)  # room of a record that has a row to itself
        most = cfg.images_per_row or (cfg.row_length - 2) // max(budget - 1, 1)
        for index in np.flatnonzero(images > most).tolist():
            why = f"{images[index]} images, more than the {most} of {budget} tokens that a row holds"
            faults[index] = BadSample(f"{self.name(index)}: {why}", "beyond")
        faults |= self._faults(np.setdiff1d(np.flatnonzero(tokens > alone), list(faults)), alone)
        plan = plan_for(cfg, tokens, images, budgets, seed, faults)
        plan.leave_out(self._faults(plan.records[(tokens > plan.text_capacity)[plan.records]], plan.text_capacity))
        plan.notes = lengths.notes
        return plan

    def _faults(self, records: np.ndarray, room: np.ndarray) -> dict[int, BadSample]:
        """What is wrong with those of the records that their room is too little for, or that cannot be used at all."""
        found = {}
        for index in progress_bar(records.tolist(), "judging", unit="records"):
            try:
                self.read(index, room[index])
            except BadSample as error:
                found[index] = BadSample(str(error), error.kind)  # without the frames that it was raised in
        return found

    def name(self, index: int) -> str:
        """What messages call a record, whatever is wrong with it."""
        try:
            return self.source[index].id
        except Exception:  # the name is wanted in a message about something else, which must not be lost
            return f"record {index}"

    def build(
        self, rows: list[list[int]], text: int, images: int, silent: Collection[int] = ()
    ) -> tuple[Batch, tuple[str, ...]]:
        """A batch of ``rows`` with T = text and I = images, and the faults met; those of the rows ``silent`` are not
        told: another process, which holds the same rows, tells them."""
        size = self.vision.image_size
        more = dict(question=self.question_length, branches=self.cfg.independent_rounds)
        batch = Batch.empty(len(rows), text, images, size, **more)
        faults = []
        for row, records in enumerate(rows):
            start = placed = segment = 0
            for index in records:
                try:
                    record, tokenized = self.read(index, text - start)
                    pixels = self._pixels(record)
                except BadSample as error:
                    if row not in silent:
                        faults.append(str(error))
                    continue
                segment += 1
                end = min(start + len(tokenized.ids), text)
                batch.tokens[row, start:end] = tokenized.ids[: end - start]
                batch.loss_mask[row, start:end] = tokenized.loss_mask[: end - start]
                batch.segments[row, start:end] = segment
                if batch.branches is not None:
                    batch.branches[row, start:end] = tokenized.rounds[: end - start]
                for position, question, image in zip(
                    tokenized.image_positions, tokenized.questions, pixels, strict=True
                ):
                    batch.image_positions[row, placed] = start + position
                    if batch.questions is not None:
                        batch.questions[row, placed] = question
                    batch.images[row, placed] = image
                    placed += 1
                start = end
        return batch, tuple(faults)

    def _pixels(self, record: Record) -> list[np.ndarray]:
        size, fill = self.vision.image_size, self.vision.mean_color
        try:
            return [load_image(image, size, self.cfg.aspect, fill) for image in record.images]
        except BadSample as error:
            raise BadSample(f"{record.id}: {error}", error.kind) from error


@dataclass(frozen=True)
class _BuildStep:
    """One step number -> its Element, with the rows that this process holds. Runs in the workers."""

    rows: Rows
    plan: Plan
    held: Mapping[int, bool] | None

    def __call__(self, number: int) -> Element:
        step = self.plan.step(int(number))
        held = dict.fromkeys(range(len(step.rows)), True) if self.held is None else self.held
        silent = {place for place, first in enumerate(held.values()) if not first}
        batch, faults = self.rows.build([step.rows[row] for row in held], step.text, step.images, silent)
        return Element(batch, step.budget, faults)


def elements(
    rows: Rows, plan: Plan, start: int, stop: int, *, workers: int, held: Mapping[int, bool] | None = None
) -> Iterator[Element]:
    """Elements of steps start to stop - 1, in order, built ahead in ``workers`` processes (0: in this one).

    held: the rows that this process needs, and of each whether its faults are told here; by default all of them."""
    numbers = grain.MapDataset.range(start, stop)
    dataset = numbers.map(_BuildStep(rows, plan, held)).to_iter_dataset(
        grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    )
    if workers:
        from absl import flags

        if not flags.FLAGS.is_parsed():  # grain asks for absl's flags in the parent of its workers
            flags.FLAGS.mark_as_parsed()
        options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
        dataset = dataset.mp_prefetch(options, worker_init_fn=_begin_worker)
    return iter(dataset)


def _begin_worker(*_) -> None:
    """A worker lives as long as the training, which still needs it to reach the step that is saved when a cluster sends
    SIGTERM to all processes at once; and no longer, should the training be killed."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)

    def end_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()

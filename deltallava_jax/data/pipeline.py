"""From the pack plan to batches: worker processes (grain) tokenize text and decode images, one step per element.

The iterator's whole state is the step number. A record that cannot be read leaves padding in its row; its error is
sent with the batch, so that the parent process can count it.
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

    Not a pytree of arrays, so that grain sends it through a pipe and not through shared memory: containers have little
    of that, and grain may not free it when the program ends."""

    batch: Batch
    budget: int
    faults: tuple[str, ...]


class Rows:
    """Builds rows from record ids; sent to the workers."""

    def __init__(
        self, source: Source, tokenizer: Tokenizer, cfg: DataConfig, vision: VisionConfig, question_length: int = 0
    ):
        """question_length: tokens of a question that the projector reads; 0: it does not read the question."""
        template = known_template(cfg.template, tokenizer, setting="data.template")
        if cfg.independent_rounds and not template.user.startswith("{}"):
            raise ConfigError(
                f"data.independent_rounds needs a template without a question prefix, e.g. brief, not {cfg.template}"
            )
        self.source = source
        self.tokenizer = tokenizer
        self.cfg = cfg
        self.vision = vision
        self.question_length = question_length

    def read(self, index: int, capacity: int) -> tuple[Record, Tokenized]:
        """A record and its tokens. Raises BadSample, naming the record, if its first ``capacity`` text tokens cannot be
        trained on."""
        record, conversation = read(self.source, index)
        template = TEMPLATES[self.cfg.template]
        tokenized = tokenize(conversation, template, self.tokenizer, question_length=self.question_length)
        if (tokenized.image_positions >= capacity).any():
            raise BadSample(f"{record.id}: an image lies beyond the row's {capacity} text tokens", "beyond")
        if not tokenized.loss_mask[:capacity].any():
            raise BadSample(f"{record.id}: no supervised token in its first {capacity} tokens", "unsupervised")
        return record, tokenized

    def lengths(self) -> Lengths:
        """Text tokens and images of every record."""
        return measure(self.source, TEMPLATES[self.cfg.template], self.tokenizer)

    def plan(self, budgets: tuple[int, ...], seed: int) -> Plan:
        """The plan of the configuration, without the records whose text is unusable (``Plan.faults``). Broken images
        are only found when they are read.

        Raises ConfigError for rows too short for any image, TooManyFaults if no record is usable."""
        lengths = self.lengths()
        cfg = self.cfg
        budget = max(budgets)
        tokens = lengths.tokens
        images = lengths.images
        if images.any():
            require_text_capacity(cfg.row_length, cfg.images_per_row or 1, budget)
        faults = self._faults(np.flatnonzero(tokens == 0), np.full(len(tokens), cfg.row_length))
        alone = cfg.row_length - images.astype(int) * (budget - 1)  # text tokens that a record has in a row alone
        most = cfg.images_per_row or (cfg.row_length - 2) // max(budget - 1, 1)
        for index in np.flatnonzero(images > most).tolist():
            reason = f"{images[index]} images, more than the {most} of {budget} tokens that a row holds"
            faults[index] = BadSample(f"{self.name(index)}: {reason}", "beyond")
        faults |= self._faults(np.setdiff1d(np.flatnonzero(tokens > alone), list(faults)), alone)
        plan = plan_for(cfg, tokens, images, budgets, seed, faults)
        plan.leave_out(self._faults(plan.records[(tokens > plan.text_capacity)[plan.records]], plan.text_capacity))
        plan.notes = lengths.notes
        return plan

    def _faults(self, records: np.ndarray, capacity: np.ndarray) -> dict[int, BadSample]:
        """{index: error} of those of the records that are unusable, given the text tokens that a row holds of each."""
        found = {}
        for index in progress_bar(records.tolist(), "validating", unit="records"):
            try:
                self.read(index, capacity[index])
            except BadSample as error:
                found[index] = BadSample(str(error), error.kind)  # a copy, without the traceback's frames
        return found

    def name(self, index: int) -> str:
        """The name of a record in messages, even of a broken one."""
        try:
            return self.source[index].id
        except Exception:  # must not hide the message that the name is for
            return f"record {index}"

    def build(
        self, rows: list[list[int]], text: int, images: int, silent: Collection[int] = ()
    ) -> tuple[Batch, tuple[str, ...]]:
        """A batch of ``rows`` with T = text and I = images, and its faults, but for those of the rows ``silent``, which
        another process with the same rows reports."""
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
    """Step number -> Element, with the rows that this process holds. Called in the workers."""

    rows: Rows
    plan: Plan
    held: Mapping[int, bool] | None

    def __call__(self, number: int) -> Element:
        step = self.plan.step(int(number))
        held = dict.fromkeys(range(len(step.rows)), True) if self.held is None else self.held
        silent = {row for row, first in enumerate(held.values()) if not first}
        batch, faults = self.rows.build([step.rows[row] for row in held], step.text, step.images, silent)
        return Element(batch, step.budget, faults)


def elements(
    rows: Rows, plan: Plan, start: int, stop: int, *, workers: int, held: Mapping[int, bool] | None = None
) -> Iterator[Element]:
    """Elements of steps start to stop - 1, in order, prefetched in ``workers`` processes (0: in this one).

    held: {row that this process needs: whether this process reports its faults}; by default all rows."""
    numbers = grain.MapDataset.range(start, stop)
    dataset = numbers.map(_BuildStep(rows, plan, held)).to_iter_dataset(
        grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    )
    if workers:
        from absl import flags

        if not flags.FLAGS.is_parsed():  # grain reads absl's flags in the parent of its workers
            flags.FLAGS.mark_as_parsed()
        options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
        dataset = dataset.mp_prefetch(options, worker_init_fn=_begin_worker)
    return iter(dataset)


def _begin_worker(*_) -> None:
    """Ignores signals, as a cluster may send SIGTERM to all processes and the training then still needs batches up to
    the step that it saves; ends with the parent, even if that is killed."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)

    def end_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()

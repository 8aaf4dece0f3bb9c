"""The records that every reader of a data set returns: one conversation and its images each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from deltallava_jax.errors import BadSample


@dataclass(frozen=True)
class Record:
    """One conversation: turns {"from", "value"} with ``<image>`` markers (``conversation.read_turns`` parses them), and
    the images' files (or their bytes), in order.

    id: where the record is, for messages; key: its id in the data set. Raises BadSample without a list of turns."""

    id: str
    images: tuple[Path | bytes, ...]
    conversation: list[dict]
    key: str | None = None

    def __post_init__(self):
        if not isinstance(self.conversation, list):
            raise BadSample(f'{self.id} has no list of "conversations"')

    def texts(self) -> list[str]:
        """The text of all turns that have any."""
        values = [turn.get("value") for turn in self.conversation if isinstance(turn, dict)]
        return [value for value in values if isinstance(value, str)]


class Source(Protocol):
    """Random access to records, cheap to send to worker processes."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record:
        """Raises BadSample for a record that cannot be read."""

    def texts(self) -> Iterable[str]:
        """All questions and answers, to train a tokenizer on."""


def texts(source: Source) -> Iterator[str]:
    """The text of all records that can be read."""
    for index in range(len(source)):
        try:
            yield from source[index].texts()
        except BadSample:
            continue


class Mixture:
    """Several sources as one, each repeated as often as its weight; for the fraction of a weight a part is sampled.

    fingerprint: of the sources and weights, if every source has one."""

    def __init__(self, sources: Sequence[Source], weights: Sequence[float]):
        self.sources = list(sources)
        of_source = []
        of_record = []
        for number, (source, weight) in enumerate(zip(sources, weights, strict=True)):
            whole = int(weight)
            rest = weight - whole
            part = np.random.default_rng(number).permutation(len(source))[: round(rest * len(source))]
            chosen = np.concatenate([np.tile(np.arange(len(source)), whole), np.sort(part)])
            of_source.append(np.full(len(chosen), number, np.int32))
            of_record.append(chosen.astype(np.int32))
        self.of_source = np.concatenate(of_source)
        self.of_record = np.concatenate(of_record)
        if all(hasattr(source, "fingerprint") for source in sources):
            self.fingerprint = " ".join(
                f"{source.fingerprint}*{w:g}" for source, w in zip(sources, weights, strict=True)
            )

    def __len__(self) -> int:
        return len(self.of_source)

    def __getitem__(self, index: int) -> Record:
        return self.sources[self.of_source[index]][int(self.of_record[index])]

    def texts(self) -> Iterator[str]:
        for source in self.sources:
            yield from source.texts()

"""Where records come from: random access to conversations in LLaVA's format."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from deltallava_jax.config import DataConfig
from deltallava_jax.errors import ConfigError


@dataclass(frozen=True)
class Record:
    """One conversation: turns {"from", "value"} with ``<image>`` markers, and the files (or their bytes) they stand
    for, in order. id: says where the record is; key: its own id in the data set."""

    id: str
    images: tuple[Path | bytes, ...]
    conversation: list[dict]
    key: str | None = None


class Source(Protocol):
    """Random access to records, cheap to send to worker processes."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...

    def texts(self) -> Iterable[str]:
        """All questions and answers, to train a tokenizer on."""


def training_source(cfg: DataConfig) -> Source:
    """The training records that the configuration names; ConfigError for an unknown data set."""
    if cfg.dataset == "easy_vqa":
        from deltallava_jax.data.easy_vqa import EasyVqa

        return EasyVqa("train", turns=cfg.turns)
    if cfg.dataset == "llava":
        from deltallava_jax.data.array_record import ArrayRecords
        from deltallava_jax.data.llava_json import LlavaJson

        if cfg.array_record:
            return ArrayRecords(cfg.array_record)
        if "://" not in cfg.images and not Path(cfg.images).is_dir():
            raise ConfigError(f"data.images: the image folder {cfg.images} does not exist")
        sources = [LlavaJson(file, cfg.images) for file in cfg.json]
        weights = cfg.weights or (1.0,) * len(sources)
        return sources[0] if weights == (1.0,) else Mixture(sources, weights)
    raise ConfigError(f"data.dataset is {cfg.dataset!r}; known: easy_vqa, llava")


class Mixture:
    """Several sources as one: each as often as its weight says, a part of it drawn where the weight is no whole number.

    fingerprint: of the parts and weights, where every part has one."""

    def __init__(self, sources: Sequence[Source], weights: Sequence[float]):
        self.sources = list(sources)
        of_source, of_record = [], []
        for number, (source, weight) in enumerate(zip(sources, weights, strict=True)):
            whole, rest = int(weight), weight - int(weight)
            part = np.random.default_rng(number).permutation(len(source))[: round(rest * len(source))]
            chosen = np.concatenate([np.tile(np.arange(len(source)), whole), np.sort(part)])
            of_source.append(np.full(len(chosen), number, np.int32))
            of_record.append(chosen.astype(np.int32))
        self.of_source, self.of_record = np.concatenate(of_source), np.concatenate(of_record)
        if all(hasattr(source, "fingerprint") for source in sources):
            self.fingerprint = " ".join(
                f"{source.fingerprint}*{w:g}" for source, w in zip(sources, weights, strict=True)
            )

    def __len__(self) -> int:
        return len(self.of_source)

    def __getitem__(self, index: int) -> Record:
        return self.sources[self.of_source[index]][int(self.of_record[index])]

    def texts(self):
        for source in self.sources:
            yield from source.texts()

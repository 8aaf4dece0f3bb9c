"""Where records come from: random access to conversations in LLaVA's format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from deltallava_jax.config import ConfigError, DataConfig


@dataclass(frozen=True)
class Record:
    """One conversation: turns {"from", "value"} with ``<image>`` markers, and the files they stand for, in order."""

    id: str
    images: tuple[Path, ...]
    conversation: list[dict]


class Source(Protocol):
    """Random access to records, cheap to send to worker processes."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...

    def texts(self) -> Sequence[str]:
        """All questions and answers, to train a tokenizer on."""


def training_source(cfg: DataConfig) -> Source:
    """The training records that the configuration names; ConfigError for an unknown data set."""
    if cfg.dataset == "easy_vqa":
        from deltallava_jax.data.easy_vqa import EasyVqa

        return EasyVqa("train", turns=cfg.turns)
    raise ConfigError(f"data.dataset is {cfg.dataset!r}; known: easy_vqa")

"""The training records of a configuration."""

from __future__ import annotations

from pathlib import Path

from deltallava_jax.config import DataConfig
from deltallava_jax.data.array_record import ArrayRecords
from deltallava_jax.data.easy_vqa import EasyVqa
from deltallava_jax.data.llava_json import LlavaJson
from deltallava_jax.data.records import Mixture, Source
from deltallava_jax.errors import ConfigError


def training_source(cfg: DataConfig) -> Source:
    """The training records. Raises ConfigError for an unknown data set or a missing folder."""
    if cfg.dataset == "easy_vqa":
        return EasyVqa("train", turns=cfg.turns)
    if cfg.dataset == "llava":
        if cfg.array_record:
            return ArrayRecords(cfg.array_record)
        if "://" not in cfg.images and not Path(cfg.images).is_dir():
            raise ConfigError(f"data.images={cfg.images!r} is not a folder")
        sources = [LlavaJson(file, cfg.images) for file in cfg.json]
        weights = cfg.weights or (1.0,) * len(sources)
        return sources[0] if weights == (1.0,) else Mixture(sources, weights)
    raise ConfigError(f"data.dataset is {cfg.dataset!r}; known: easy_vqa, llava")

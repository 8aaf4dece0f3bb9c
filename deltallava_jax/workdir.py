"""Workdirs: the folder of a run. What it holds, and under which names, is known here alone.

config.json        the configuration that the run began with
tokenizer.json     its tokenizer, with tokenizer_config.json
checkpoints/       training/checkpoints.py
source/            of a converted model: the files that stood beside the original weights (convert/workdir.py)
metrics.jsonl, tensorboard/, profile/, faults.txt     what the training tells
eval/              results of evaluations, a JSON file each
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from deltallava_jax.config import Config, read_json, to_dict, workdir_config
from deltallava_jax.data import tokens
from deltallava_jax.data.tokens import Tokenizer
from deltallava_jax.errors import CheckpointError, ConfigError
from deltallava_jax.models.layers import Params
from deltallava_jax.models.names import flatten, unflatten
from deltallava_jax.parallel import hosts
from deltallava_jax.training.checkpoints import Checkpoints, Place, as_saved

FREE = ("dtype", "remat", "loss_chunk", "tower_images")  # of the model: how it is computed, not what


class Workdir:
    """The folder of a run, of train.py or of a conversion; it need not exist yet."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def __str__(self) -> str:
        return str(self.path)

    # ------------------------------------------------------------------ the model

    @property
    def exists(self) -> bool:
        """Whether the folder is a workdir at all, with finished checkpoints or without."""
        return (self.path / "checkpoints").is_dir()

    @property
    def config(self) -> Config:
        """The configuration that the run began with. Raises ConfigError if it is missing or cannot be read."""
        return workdir_config(self.path)

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises TokenizerError if it is missing or cannot be read."""
        return tokens.load(self._tokenizer_file)

    @property
    def _tokenizer_file(self) -> Path:
        return self.path / "tokenizer.json"

    @property
    def checkpoints(self) -> Checkpoints:
        """The checkpoints, to read. Raises CheckpointError where none is finished."""
        found = Checkpoints(self.path)
        if found.latest() is None:
            raise CheckpointError(f"{self} holds no finished checkpoint; train first")
        return found

    @property
    def latest(self) -> int:
        """Step of the newest finished checkpoint. Raises CheckpointError where there is none."""
        return self.checkpoints.latest()

    @property
    def began(self) -> Workdir | None:
        """The workdir whose parameters this one's training began with, where that is still there."""
        init_from = self.config.init_from
        found = Workdir(init_from)
        return found if init_from and found.exists else None

    @property
    def source(self) -> Path | None:
        """The folder with the files of the original weights: its own, or of the nearest workdir that it began with."""
        return next((home.path / "source" for home in self._chain() if (home.path / "source").is_dir()), None)

    def _chain(self) -> Iterator[Workdir]:
        """This workdir, the one it began with, the one that began with, and so on."""
        home, seen = self, set()
        while home is not None and home.path.resolve() not in seen:
            yield home
            seen.add(home.path.resolve())
            home = home.began

    def params(self, place: Place = as_saved) -> Params:
        """The newest parameters. What training kept frozen comes from the workdir it began with, where that is still
        there, and so has every bit of the original. place: as in ``Checkpoints.restore_params``."""
        cfg, checkpoints = self.config, self.checkpoints
        step, frozen = checkpoints.latest(), {}
        if cfg.optimizer.frozen and (began := self.began):
            kept = set(checkpoints.frozen_paths(step))
            frozen = flatten(began.params(lambda path, saved: place(path, saved) if path in kept else None))
        trained = checkpoints.restore_params(
            step, cfg.model, lambda path, saved: None if path in frozen else place(path, saved)
        )
        return unflatten(flatten(trained) | frozen)

    # ------------------------------------------------------------------ a run

    def begin(self, cfg: Config, texts: Callable[[], Iterable[str]]) -> list[str]:
        """Makes the folder of a new run, with config.json and the tokenizer of ``init_from``, or one trained on
        ``texts()``; of a run that goes on it compares the configuration. Every process calls it, one writes.

        Returns lines about settings that differ from those the run began with. Raises ConfigError for another model, a
        source that is none, a tokenizer with more tokens than the decoder, TokenizerError, CheckpointError."""
        self.path.mkdir(parents=True, exist_ok=True)
        notes = []
        if Checkpoints(self.path).latest() is not None:
            notes = self.same_model(cfg)
        elif hosts.leads():  # the others read what it writes
            self.write(cfg, self._first_tokenizer(cfg, texts))
        hosts.wait("workdir")
        if not (hosts.leads() or self._tokenizer_file.exists()):
            raise ConfigError(
                f"this process sees no {self._tokenizer_file}; --workdir must be a folder that all hosts share"
            )
        if (size := self.tokenizer.vocab_size) > cfg.model.decoder.vocab_size:
            raise ConfigError(
                f"decoder.vocab_size={cfg.model.decoder.vocab_size}, but {self._tokenizer_file} has {size} tokens"
            )
        return notes

    @staticmethod
    def _first_tokenizer(cfg: Config, texts: Callable[[], Iterable[str]]) -> Tokenizer:
        if not cfg.init_from:
            return tokens.train(texts(), cfg.model.decoder.vocab_size)
        source = Workdir(cfg.init_from)
        if not source.exists:
            raise ConfigError(f"config.init_from={cfg.init_from} holds no checkpoints; convert makes such a folder")
        return source.tokenizer

    def write(self, cfg: Config, tokenizer: Tokenizer | None) -> None:
        """Writes config.json and, where there is one, the tokenizer."""
        (self.path / "config.json").write_text(json.dumps(to_dict(cfg), indent=2))
        if tokenizer is not None:
            tokenizer.save(self._tokenizer_file)

    def same_model(self, cfg: Config) -> list[str]:
        """ConfigError if the workdir holds another model than ``cfg`` has; lines about other settings that differ."""
        notes = []
        for key, now, before in differences(to_dict(cfg), to_dict(self.config)):
            changed = f"{key} is {now!r} now; the workdir was begun with {before!r}"
            if key.startswith("model.") and key.split(".")[1] not in FREE:
                raise ConfigError(
                    f"{self} holds another model: {changed}. Use its settings, or another --workdir; with "
                    f"--config.init_from={self} that begins with these weights, where they fit"
                )
            notes.append(f"note: {changed}")
        return notes

    # ------------------------------------------------------------------ what training and evaluation tell

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def profile(self) -> Path:
        return self.path / "profile"

    def faults(self, process: int = 0) -> Path:
        """The list of the records that a process had to leave out."""
        return self.path / (f"faults.{process}.txt" if process else "faults.txt")

    @property
    def results(self) -> Path:
        """The folder of the evaluations' results."""
        return self.path / "eval"

    def reports(self) -> list[dict]:
        """The results of whole evaluations, one a task, number of tokens and control, by the names of their files.
        What only a part of the questions was asked for (--limit) is none. Raises ConfigError for a broken file."""
        found = {file.stem: read_json(file) for file in sorted(self.results.glob("*.json"))}
        whole = lambda name, told: f"{name}_".startswith(f"{told.get('task')}_{told.get('budget')}_")
        return [told for name, told in found.items() if whole(name, told) and not told.get("limit")]

    def write_report(self, report: dict, *marks: str) -> None:
        """Writes eval/TASK.json, the last evaluation of the task, and eval/TASK_BUDGET.json.

        marks: what the names say beside that, of a control for instance, so that it takes the place of no other. So
        do those of a part of the questions, a ``limit`` in the report."""
        marks = (*marks, f"limit{report['limit']}") if report["limit"] else marks
        self.results.mkdir(parents=True, exist_ok=True)
        text = json.dumps(report, indent=2)
        for name in (report["task"], f"{report['task']}_{report['budget']}"):
            (self.results / f"{'_'.join((name, *marks))}.json").write_text(text)


def differences(now: dict, before: dict, where: str = "") -> Iterator[tuple[str, object, object]]:
    """(dotted key, value now, value before) of what differs between two configurations as dicts, by key."""
    for key in sorted({**now, **before}):
        one, other = now.get(key), before.get(key)
        if isinstance(one, dict) and isinstance(other, dict):
            yield from differences(one, other, f"{where}{key}.")
        elif one != other:
            yield f"{where}{key}", one, other

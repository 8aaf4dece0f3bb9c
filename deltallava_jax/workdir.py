"""Workdirs: the folder of a run. What it holds, and under which names, is known here alone.

config.json        the configuration that the run began with
tokenizer.json     its tokenizer, with tokenizer_config.json
checkpoints/       training/checkpoints.py
source/            of a converted model: the files that stood beside the original weights (convert/workdir.py)
parameters.txt, metrics.jsonl, tensorboard/, profile/, faults.txt     what the training tells
eval/              results of evaluations, a JSON file each
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import jax
import numpy as np

from deltallava_jax import cli
from deltallava_jax.config import Config, ModelConfig, read_json, to_dict, workdir_config
from deltallava_jax.data import tokens
from deltallava_jax.data.tokens import Tokenizer
from deltallava_jax.errors import CheckpointError, ConfigError
from deltallava_jax.models.layers import Params
from deltallava_jax.models.names import flatten, unflatten
from deltallava_jax.parallel import hosts
from deltallava_jax.training.checkpoints import Checkpoints, Place, as_saved, has_finished

# Settings of the model that may change when a run goes on: how it is computed, not what.
FREE = ("dtype", "remat", "loss_chunk", "tower_images")
# And those that may differ from the model that a new run begins with: how it is trained, and the number of tokens.
FREE_AT_BEGIN = FREE + (
    "decoder.initializer_range", "projector.initializer_range", "projector.drop_path",
    "projector.scale_factor", "projector.tokens", "projector.keep_ratio",
)  # fmt: skip
# Of the data: how the model is asked, afterwards too, and by what config.json says.
ASKED = ("data.aspect", "data.template")
COMPARED = 2**20  # frozen parameters that are compared with those of a source


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
        """The workdir whose parameters this one's training began with, where it is still to be found: by its path, as
        seen from here or from a folder above, or beside this one, where both were moved."""
        init_from, here = self.config.init_from, self.path.resolve()
        if not init_from:
            return None
        folders = [Path(init_from), *(folder / init_from for folder in (here, *here.parents))]
        folders.append(here.parent / Path(init_from).name)
        return next((Workdir(one) for one in folders if Workdir(one).exists and one.resolve() != here), None)

    @property
    def lost(self) -> str:
        """What init_from names, here or in a workdir before this one, where that is not to be found; else nothing."""
        *_, first = self._chain()
        return first.config.init_from

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
        """The newest parameters. What training kept frozen comes from the workdir it began with and so has every bit
        of the original; where that is gone or holds other parameters now it is said, and the copies that training held
        are taken. place: as in ``Checkpoints.restore_params``."""
        cfg, checkpoints = self.config, self.checkpoints
        step, frozen = checkpoints.latest(), {}
        if cfg.init_from and cfg.optimizer.frozen and (kept := checkpoints.frozen(step)):
            began, why = self.began, "is not there any more"
            if began is not None and not self._has_the_same(began, kept):
                began, why = None, "holds other parameters now"
            if began is None:
                cli.log(
                    f"note: {self} began with {cfg.init_from}, which {why}: what training kept frozen "
                    f"({', '.join(sorted({path.split('/')[0] for path in kept}))}) is read in the bfloat16 of training"
                )
            else:
                frozen = flatten(began.params(lambda path, saved: place(path, saved) if path in kept else None))
        trained = checkpoints.restore_params(
            step, cfg.model, lambda path, saved: None if path in frozen else place(path, saved)
        )
        return unflatten(flatten(trained) | frozen)

    def _has_the_same(self, began: Workdir, kept: dict[str, jax.ShapeDtypeStruct]) -> bool:
        """Whether what was kept frozen is what ``began`` holds, as far as the smallest arrays tell."""
        few, total = [], 0
        for path in sorted(kept, key=lambda path: math.prod(kept[path].shape)):
            total += math.prod(kept[path].shape)
            if few and total > COMPARED:
                break
            few.append(path)
        read = lambda home: flatten(
            home.checkpoints.restore_params(
                home.latest, home.config.model, lambda path, saved: as_saved(path, saved) if path in few else None
            )
        )
        ours, theirs = read(self), read(began)
        same = lambda path: np.array_equal(np.asarray(theirs[path]).astype(ours[path].dtype), np.asarray(ours[path]))
        return ours.keys() == theirs.keys() and all(map(same, few))

    # ------------------------------------------------------------------ a run

    def model_for(self, init_from: str) -> ModelConfig:
        """The model of a run whose configuration names none: that of the run that goes on here, else that of the
        workdir it begins with, else the default."""
        home = self if has_finished(self.path) else Workdir(init_from) if init_from else None
        return home.config.model if home else ModelConfig()

    def begin(self, cfg: Config, texts: Callable[[], Iterable[str]]) -> list[str]:
        """Makes the folder of a new run, with config.json, and of ``init_from`` the tokenizer and source/, or a
        tokenizer that is trained on ``texts()``; of a run that goes on it compares the configuration. Every process
        calls it, one writes.

        Returns lines about settings that differ from those the run began with. Raises ConfigError for another model or
        another way to ask it, a source that is none, a tokenizer with more tokens than the decoder; TokenizerError,
        CheckpointError."""
        checkpoints, notes = Checkpoints(self.path), []
        going_on = checkpoints.latest() is not None
        if going_on:
            checkpoints.require_optimizer(checkpoints.latest())
            notes = self.same_model(cfg)
        elif cfg.init_from:
            _check_source(cfg)
        if not going_on and hosts.leads():  # the others read what it writes
            source = Workdir(cfg.init_from) if cfg.init_from else None
            tokenizer = source.tokenizer if source else tokens.train(texts(), cfg.model.decoder.vocab_size)
            self.path.mkdir(parents=True, exist_ok=True)
            if source and source.source:  # carried along, so that exports need no other folder for it
                shutil.copytree(source.source, self.path / "source", dirs_exist_ok=True)
            self.write(_found_from_anywhere(cfg), tokenizer)
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

    def write(self, cfg: Config, tokenizer: Tokenizer | None) -> None:
        """Writes config.json and, where there is one, the tokenizer."""
        (self.path / "config.json").write_text(json.dumps(to_dict(cfg), indent=2))
        if tokenizer is not None:
            tokenizer.save(self._tokenizer_file)

    def same_model(self, cfg: Config) -> list[str]:
        """Lines about settings that differ. Raises ConfigError if the workdir holds another model than ``cfg`` has, or
        one that is asked in another way."""
        now, before = (to_dict(_found_from_anywhere(one)) for one in (cfg, self.config))
        for key, new, old in differences(now["model"], before["model"]):
            if key not in FREE:
                raise ConfigError(
                    f"{self} holds another model: model.{key} is {new!r} now; the workdir was begun with {old!r}. Use "
                    f"its settings, or another --workdir; with --config.init_from={self} that begins with these "
                    "weights, where they fit"
                )
        notes = []
        for key, new, old in differences(now, before):
            told = f"{key} is {new!r} now; the workdir was begun with {old!r}"
            if key in ASKED:
                raise ConfigError(f"{self}: {told}. Go on with --config.{key}={old}, or use another --workdir")
            notes.append(f"note: {told}")
        return notes

    # ------------------------------------------------------------------ what training and evaluation tell

    @property
    def parameters(self) -> Path:
        """The table of the model's parameters."""
        return self.path / "parameters.txt"

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
    """(dotted key, value now, value before) of what differs between two configurations as dicts; names first."""
    for key in sorted({**now, **before}, key=lambda key: (key != "name", key)):
        one, other = now.get(key), before.get(key)
        if isinstance(one, dict) and isinstance(other, dict):
            yield from differences(one, other, f"{where}{key}.")
        elif one != other:
            yield f"{where}{key}", one, other


def _check_source(cfg: Config) -> None:
    """Raises ConfigError or CheckpointError unless init_from holds the model of ``cfg``, to train."""
    source = Workdir(cfg.init_from)
    if not source.exists:
        raise ConfigError(f"config.init_from={source} holds no checkpoints; convert makes such a folder")
    theirs = source.config.model
    theirs.require_whole(f"config.init_from={source}: training")
    for key, new, old in differences(to_dict(cfg.model), to_dict(theirs)):
        if key not in FREE_AT_BEGIN:
            raise ConfigError(
                f"config.init_from={source} holds another model: model.{key} is {new!r} now, and {old!r} there. Use "
                "its settings; a configuration that names no model has them all"
            )
    try:
        source.checkpoints.close()
    except CheckpointError as error:
        raise CheckpointError(f"config.init_from: {error}") from error


def _found_from_anywhere(cfg: Config) -> Config:
    """The configuration with the path of init_from from the root on."""
    return dataclasses.replace(cfg, init_from=str(Path(cfg.init_from).absolute())) if cfg.init_from else cfg

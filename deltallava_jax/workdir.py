"""Workdirs: the folder of a run. Only this module knows its files and their names.

config.json        the configuration that the run was started with
base.json          of adapters: checksums of the frozen parameters in init_from that they belong to
tokenizer.json     its tokenizer, with tokenizer_config.json
checkpoints/       training/checkpoints.py
source/            of a converted model: the files beside the original weights (convert/workdir.py)
parameters.txt, metrics.jsonl, tensorboard/, profile/, faults.txt     output of the training
eval/              results of evaluations, one JSON file each
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
from deltallava_jax.config import Config, ModelConfig, differences, read_json, to_dict, workdir_config
from deltallava_jax.data import tokens
from deltallava_jax.data.tokens import Tokenizer
from deltallava_jax.errors import CheckpointError, ConfigError
from deltallava_jax.models import lora
from deltallava_jax.models.layers import Params
from deltallava_jax.models.names import flatten, unflatten
from deltallava_jax.parallel import hosts
from deltallava_jax.training.checkpoints import (
    Checkpoints,
    Place,
    as_saved,
    fingerprint,
    has_finished,
    only,
    require_the_same,
)

# Settings of the model that may change when a run resumes: how it is computed, not what.
FREE_ON_RESUME = ("dtype", "remat", "attention", "windowed_attention", "loss_chunk", "tower_images")
# Those that may differ from the model in init_from: also how it is trained, and the number of visual tokens.
FREE_ON_INIT = FREE_ON_RESUME + (
    "decoder.initializer_range", "projector.initializer_range", "projector.drop_path",
    "projector.scale_factor", "projector.tokens", "projector.keep_ratio",
)  # fmt: skip
# Settings of the data that determine the prompts, in inference too, which takes them from config.json.
PROMPT_SETTINGS = ("data.aspect", "data.template")
COMPARED = 2**20  # frozen parameters that are compared with those in init_from


class Workdir:
    """The folder of a training run or a conversion, which need not exist yet."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def __str__(self) -> str:
        return str(self.path)

    # ------------------------------------------------------------------ the model

    @property
    def exists(self) -> bool:
        """Whether the folder is a workdir, with or without finished checkpoints."""
        return (self.path / "checkpoints").is_dir()

    @property
    def config(self) -> Config:
        """The configuration that the run was started with. Raises ConfigError if it is missing or cannot be read."""
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
        """The checkpoints, for reading. Raises CheckpointError if none is finished."""
        found = Checkpoints(self.path)
        if found.latest() is None:
            raise CheckpointError(f"{self} holds no finished checkpoint; train first")
        return found

    @property
    def latest(self) -> int:
        """Step of the newest finished checkpoint. Raises CheckpointError if there is none."""
        return self.checkpoints.latest()

    @property
    def init_workdir(self) -> Workdir | None:
        """The workdir that init_from names, None if it is missing. Its path is tried as it is, relative to this folder
        and its parents, and, as both may have been moved, beside this folder."""
        init_from = self.config.init_from
        if not init_from:
            return None
        here = self.path.resolve()
        folders = [Path(init_from), *(folder / init_from for folder in (here, *here.parents))]
        folders.append(here.parent / Path(init_from).name)
        return next((Workdir(one) for one in folders if Workdir(one).exists and one.resolve() != here), None)

    @property
    def missing_init(self) -> str:
        """The init_from of this workdir, or of one that it descends from, that is missing; "" if none is."""
        *_, first = self._chain()
        return first.config.init_from

    @property
    def source(self) -> Path | None:
        """The folder with the files beside the original weights: this workdir's, or that of the nearest ancestor."""
        return next((home.path / "source" for home in self._chain() if (home.path / "source").is_dir()), None)

    def _chain(self) -> Iterator[Workdir]:
        """This workdir, the one that it was initialized from, and so on."""
        home = self
        visited = set()
        while home is not None and home.path.resolve() not in visited:
            yield home
            visited.add(home.path.resolve())
            home = home.init_workdir

    def newest(self, model: ModelConfig, place: Place = as_saved, step: int | None = None) -> Params:
        """The parameters of a step, by default the newest, as the checkpoint holds them, of ``model``; adapters merged
        into their base."""
        step = self.latest if step is None else step
        if self.config.lora:
            return self._merged(step, model, place)
        return self.checkpoints.restore_params(step, model, place)

    def params(self, place: Place = as_saved) -> Params:
        """The newest parameters. Frozen parameters come from the workdir in init_from, so that they keep the original
        precision; if it is missing or has changed, that is logged, and they come from this workdir's checkpoint, in
        bfloat16. Adapters are merged into their base. place: as in ``Checkpoints.restore_params``. Raises
        CheckpointError where the base of adapters is missing or has changed."""
        cfg = self.config
        checkpoints = self.checkpoints
        step = checkpoints.latest()
        if cfg.lora:
            return self._merged(step, cfg.model, place)
        frozen = {}
        if cfg.init_from and cfg.optimizer.frozen and (kept := checkpoints.frozen(step)):
            init = self.init_workdir
            problem = "is missing"
            if init is not None and not self._has_the_same(init, kept):
                init = None
                problem = "has changed"
            if init is None:
                parts = ", ".join(sorted({path.split("/")[0] for path in kept}))
                cli.log(
                    f"note: {cfg.init_from}, which {self} was initialized from, {problem}: its frozen parameters "
                    f"({parts}) are taken from the checkpoint of {self}, in bfloat16"
                )
            else:
                frozen = flatten(init.params(only(kept, place)))
        trained = checkpoints.restore_params(
            step, cfg.model, lambda path, saved: None if path in frozen else place(path, saved)
        )
        return unflatten(flatten(trained) | frozen)

    # ------------------------------------------------------------------ adapters

    def parts(self) -> tuple[Params, dict[str, jax.Array]]:
        """(the newest parameters without adapters, in their original precision, {path: float32 array} of the adapters).
        Raises CheckpointError as ``params`` does."""
        return self._parts(self.latest, self.config.model, as_saved)

    def _parts(self, step: int, model: ModelConfig, place: Place) -> tuple[Params, dict[str, jax.Array]]:
        # place: the shardings, and None for what is left out, of adapters too
        def precise(path: str, saved: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct | None:
            wanted = place(path, saved)
            return wanted and jax.ShapeDtypeStruct(saved.shape, saved.dtype, sharding=wanted.sharding)

        cfg = self.config
        known = self.base
        own = flatten(self.checkpoints.restore_params(step, model, precise, cfg.lora, known))
        adapters = {path: own.pop(path) for path in list(own) if lora.is_adapter(path)}
        if cfg.init_from:
            init = self.init_workdir
            if init is None:
                raise CheckpointError(
                    f"{self} holds adapters of the model in {cfg.init_from}, which is missing; put it back there, or "
                    f"beside {self}"
                )
            base = flatten(init.params(only(known, precise)))
            require_the_same(known, fingerprint(base), f"{self}: its adapters belong to {init}")
            own |= base
        return unflatten(own), adapters

    def _merged(self, step: int, model: ModelConfig, place: Place) -> Params:
        adapters = self.config.lora
        wanted: dict[str, jax.ShapeDtypeStruct | None] = {}

        def noted(path: str, saved: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct | None:
            return wanted.setdefault(path, place(path, saved))

        params, own = self._parts(step, model, noted)
        # In the saved precision first, so that a matrix is the same whichever precision is wanted of it.
        dtypes = {path: leaf.dtype for path, leaf in flatten(params).items()}
        params = lora.quantize(params, adapters.base)  # what the adapters were trained with
        whole = flatten(lora.merged(unflatten(flatten(params) | own), adapters, dtypes.__getitem__))
        return unflatten({path: leaf.astype(wanted[path].dtype) for path, leaf in whole.items()})

    @property
    def base(self) -> dict[str, str]:
        """{path: checksum} of the frozen parameters that are in init_from. Raises CheckpointError without base.json."""
        if not self.config.init_from:  # a converted workdir holds all of them
            return {}
        if not (self.path / "base.json").is_file():
            raise CheckpointError(f"{self}/base.json is missing, which says what the adapters belong to")
        return read_json(self.path / "base.json")["checksums"]

    def keep_base(self, checksums: dict[str, str]) -> None:
        """Writes base.json, or, if the run resumes, compares with it. Every process calls it, one writes. Raises
        CheckpointError where the base has changed."""
        if has_finished(self.path):
            require_the_same(self.base, checksums, f"{self}: its adapters belong to {self.config.init_from}")
        elif hosts.leads():
            kept = dict(init_from=self.config.init_from, checksums=checksums)
            (self.path / "base.json").write_text(json.dumps(kept, indent=2))

    # ------------------------------------------------------------------ the base of frozen parameters

    def _has_the_same(self, init: Workdir, kept: dict[str, jax.ShapeDtypeStruct]) -> bool:
        """Whether ``init`` still holds the frozen parameters, judged by the smallest arrays."""
        few = []
        total = 0
        for path in sorted(kept, key=lambda path: math.prod(kept[path].shape)):
            total += math.prod(kept[path].shape)
            if few and total > COMPARED:
                break
            few.append(path)

        ours, theirs = (flatten(home.newest(home.config.model, only(few, as_saved))) for home in (self, init))
        return ours.keys() == theirs.keys() and all(
            np.array_equal(np.asarray(theirs[path]).astype(ours[path].dtype), np.asarray(ours[path])) for path in few
        )

    # ------------------------------------------------------------------ a run

    def model_for(self, init_from: str) -> ModelConfig:
        """The model of a run whose configuration has none: that of this workdir if it resumes, else that of
        init_from, else the default."""
        home = self if has_finished(self.path) else Workdir(init_from) if init_from else None
        return home.config.model if home else ModelConfig()

    def begin(self, cfg: Config, texts: Callable[[], Iterable[str]]) -> list[str]:
        """Writes a new run's config.json and the tokenizer and source/ of ``init_from``, or a tokenizer trained on
        ``texts()``; if the run resumes, compares the configuration instead. Every process calls it, one writes.

        Returns lines about settings that differ from those the run was started with. Raises ConfigError for a
        different model or different prompts, an invalid init_from, a tokenizer with more tokens than the decoder;
        TokenizerError, CheckpointError."""
        checkpoints = Checkpoints(self.path)
        notes = []
        resumes = checkpoints.latest() is not None
        if resumes:
            checkpoints.require_optimizer(checkpoints.latest())
            notes = self.validate_resume(cfg)
        elif cfg.init_from:
            _validate_init_from(cfg)
        elif cfg.lora:
            raise ConfigError("lora adapts a pretrained model; give its workdir with --config.init_from (see convert)")
        if not resumes and hosts.leads():  # the other processes read what it writes
            source = Workdir(cfg.init_from) if cfg.init_from else None
            tokenizer = source.tokenizer if source else tokens.train(texts(), cfg.model.decoder.vocab_size)
            self.path.mkdir(parents=True, exist_ok=True)
            if source and source.source:  # copied, so that exports do not need the other workdir
                shutil.copytree(source.source, self.path / "source", dirs_exist_ok=True)
            self.write(_with_absolute_init_from(cfg), tokenizer)
        hosts.wait("workdir")
        if not (hosts.leads() or self._tokenizer_file.exists()):
            raise ConfigError(
                f"this process cannot find {self._tokenizer_file}; --workdir must be a folder that all hosts share"
            )
        if (size := self.tokenizer.vocab_size) > cfg.model.decoder.vocab_size:
            raise ConfigError(
                f"decoder.vocab_size={cfg.model.decoder.vocab_size}, but {self._tokenizer_file} has {size} tokens"
            )
        return notes

    def write(self, cfg: Config, tokenizer: Tokenizer | None) -> None:
        """Writes config.json and, if there is one, the tokenizer."""
        (self.path / "config.json").write_text(json.dumps(to_dict(cfg), indent=2))
        if tokenizer is not None:
            tokenizer.save(self._tokenizer_file)

    def with_choices(self, cfg: Config) -> Config:
        """``cfg``, for "auto" with what the run chose when it was started, if it resumes."""
        if cfg.model.remat != "auto" or not has_finished(self.path):
            return cfg
        return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, remat=self.config.model.remat))

    def keep_choices(self, cfg: Config) -> None:
        """Writes what the run chose for "auto" to config.json. Every process calls it, one writes."""
        if hosts.leads():
            kept = self.config
            self.write(
                dataclasses.replace(kept, model=dataclasses.replace(kept.model, remat=cfg.model.remat)), tokenizer=None
            )

    def validate_resume(self, cfg: Config) -> list[str]:
        """Lines about settings that differ. Raises ConfigError if the model or its prompts differ from the
        workdir's."""
        now, before = (to_dict(_with_absolute_init_from(one)) for one in (cfg, self.config))
        for key, new, old in differences(now["model"], before["model"]):
            if key not in FREE_ON_RESUME:
                raise ConfigError(
                    f"{self} holds a different model: model.{key} is {new!r}; the run was started with {old!r}. Use "
                    f"that, or another --workdir, with --config.init_from={self} to start from these weights"
                )
        notes = []
        for key, new, old in differences(now, before):
            line = f"{key} is {new!r}; the run was started with {old!r}"
            if key.split(".")[0] == "lora" and key != "lora.dropout":
                raise ConfigError(f"{self} holds other adapters: {line}. Use that, or another --workdir")
            if key in PROMPT_SETTINGS:
                raise ConfigError(f"{self}: {line}. Resume with --config.{key}={old}, or use another --workdir")
            notes.append(f"note: {line}")
        return notes

    # ------------------------------------------------------------------ output of training and evaluation

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
        """The list of the records that a process left out."""
        return self.path / (f"faults.{process}.txt" if process else "faults.txt")

    @property
    def results(self) -> Path:
        """The folder of the evaluations' results."""
        return self.path / "eval"

    def reports(self) -> list[dict]:
        """The results of whole evaluations (without --limit), one per task, number of tokens and control, sorted by
        file name. Raises ConfigError for a broken file."""
        found = []
        for file in sorted(self.results.glob("*.json")):
            report = read_json(file)
            of_budget = f"{file.stem}_".startswith(f"{report.get('task')}_{report.get('budget')}_")
            if of_budget and not report.get("limit"):
                found.append(report)
        return found

    def write_report(self, report: dict, *marks: str) -> None:
        """Writes eval/TASK.json, the last evaluation of the task, and eval/TASK_BUDGET.json.

        marks: suffixes of the names, e.g. for a control, so that it overwrites no other report. A ``limit`` in the
        report adds one."""
        marks = (*marks, f"limit{report['limit']}") if report["limit"] else marks
        self.results.mkdir(parents=True, exist_ok=True)
        text = json.dumps(report, indent=2)
        for name in (report["task"], f"{report['task']}_{report['budget']}"):
            (self.results / f"{'_'.join((name, *marks))}.json").write_text(text)


def _validate_init_from(cfg: Config) -> None:
    """Raises ConfigError or CheckpointError unless init_from holds the model of ``cfg``."""
    source = Workdir(cfg.init_from)
    if not source.exists:
        raise ConfigError(f"config.init_from={source} holds no checkpoints; expected a workdir of train.py or convert")
    theirs = source.config.model
    theirs.require_whole(f"config.init_from={source}: training")
    for key, new, old in differences(to_dict(cfg.model), to_dict(theirs)):
        if key not in FREE_ON_INIT:
            raise ConfigError(
                f"config.init_from={source} holds a different model: model.{key} is {new!r}, and {old!r} there. Use "
                "its settings; a configuration without a model has them all"
            )
    try:
        source.checkpoints.close()
    except CheckpointError as error:
        raise CheckpointError(f"config.init_from: {error}") from error


def _with_absolute_init_from(cfg: Config) -> Config:
    return dataclasses.replace(cfg, init_from=str(Path(cfg.init_from).absolute())) if cfg.init_from else cfg

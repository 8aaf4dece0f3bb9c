"""Data, optimizer, training, mesh, evaluation, and the whole of a run."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

from deltallava_jax.config.checks import require, require_at_least
from deltallava_jax.config.model import DTYPES, ModelConfig
from deltallava_jax.errors import ConfigError

ASPECTS = ("square", "pad", "squash")
OPTIMIZERS = ("adamw", "muon")


@dataclass(frozen=True)
class DataConfig:
    """The training data and its packing."""

    dataset: str = "easy_vqa"  # easy_vqa, or llava: the files of json, or array_record
    json: tuple[str, ...] = ()  # JSON or JSONL files of LLaVA's records
    weights: tuple[float, ...] = ()  # how often each of the files is taken; empty: once
    images: str = ""  # the folder that image paths of the records begin from
    array_record: str = ""  # in place of json and images: a folder that data build made
    aspect: str = "pad"  # how images become square: padded, shortest side and crop (square), or squashed (squash)
    template: str = "vicuna_v1"  # of the text: vicuna_v1, plain (captions), chatml, llama_3, or brief (no prefixes)
    turns: int = 0  # easy_vqa: questions a conversation; 0: all of an image's questions
    independent_rounds: bool = False  # a conversation's questions see its image but not each other
    rows: int = 16  # rows of the global batch
    row_length: int = 2048  # tokens of a row, text and visual
    packed: bool = True  # False: LLaVA-1.5's batches, a conversation a row, padded, grouped by modality
    images_per_row: int = 0  # places for images in a row; 0: chosen from the data for each budget
    workers: int = 1  # processes that load data; 0: in the training process
    max_bad_fraction: float = 0.01  # of the records: with a larger fraction that cannot be used the run ends

    def __post_init__(self):
        require_at_least(1, "data", self, "rows")
        require_at_least(8, "data", self, "row_length")
        require_at_least(0, "data", self, "turns", "images_per_row", "workers")
        require(
            self.dataset != "llava" or bool(self.array_record or (self.json and self.images)),
            "data.dataset=llava needs data.json (files of records) and data.images (the image folder), or "
            "data.array_record (a folder that data build made)",
        )
        require(
            not self.weights or (len(self.weights) == len(self.json) and min(self.weights) > 0),
            f"data.weights={self.weights}; expected a number above 0 for each of the {len(self.json)} files",
        )
        require(self.aspect in ASPECTS, f"data.aspect is {self.aspect!r}; known: {', '.join(ASPECTS)}")
        require(0 <= self.max_bad_fraction <= 1, f"data.max_bad_fraction={self.max_bad_fraction}; expected 0 to 1")

    def validate_dataset_settings(self) -> None:
        """ConfigError for a setting of another data set, which training would ignore.

        Apart from the other checks: configurations of runs that have been are read as they are."""
        other = ("turns",) if self.dataset == "llava" else ("json", "weights", "images", "array_record")
        home = "easy_vqa" if self.dataset == "llava" else "llava"
        for name in other:
            value = getattr(self, name)
            require(
                not value, f"data.{name}={value!r} is read with data.dataset={home}; data.dataset is {self.dataset!r}"
            )


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW or Muon, with linear warmup and cosine decay.

    Muon: the matrices of the layers and of the projector take orthogonalised momentum, everything else AdamW. What
    matches ``frozen`` ("vision/", "decoder/embed") stays as it is, in bfloat16 and out of the optimizer.
    """

    name: str = "adamw"  # adamw; or muon, for the matrices of layers and projector, with AdamW for the rest
    lr: float = 2e-5  # the peak learning rate; of muon that of what AdamW updates
    warmup_ratio: float = 0.03  # share of the steps over which the rate rises linearly to its peak
    final_lr_ratio: float = 0.0  # of the peak: where the cosine decay ends at the last step
    b1: float = 0.9  # AdamW's decay of the first moment
    b2: float = 0.999  # AdamW's decay of the second moment
    eps: float = 1e-8  # added to the denominator of an update
    weight_decay: float = 0.0  # decoupled, times the learning rate; of matrices alone
    clip_norm: float = 1.0  # largest global norm of the gradient, beyond which it is scaled down; 0: none
    muon_rate: float = 1.0  # of muon: its learning rate as a multiple of lr
    muon_momentum: float = 0.95  # of muon: the decay of its momentum
    muon_iterations: int = 5  # of muon: steps of Newton and Schulz; fewer are faster and orthogonalise less exactly
    mu_dtype: str = "float32"  # of the first moment; bfloat16 saves two bytes a trained parameter
    accumulation: int = 1  # microbatches that the batch is split into, one after the other
    frozen: tuple[str, ...] = ()  # regular expressions over parameter paths; what matches does not train, in bfloat16

    def __post_init__(self):
        require(self.name in OPTIMIZERS, f"optimizer.name is {self.name!r}; known: {', '.join(OPTIMIZERS)}")
        for name in ("lr", "eps", "muon_rate"):
            value = getattr(self, name)
            require(0 < value < math.inf, f"optimizer.{name}={value}; expected more than 0, and finite")
        for name in ("weight_decay", "clip_norm"):
            value = getattr(self, name)
            require(0 <= value < math.inf, f"optimizer.{name}={value}; expected 0 or more, and finite")
        for name in ("b1", "b2", "muon_momentum"):
            value = getattr(self, name)
            require(0 <= value < 1, f"optimizer.{name}={value}; expected 0 to below 1")
        for name in ("warmup_ratio", "final_lr_ratio"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"optimizer.{name}={value}; expected 0 to 1")
        require_at_least(1, "optimizer", self, "muon_iterations", "accumulation")
        require(self.mu_dtype in DTYPES, f"optimizer.mu_dtype is {self.mu_dtype!r}; known: {', '.join(DTYPES)}")
        for pattern in self.frozen:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ConfigError(f"optimizer.frozen pattern {pattern!r} is no regular expression: {error}") from error


@dataclass(frozen=True)
class TrainingConfig:
    """Length of the run and what happens how often."""

    epochs: float = 1.0  # passes over the training data
    steps: int = 0  # of the optimizer; more than 0: exactly so many, whatever epochs is
    log_every: int = 10  # steps between lines of the log
    eval_every: int = 0  # steps between evaluations; 0: none
    checkpoint_every: int = 500  # steps between checkpoints; 0: one at the end alone
    keep_checkpoints: int = 2  # how many of the newest checkpoints are kept
    keep_best: int = 0  # checkpoints kept besides: the most accurate of those saved at a step that was evaluated
    llavolta: tuple[tuple[int, ...], ...] = ()  # visual tokens pooled in equal parts: (stride, decoder layer)
    every_budget: bool = False  # an elastic model: each step averages the loss of all budgets, not one that is drawn

    def __post_init__(self):
        require_at_least(
            0, "training", self, "steps", "log_every", "eval_every", "checkpoint_every", "keep_best", "epochs"
        )
        require_at_least(1, "training", self, "keep_checkpoints")
        require(
            not self.keep_best or self.eval_every > 0,
            f"training.keep_best={self.keep_best} needs training.eval_every: the best are those of highest accuracy",
        )
        for stage in self.llavolta:
            require(
                len(stage) == 2 and stage[0] >= 1 and stage[1] >= 0,
                f"training.llavolta has the stage {stage}; expected (stride, decoder layer), e.g. (8, 2), or (1, 0)",
            )
        require(self.epochs > 0 or self.steps > 0, f"training.epochs={self.epochs}; expected more than 0")


ROW_AXES = ("data", "fsdp")  # the mesh axes that share the rows of a batch


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis of the mesh; -1 once, for what the others leave."""

    data: int = -1  # devices that share the rows of a batch, with a copy of the parameters each
    fsdp: int = 1  # devices that share the rows, the parameters and the optimizer's state
    tensor: int = 1  # devices that share every layer's heads and widths

    def sizes(self, devices: int) -> tuple[int, int, int]:
        """(data, fsdp, tensor) for a number of devices.

        Raises ConfigError if they cannot be laid out so."""
        sizes = [self.data, self.fsdp, self.tensor]
        asked = f"mesh data={self.data}, fsdp={self.fsdp}, tensor={self.tensor}"
        require(sizes.count(-1) <= 1 and all(n == -1 or n > 0 for n in sizes), f"{asked}: one -1, the rest above 0")
        fixed = math.prod(n for n in sizes if n != -1)
        require(devices % fixed == 0, f"{asked} does not fit {devices} devices")
        sizes = [devices // fixed if n == -1 else n for n in sizes]
        require(math.prod(sizes) == devices, f"{asked} uses {math.prod(sizes)} of {devices} devices")
        return tuple(sizes)


@dataclass(frozen=True)
class EvaluationConfig:
    """How answers are generated and scored."""

    batch_size: int = 256  # questions that are answered at a time, at most
    max_new_tokens: int = 8  # length of an answer, in tokens, at most
    limit: int = 1024  # questions asked in an evaluation during training; eval.py asks all; 0: all

    def __post_init__(self):
        require_at_least(1, "evaluation", self, "batch_size", "max_new_tokens")
        require_at_least(0, "evaluation", self, "limit")


@dataclass(frozen=True)
class Config:
    name: str = "unnamed"  # of the run, as reports call it
    seed: int = 0  # of fresh parameters, the order of the data and the budgets that are drawn; 0 to 2**32 - 1
    init_from: str = ""  # a workdir whose newest parameters and tokenizer the training begins with
    model: ModelConfig = field(default_factory=ModelConfig)  # tower, projector and decoder
    data: DataConfig = field(default_factory=DataConfig)  # the training data and their packing
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)  # how the parameters are updated, and which
    training: TrainingConfig = field(default_factory=TrainingConfig)  # the run's length, and what happens how often
    mesh: MeshConfig = field(default_factory=MeshConfig)  # devices along each axis; -1 once, for what the others leave
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)  # how answers are generated and scored

    def __post_init__(self):
        require_at_least(0, "config", self, "seed")
        require(self.seed < 2**32, f"config.seed={self.seed}; expected less than 2**32: a random key holds no more")

    def validate_devices(self, devices: int) -> tuple[int, int, int]:
        """Mesh sizes (data, fsdp, tensor) on that many devices; ConfigError if the batch or a width does not divide."""
        data, fsdp, tensor = self.mesh.sizes(devices)
        rows, micro = self.data.rows, self.optimizer.accumulation
        fits = -(-rows // (micro * data * fsdp)) * micro * data * fsdp
        remedy = f"; --config.data.rows={fits} is the next that is"
        require(rows % micro == 0, f"data.rows={rows} is not divisible by optimizer.accumulation={micro}{remedy}")
        require(
            (rows // micro) % (data * fsdp) == 0,
            f"data.rows={rows}{f' / {micro} microbatches' if micro > 1 else ''} is not divisible by the "
            f"{data * fsdp} devices of mesh data={data} x fsdp={fsdp}{remedy}",
        )
        for part, name in (("vision", "heads"), ("decoder", "kv_heads")):
            heads = getattr(getattr(self.model, part), name, 0)  # 0: the model is without that part
            require(heads % tensor == 0, f"{part}.{name}={heads} is not divisible by mesh tensor={tensor}")
        return data, fsdp, tensor

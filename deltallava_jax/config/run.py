"""Settings of data, optimizer, training, mesh and evaluation, and of a whole run."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

from deltallava_jax.config.checks import require, require_at_least, require_pattern
from deltallava_jax.config.model import DTYPES, ModelConfig

ASPECTS = ("square", "pad", "squash")
OPTIMIZERS = ("adamw", "muon")
LORA_BASES = ("bfloat16", "int8", "nf4")


@dataclass(frozen=True)
class DataConfig:
    """The training data and its packing."""

    dataset: str = "easy_vqa"  # easy_vqa, or llava: the records of json or array_record
    json: tuple[str, ...] = ()  # JSON or JSONL files of LLaVA's records
    weights: tuple[float, ...] = ()  # repetitions of each file per epoch; empty: 1 each
    images: str = ""  # root folder of the records' image paths
    array_record: str = ""  # in place of json and images: a folder that data build wrote
    aspect: str = "pad"  # how images become square: pad, square (shortest side, then crop), or squash
    template: str = "vicuna_v1"  # of the text: vicuna_v1, plain (captions), chatml, llama_3, or brief (no prefixes)
    turns: int = 0  # easy_vqa: questions per conversation; 0: all of an image's questions
    independent_rounds: bool = False  # a conversation's questions attend to its image but not to each other
    rows: int = 16  # rows of the global batch
    row_length: int = 2048  # tokens of a row, text and visual
    packed: bool = True  # False: LLaVA-1.5's batches, one conversation per row, padded, grouped by modality
    images_per_row: int = 0  # the most images of a row; 0: chosen from the data for each budget
    workers: int = 1  # data loading processes; 0: in the training process
    max_bad_fraction: float = 0.01  # of the records: with more unusable ones the run stops

    def __post_init__(self):
        require_at_least(1, "data", self, "rows")
        require_at_least(8, "data", self, "row_length")
        require_at_least(0, "data", self, "turns", "images_per_row", "workers")
        require(
            self.dataset != "llava" or bool(self.array_record or (self.json and self.images)),
            "data.dataset=llava needs data.json (files of records) and data.images (the image folder), or "
            "data.array_record (a folder that data build wrote)",
        )
        require(
            not self.weights or (len(self.weights) == len(self.json) and min(self.weights) > 0),
            f"data.weights={self.weights}; expected a number above 0 for each of the {len(self.json)} files",
        )
        require(self.aspect in ASPECTS, f"data.aspect is {self.aspect!r}; known: {', '.join(ASPECTS)}")
        require(0 <= self.max_bad_fraction <= 1, f"data.max_bad_fraction={self.max_bad_fraction}; expected 0 to 1")

    def validate_dataset_settings(self) -> None:
        """Raises ConfigError for a setting of another data set, which training would ignore.

        Not in __post_init__: configurations of old runs must load."""
        foreign = ("turns",) if self.dataset == "llava" else ("json", "weights", "images", "array_record")
        owner = "easy_vqa" if self.dataset == "llava" else "llava"
        for name in foreign:
            value = getattr(self, name)
            require(
                not value,
                f"data.{name}={value!r} is a setting of data.dataset={owner}, but data.dataset is {self.dataset!r}",
            )


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW or Muon, with linear warmup and cosine decay.

    Muon updates the matrices of the layers and of the projector by orthogonalised momentum, AdamW everything else.
    Parameters that match ``frozen`` ("vision/", "decoder/embed") are not trained, and stored in bfloat16.
    """

    name: str = "adamw"  # adamw; or muon, for the matrices of layers and projector, with AdamW for the rest
    lr: float = 2e-5  # peak learning rate (with muon, AdamW's)
    warmup_ratio: float = 0.03  # share of the steps over which the rate rises linearly to its peak
    final_lr_ratio: float = 0.0  # learning rate at the end of the cosine decay, relative to the peak
    b1: float = 0.9  # AdamW's decay of the first moment
    b2: float = 0.999  # AdamW's decay of the second moment
    eps: float = 1e-8  # added to the denominator of an update
    weight_decay: float = 0.0  # decoupled, multiplied by the learning rate; of matrices only
    clip_norm: float = 1.0  # largest global norm of the gradient, to which it is scaled down; 0: no clipping
    muon_rate: float = 1.0  # muon: its learning rate as a multiple of lr
    muon_momentum: float = 0.95  # muon: decay of its momentum
    muon_iterations: int = 5  # muon: Newton-Schulz steps; fewer are faster and orthogonalise less exactly
    mu_dtype: str = "float32"  # of the first moment; bfloat16 saves two bytes per trained parameter
    gradient_dtype: str = "float32"  # in which devices add up matrices' gradients if model.dtype is bfloat16
    accumulation: int = 1  # microbatches of a batch, whose gradients are accumulated
    frozen: tuple[str, ...] = ()  # regular expressions of parameter paths that are not trained, and kept in bfloat16
    # Pairs, or a dict: (regular expression of parameter paths, a peak learning rate, or "0.1x" for 0.1 times lr);
    # the first that matches decides.
    rates: tuple[tuple[float | str, ...], ...] = ()  # learning rates of parts, in place of lr

    def __post_init__(self):
        if isinstance(self.rates, dict):
            object.__setattr__(self, "rates", tuple(self.rates.items()))
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
        for name in ("mu_dtype", "gradient_dtype"):
            value = getattr(self, name)
            require(value in DTYPES, f"optimizer.{name} is {value!r}; known: {', '.join(DTYPES)}")
        for pattern in self.frozen:
            require_pattern("optimizer.frozen", pattern)
        for pair in self.rates:
            pattern, value = pair if len(pair) == 2 else (None, None)
            require(isinstance(pattern, str), f"optimizer.rates has {pair}; expected {{pattern: rate}}")
            require_pattern("optimizer.rates", pattern)
            require(
                0 < self._rate(value) < math.inf,
                f"optimizer.rates has {value!r} for {pattern!r}; expected a learning rate above 0, or a multiple of "
                'optimizer.lr such as "0.1x"; what is not to train goes into optimizer.frozen',
            )

    def rate_of(self, path: str) -> float:
        """The peak learning rate of a parameter."""
        return next((self._rate(value) for pattern, value in self.rates if re.search(pattern, path)), self.lr)

    def _rate(self, value: float | str) -> float:
        """NaN for a text that is no multiple."""
        if not isinstance(value, str):
            return value
        try:
            return self.lr * float(value.strip().removesuffix("x")) if value.strip().endswith("x") else math.nan
        except ValueError:
            return math.nan


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (Hu et al. 2021, arXiv:2106.09685) on the matrices of the layers of a pretrained model:
    y = x W + scale * (dropout(x) A) B, with W frozen. The defaults are LLaVA-1.5's."""

    rank: int = 128  # columns of A and rows of B
    alpha: float = 256.0  # the scale is alpha / rank
    dropout: float = 0.05  # share of the adapters' input that is dropped in training
    targets: str = "q,k,v,o,gate,up,down"  # the decoder's matrices, or a regular expression of parameter paths
    rslora: bool = False  # the scale is alpha / rank**0.5 (Kalajdzievski 2023, arXiv:2312.03732)
    base: str = "bfloat16"  # how the decoder's frozen matrices are kept: bfloat16, int8 or nf4 (QLoRA)

    def __post_init__(self):
        require_at_least(1, "lora", self, "rank")
        require(0 < self.alpha < math.inf, f"lora.alpha={self.alpha}; expected more than 0, and finite")
        require(0 <= self.dropout < 1, f"lora.dropout={self.dropout}; expected 0 to below 1")
        require(self.base in LORA_BASES, f"lora.base is {self.base!r}; known: {', '.join(LORA_BASES)}")
        require_pattern("lora.targets", self.targets)

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


@dataclass(frozen=True)
class TrainingConfig:
    """Length of the run, and the intervals of logs, evaluations and checkpoints."""

    epochs: float = 1.0  # passes over the training data
    steps: int = 0  # optimizer steps, overriding epochs; 0: by epochs
    log_every: int = 10  # steps between log lines
    eval_every: int = 0  # steps between evaluations; 0: none
    checkpoint_every: int = 500  # steps between checkpoints; 0: only one, at the end
    keep_checkpoints: int = 2  # number of the newest checkpoints to keep
    keep_best: int = 0  # number of the most accurate evaluated checkpoints to keep besides
    llavolta: tuple[tuple[int, ...], ...] = ()  # pooling of visual tokens in equal phases: (stride, decoder layer)
    every_budget: bool = False  # elastic models: each step averages the loss over all budgets instead of drawing one

    def __post_init__(self):
        require_at_least(
            0, "training", self, "steps", "log_every", "eval_every", "checkpoint_every", "keep_best", "epochs"
        )
        require_at_least(1, "training", self, "keep_checkpoints")
        require(
            not self.keep_best or self.eval_every > 0,
            f"training.keep_best={self.keep_best} needs training.eval_every, as it ranks checkpoints by accuracy",
        )
        for phase in self.llavolta:
            require(
                len(phase) == 2 and phase[0] >= 1 and phase[1] >= 0,
                f"training.llavolta has the phase {phase}; expected (stride, decoder layer), e.g. (8, 2), or (1, 0)",
            )
        require(self.epochs > 0 or self.steps > 0, f"training.epochs={self.epochs}; expected more than 0")


ROW_AXES = ("data", "fsdp")  # the mesh axes over which the rows of a batch are sharded


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis of the mesh; one axis may be -1, for all remaining devices."""

    data: int = -1  # devices over which the rows of a batch are sharded and the parameters replicated
    fsdp: int = 1  # devices over which the rows, the parameters and the optimizer's state are sharded
    tensor: int = 1  # devices over which every layer's heads and widths are sharded

    def sizes(self, devices: int) -> tuple[int, int, int]:
        """(data, fsdp, tensor) for a number of devices. Raises ConfigError if they do not fit."""
        sizes = [self.data, self.fsdp, self.tensor]
        mesh = f"mesh data={self.data}, fsdp={self.fsdp}, tensor={self.tensor}"
        valid = sizes.count(-1) <= 1 and all(n == -1 or n > 0 for n in sizes)
        require(valid, f"{mesh}: expected numbers above 0, of which one may be -1")
        fixed = math.prod(n for n in sizes if n != -1)
        require(devices % fixed == 0, f"{mesh} does not fit {devices} devices")
        sizes = [devices // fixed if n == -1 else n for n in sizes]
        require(math.prod(sizes) == devices, f"{mesh} uses {math.prod(sizes)} of {devices} devices")
        return tuple(sizes)


@dataclass(frozen=True)
class EvaluationConfig:
    """How answers are generated and scored."""

    batch_size: int = 256  # the most questions in a batch
    max_new_tokens: int = 8  # the most tokens of an answer
    limit: int = 1024  # questions of an evaluation during training; eval.py uses all; 0: all

    def __post_init__(self):
        require_at_least(1, "evaluation", self, "batch_size", "max_new_tokens")
        require_at_least(0, "evaluation", self, "limit")


@dataclass(frozen=True)
class Config:
    name: str = "unnamed"  # name of the run in reports
    seed: int = 0  # seed of initial parameters, data order and drawn budgets; 0 to 2**32 - 1
    init_from: str = ""  # a workdir whose newest parameters and tokenizer training starts from
    model: ModelConfig = field(default_factory=ModelConfig)  # tower, projector and decoder
    data: DataConfig = field(default_factory=DataConfig)  # the training data and its packing
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)  # how the parameters are updated, and which
    lora: LoraConfig | None = None  # adapters beside frozen matrices of tower and decoder; None: off
    training: TrainingConfig = field(default_factory=TrainingConfig)  # the run's length and its intervals
    mesh: MeshConfig = field(default_factory=MeshConfig)  # devices along each axis; -1: all remaining devices
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)  # how answers are generated and scored

    def __post_init__(self):
        require_at_least(0, "config", self, "seed")
        require(self.seed < 2**32, f"config.seed={self.seed}; expected less than 2**32, the limit of a random key")

    def validate_devices(self, devices: int) -> tuple[int, int, int]:
        """Mesh sizes (data, fsdp, tensor) on ``devices`` devices. Raises ConfigError if the rows of a batch or the
        heads of a part are not divisible by them."""
        data, fsdp, tensor = self.mesh.sizes(devices)
        rows, micro = self.data.rows, self.optimizer.accumulation
        fits = -(-rows // (micro * data * fsdp)) * micro * data * fsdp
        remedy = f"; --config.data.rows={fits} is the next divisible number"
        require(rows % micro == 0, f"data.rows={rows} is not divisible by optimizer.accumulation={micro}{remedy}")
        require(
            (rows // micro) % (data * fsdp) == 0,
            f"data.rows={rows}{f' / {micro} microbatches' if micro > 1 else ''} is not divisible by the "
            f"{data * fsdp} devices of mesh data={data} x fsdp={fsdp}{remedy}",
        )
        for part, name in (("vision", "heads"), ("decoder", "kv_heads")):
            heads = getattr(getattr(self.model, part), name, 0)  # 0: the part is absent
            require(heads % tensor == 0, f"{part}.{name}={heads} is not divisible by mesh tensor={tensor}")
        return data, fsdp, tensor

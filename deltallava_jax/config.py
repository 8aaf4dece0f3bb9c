"""Every setting of a run: frozen dataclasses, presets by name, validation, JSON round trip.

A configuration file is a Python file with ``get_config() -> Config``. Values can be overridden by dotted path
(``optimizer.lr=1e-3``); a field that holds a dataclass takes the name of a preset (``model.decoder=vicuna_7b``).
Anything wrong raises ConfigError with one line that says what was expected.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import importlib.util
import json
import math
import re
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path


class ConfigError(ValueError):
    """A setting that cannot work; the message is one line for the user."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _require_at_least(least: int, section: str, config, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(value >= least, f"{section}.{name}={value}; expected {least} or more")


@dataclass(frozen=True)
class VisionConfig:
    """A ViT tower. ``clip``: CLS token, LayerNorm before the layers. ``siglip``: neither, a bias on the patches."""

    family: str = "clip"
    image_size: int = 336
    patch_size: int = 14
    width: int = 1024
    layers: int = 24
    heads: int = 16
    mlp_width: int = 4096
    norm_eps: float = 1e-5
    image_mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)

    def __post_init__(self):
        _require_at_least(1, "vision", self, "patch_size", "width", "layers", "heads", "mlp_width")
        _require(self.family in ("clip", "siglip"), f"vision.family is {self.family!r}; known: clip, siglip")
        _require(
            self.width % self.heads == 0,
            f"vision.heads={self.heads} does not divide vision.width={self.width}",
        )
        _require(
            self.image_size >= self.patch_size,
            f"vision.image_size={self.image_size} is smaller than vision.patch_size={self.patch_size}",
        )

    @property
    def grid(self) -> int:
        """Patches a side; like the Hugging Face towers, a remainder of the image is cut off."""
        return self.image_size // self.patch_size


ABLATIONS = ("none", "no_emhsa", "no_delta", "no_tb")


@dataclass(frozen=True)
class ProjectorConfig:
    """How patches become visual tokens. Fields that a system does not use are ignored by it.

    ``scale_factor`` s gives (grid/s)^2 tokens an image; a tuple makes the model elastic: a budget is drawn each step.
    ``levels`` are hidden-state indices of the tower (index i is the output of layer i); empty means the release's
    relative depths, 12, 16, 22 and 23 of 24. ``select_layer`` is the hidden state of the query features, from the end.
    """

    name: str = "delta"
    grid: int = 24
    scale_factor: int | tuple[int, ...] = 2
    in_width: int = 1024
    out_width: int = 4096
    embed_width: int = 0  # 0: in_width
    select_layer: int = -2
    levels: tuple[int, ...] = ()
    level_count: int = 4
    head_dim: int = 128
    block_head_dim: int = 32
    rank: int = 16
    mix_ratio: float = 0.75
    drop_path: float = 0.1
    initializer_range: float = 0.02  # standard deviation of fresh Linear weights; small widths want more
    reduction: int = 1  # EMHSA's spatial reduction sr
    window: int = 1  # paper variant: query windows of window x window
    mlp_width: int = 4096  # paper variant: hidden width of equation 11
    variant: str = "release"
    ablation: str = "none"

    def __post_init__(self):
        _require_at_least(1, "projector", self, "grid", "in_width", "out_width", "level_count", "rank", "mlp_width")
        _require_at_least(1, "projector", self, "head_dim", "block_head_dim", "window", "reduction")
        _require(0 <= self.drop_path < 1, f"projector.drop_path={self.drop_path}; expected 0 to below 1")
        _require(0 < self.mix_ratio < 1, f"projector.mix_ratio={self.mix_ratio}; expected between 0 and 1")
        for name, known in (("variant", ("release", "paper")), ("ablation", ABLATIONS)):
            value = getattr(self, name)
            _require(value in known, f"projector.{name} is {value!r}; known: {', '.join(known)}")
        _require(
            not self.levels or len(self.levels) == self.level_count,
            f"projector.levels has {len(self.levels)} entries; projector.level_count is {self.level_count}",
        )
        if self.name == "delta":
            self._check_scale()
            self._check_delta()

    def _check_scale(self):
        divisors = [s for s in range(1, self.grid + 1) if self.grid % s == 0]
        valid = f"valid values: {', '.join(map(str, divisors))}"
        _require(self.scale_factors != (), f"projector.scale_factor is empty; {valid}")
        for s in self.scale_factors:
            _require(
                s in divisors,
                f"projector.scale_factor={s} does not divide the {self.grid}x{self.grid} patch grid; {valid}",
            )

    def _check_delta(self):
        width, paper = self.width, self.variant == "paper"
        for name, of in (("head_dim", width), ("block_head_dim", width), ("block_head_dim", self.in_width)):
            value = getattr(self, name)
            _require(of % value == 0, f"projector.{name}={value} does not divide the projector's width {of}")
        _require(
            width >= 2 * self.block_head_dim,
            f"projector.block_head_dim={self.block_head_dim}; the block's two branches need two heads in width {width}",
        )
        _require(
            self.in_width % 4 == 0, f"projector.in_width={self.in_width}; the position table needs a multiple of 4"
        )
        _require(
            paper or width == self.in_width,
            f"projector.embed_width={self.embed_width}; the release variant keeps in_width={self.in_width}",
        )
        _require(
            bool(self.levels) or self.level_count <= 4,
            f"projector.level_count={self.level_count}; name the tower's layers in projector.levels",
        )
        for side in (self.grid // s for s in self.scale_factors):
            _require(
                side % self.window == 0, f"projector.window={self.window} does not divide the {side}x{side} query grid"
            )
            _require(
                self.reduction <= side,
                f"projector.reduction={self.reduction} leaves no keys of a {side}x{side} query grid",
            )

    @property
    def width(self) -> int:
        return self.embed_width or self.in_width

    @property
    def scale_factors(self) -> tuple[int, ...]:
        return self.scale_factor if isinstance(self.scale_factor, tuple) else (self.scale_factor,)


@dataclass(frozen=True)
class DecoderConfig:
    """A Llama-architecture decoder (Vicuna, Llama, Qwen2 with ``qkv_bias``)."""

    vocab_size: int = 32000
    width: int = 4096
    layers: int = 32
    heads: int = 32
    kv_heads: int = 32
    mlp_width: int = 11008
    rope_base: float = 10000.0
    norm_eps: float = 1e-5
    qkv_bias: bool = False
    tied_head: bool = False
    initializer_range: float = 0.02  # standard deviation of fresh weights; small widths want more

    def __post_init__(self):
        _require_at_least(1, "decoder", self, "vocab_size", "width", "layers", "heads", "kv_heads", "mlp_width")
        _require(
            self.width % self.heads == 0,
            f"decoder.heads={self.heads} does not divide decoder.width={self.width}",
        )
        _require(
            self.heads % self.kv_heads == 0,
            f"decoder.kv_heads={self.kv_heads} does not divide decoder.heads={self.heads}",
        )
        _require(self.head_dim % 2 == 0, f"decoder head width {self.head_dim} is odd; rotary positions need it even")

    @property
    def head_dim(self) -> int:
        return self.width // self.heads


REMAT_POLICIES = ("none", "dots", "full")


@dataclass(frozen=True)
class ModelConfig:
    """A whole vision-language model. ``dtype`` is the compute dtype; parameters that train stay float32."""

    vision: VisionConfig = field(default_factory=VisionConfig)
    projector: ProjectorConfig = field(default_factory=ProjectorConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    dtype: str = "bfloat16"
    remat: str = "none"
    loss_chunk: int = 512  # row positions whose logits exist at a time

    def __post_init__(self):
        p, v, d = self.projector, self.vision, self.decoder
        _require_at_least(1, "model", self, "loss_chunk")
        _require(self.dtype in ("bfloat16", "float32"), f"model.dtype is {self.dtype!r}; known: bfloat16, float32")
        _require(self.remat in REMAT_POLICIES, f"model.remat is {self.remat!r}; known: {', '.join(REMAT_POLICIES)}")
        _require(p.grid == v.grid, f"projector.grid={p.grid}, but the vision tower makes a {v.grid}x{v.grid} grid")
        _require(p.in_width == v.width, f"projector.in_width={p.in_width}, but vision.width={v.width}")
        _require(p.out_width == d.width, f"projector.out_width={p.out_width}, but decoder.width={d.width}")
        _require(
            all(0 <= level <= v.layers for level in p.levels),
            f"projector.levels={p.levels}; the tower has {v.layers} layers",
        )
        _require(
            -v.layers <= p.select_layer <= -1,
            f"projector.select_layer={p.select_layer}; expected -{v.layers} to -1 for {v.layers} layers",
        )


@dataclass(frozen=True)
class DataConfig:
    """The training data and its packing. ``row_length`` S bounds text plus visual tokens of a row."""

    dataset: str = "easy_vqa"
    template: str = "vicuna_v1"
    turns: int = 0  # easy_vqa: questions a conversation; 0: all of an image's questions
    independent_rounds: bool = False  # a conversation's questions see its image but not each other
    rows: int = 16  # rows of the global batch
    row_length: int = 2048
    images_per_row: int = 0  # 0: chosen from the data for each budget
    workers: int = 1  # processes that load data; 0: in the training process
    max_bad_fraction: float = 0.01  # of the samples seen; more than this stops the run

    def __post_init__(self):
        _require_at_least(1, "data", self, "rows")
        _require_at_least(8, "data", self, "row_length")
        _require_at_least(0, "data", self, "turns", "images_per_row", "workers")
        _require(0 <= self.max_bad_fraction <= 1, f"data.max_bad_fraction={self.max_bad_fraction}; expected 0 to 1")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warmup and cosine decay to ``final_lr_ratio`` of the peak.

    ``frozen`` holds regular expressions over parameter paths ("vision/", "decoder/embed"); what matches stays as it
    is, in bfloat16 and out of the optimizer. ``accumulation`` splits the batch into that many microbatches.
    """

    lr: float = 2e-5
    warmup_ratio: float = 0.03
    final_lr_ratio: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    accumulation: int = 1
    frozen: tuple[str, ...] = ()

    def __post_init__(self):
        _require(self.lr > 0, f"optimizer.lr={self.lr}; expected more than 0")
        _require_at_least(1, "optimizer", self, "accumulation")
        for pattern in self.frozen:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ConfigError(f"optimizer.frozen pattern {pattern!r} is no regular expression: {error}") from error


@dataclass(frozen=True)
class TrainingConfig:
    """Length of the run and what happens how often, in steps; 0 switches a thing off."""

    epochs: float = 1.0
    steps: int = 0  # more than 0: exactly so many steps, whatever ``epochs`` says
    log_every: int = 10
    eval_every: int = 0
    checkpoint_every: int = 500
    keep_checkpoints: int = 2

    def __post_init__(self):
        _require_at_least(0, "training", self, "steps", "log_every", "eval_every", "checkpoint_every")
        _require_at_least(1, "training", self, "keep_checkpoints")
        _require(self.epochs > 0 or self.steps > 0, f"training.epochs={self.epochs}; expected more than 0")


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis of the mesh; -1 once, for what the others leave."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1

    def sizes(self, devices: int) -> tuple[int, int, int]:
        """(data, fsdp, tensor) for a number of devices.

        Raises ConfigError if they cannot be laid out so."""
        sizes = [self.data, self.fsdp, self.tensor]
        asked = f"mesh data={self.data}, fsdp={self.fsdp}, tensor={self.tensor}"
        _require(sizes.count(-1) <= 1 and all(n == -1 or n > 0 for n in sizes), f"{asked}: one -1, the rest above 0")
        fixed = math.prod(n for n in sizes if n != -1)
        _require(devices % fixed == 0, f"{asked} does not fit {devices} devices")
        sizes = [devices // fixed if n == -1 else n for n in sizes]
        _require(math.prod(sizes) == devices, f"{asked} uses {math.prod(sizes)} of {devices} devices")
        return tuple(sizes)


@dataclass(frozen=True)
class EvaluationConfig:
    """How answers are generated and scored. ``limit`` bounds the questions asked during training, not by eval.py."""

    batch_size: int = 256
    max_new_tokens: int = 8
    limit: int = 1024

    def __post_init__(self):
        _require_at_least(1, "evaluation", self, "batch_size", "max_new_tokens")
        _require_at_least(0, "evaluation", self, "limit")


@dataclass(frozen=True)
class Config:
    name: str = "unnamed"
    seed: int = 0
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self):
        _require_at_least(0, "config", self, "seed")

    def check_devices(self, devices: int) -> tuple[int, int, int]:
        """Mesh sizes (data, fsdp, tensor) on that many devices; ConfigError if the batch or a width does not divide."""
        data, fsdp, tensor = self.mesh.sizes(devices)
        rows, micro = self.data.rows, self.optimizer.accumulation
        _require(rows % micro == 0, f"data.rows={rows} is not divisible by optimizer.accumulation={micro}")
        _require(
            (rows // micro) % (data * fsdp) == 0,
            f"data.rows={rows}{f' / {micro} microbatches' if micro > 1 else ''} is not divisible by the "
            f"{data * fsdp} devices of mesh data={data} x fsdp={fsdp}",
        )
        for name, heads in (
            ("vision.heads", self.model.vision.heads),
            ("decoder.kv_heads", self.model.decoder.kv_heads),
        ):
            _require(heads % tensor == 0, f"{name}={heads} is not divisible by mesh tensor={tensor}")
        return data, fsdp, tensor


# ------------------------------------------------------------------ presets

PRESETS: dict[type, dict[str, dict]] = {
    VisionConfig: {
        "clip_l_14_336": {},
        "clip_l_14_224": dict(image_size=224),
        "clip_b_32_224": dict(image_size=224, patch_size=32, width=768, layers=12, heads=12, mlp_width=3072),
        "siglip_so400m_14_384": dict(
            family="siglip", image_size=384, width=1152, layers=27, mlp_width=4304, norm_eps=1e-6,
            image_mean=(0.5, 0.5, 0.5), image_std=(0.5, 0.5, 0.5),
        ),
        "tiny": dict(image_size=64, patch_size=8, width=128, layers=3, heads=4, mlp_width=512),
    },
    DecoderConfig: {
        "vicuna_7b": {},
        "vicuna_13b": dict(width=5120, layers=40, heads=40, kv_heads=40, mlp_width=13824),
        "qwen2_7b": dict(
            vocab_size=152064, width=3584, layers=28, heads=28, kv_heads=4, mlp_width=18944, rope_base=1e6,
            norm_eps=1e-6, qkv_bias=True,
        ),
        "tiny": dict(
            vocab_size=384, width=128, layers=3, heads=2, kv_heads=2, mlp_width=256, tied_head=True,
            initializer_range=0.08,
        ),
    },
}  # fmt: skip


def preset(kind: type, name: str, **changes):
    """The preset of a dataclass by name, e.g. preset(VisionConfig, "clip_l_14_336", layers=12)."""
    known = PRESETS.get(kind, {})
    if name not in known:
        raise ConfigError(f"no {kind.__name__} preset {name!r}{_nearest(name, known)}")
    return kind(**{**known[name], **changes})


def compose(vision: VisionConfig, decoder: DecoderConfig, projector: dict | None = None, **changes) -> ModelConfig:
    """A ModelConfig whose projector's grid and widths follow from the tower and the decoder."""
    fitted = dict(grid=vision.grid, in_width=vision.width, out_width=decoder.width)
    return ModelConfig(vision, ProjectorConfig(**{**fitted, **(projector or {})}), decoder, **changes)


# ------------------------------------------------------------------ dicts, JSON, overrides


def to_dict(config) -> dict:
    """Nested plain dict; tuples become lists, so that it is JSON."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(kind: type, values: dict | str, where: str = ""):
    """Builds dataclass ``kind`` from a nested dict (or a preset's name), checking every key and type.

    Raises ConfigError for an unknown key (with the nearest known one) or a value of another type."""
    if isinstance(values, str):
        return preset(kind, values)
    hints = typing.get_type_hints(kind)
    arguments = {}
    for key, value in values.items():
        path = f"{where}{key}"
        if key not in hints:
            raise ConfigError(f"unknown config key {path!r}{_nearest(key, hints)}")
        arguments[key] = _typed(hints[key], value, path)
    return kind(**arguments)


def override(config, assignments: dict[str, str]):
    """Copy of ``config`` with dotted paths set from command-line text, all at once, then validated."""
    values = to_dict(config)
    for path, text in assignments.items():
        node, kind, done = values, type(config), ""
        *parents, leaf = path.split(".")
        for key in parents:
            hints = typing.get_type_hints(kind)
            if key not in hints or not dataclasses.is_dataclass(hints[key]):
                sections = [name for name, hint in hints.items() if dataclasses.is_dataclass(hint)]
                raise ConfigError(f"unknown config section {done + key!r}{_nearest(key, sections)}")
            if isinstance(node[key], str):  # a preset set earlier in the same command
                node[key] = to_dict(preset(hints[key], node[key]))
            _require(isinstance(node[key], dict), f"config section {done + key!r} was set to {node[key]!r}")
            node, kind, done = node[key], hints[key], f"{done}{key}."
        hints = typing.get_type_hints(kind)
        if leaf not in hints:
            raise ConfigError(f"unknown config key {path!r}{_nearest(leaf, hints)}")
        node[leaf] = text if hints[leaf] is str else _parse(text)
    return from_dict(type(config), values)


def load_config(path: str | Path) -> Config:
    """The Config that get_config() of a Python file returns."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"config file {str(path)!r} does not exist")
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    if spec is None:
        raise ConfigError(f"config file {str(path)!r} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (SyntaxError, ImportError) as error:
        raise ConfigError(f"config file {str(path)!r}: {error}") from error
    if not hasattr(module, "get_config"):
        raise ConfigError(f"config file {str(path)!r} has no get_config()")
    config = module.get_config()
    _require(isinstance(config, Config), f"config file {str(path)!r}: get_config() did not return a Config")
    return config


def _nearest(key: str, known) -> str:
    match = difflib.get_close_matches(key, list(known), n=1, cutoff=0.5)
    return f"; did you mean {match[0]!r}?" if match else f"; known: {', '.join(known) or 'none'}"


def _parse(text: str):
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return text


def _typed(hint, value, path: str):
    """``value`` as type ``hint`` (a dataclass, a scalar, a tuple[X, ...] or a union of those)."""
    if dataclasses.is_dataclass(hint):
        if isinstance(value, (dict, str)):
            return from_dict(hint, value, f"{path}.")
    elif isinstance(hint, types.UnionType):
        for option in typing.get_args(hint):
            try:
                return _typed(option, value, path)
            except ConfigError:
                continue
    elif typing.get_origin(hint) is tuple:
        if isinstance(value, (list, tuple)):
            return tuple(_typed(typing.get_args(hint)[0], item, path) for item in value)
        if typing.get_args(hint)[0] is str and isinstance(value, str):
            return (value,)
    elif hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    elif isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    expected = hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)
    raise ConfigError(f"config key {path!r} expects {expected}, got {value!r}")

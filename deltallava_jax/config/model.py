"""Tower, projector, decoder."""

from __future__ import annotations

from dataclasses import dataclass, field

from deltallava_jax.config.checks import require, require_at_least, require_positive


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
        require_at_least(1, "vision", self, "patch_size", "width", "layers", "heads", "mlp_width")
        require_positive("vision", self, "norm_eps")
        for name in ("image_mean", "image_std"):
            require(len(getattr(self, name)) == 3, f"vision.{name}={getattr(self, name)}; expected a number a channel")
        require(min(self.image_std) > 0, f"vision.image_std={self.image_std}; expected more than 0")
        require(self.family in ("clip", "siglip"), f"vision.family is {self.family!r}; known: clip, siglip")
        require(
            self.width % self.heads == 0,
            f"vision.heads={self.heads} does not divide vision.width={self.width}",
        )
        require(
            self.image_size >= self.patch_size,
            f"vision.image_size={self.image_size} is smaller than vision.patch_size={self.patch_size}",
        )

    @property
    def grid(self) -> int:
        """Patches a side; like the Hugging Face towers, a remainder of the image is cut off."""
        return self.image_size // self.patch_size

    @property
    def mean_color(self) -> tuple[int, ...]:
        """The mean as an 8-bit colour, truncated: what padded images are filled with."""
        return tuple(int(mean * 255) for mean in self.image_mean)


ABLATIONS = ("none", "no_emhsa", "no_delta", "no_tb")

# What ProjectorConfig leaves open: the settings of most systems, and those in which a publication differs from them.
USUAL = dict(scale_factor=2, select_layer=-2, head_dim=128, mlp_width=4096)
PUBLISHED = {
    "m3": dict(scale_factor=(1, 2, 4, 8, 24)),
    "mqt": dict(head_dim=64),
    "quecc": dict(scale_factor=4),
    "honeybee_c": dict(select_layer=-1),
    "honeybee_d": dict(select_layer=-1, mlp_width=1024),
}


def published(name: str, grid: int) -> dict:
    """{field: value} of the settings that ``ProjectorConfig(name)`` has on a grid if they are not given.

    Of several scale factors those that divide the grid."""
    settings = USUAL | PUBLISHED.get(name, {})
    if isinstance(settings["scale_factor"], tuple) and grid > 0:
        settings["scale_factor"] = tuple(s for s in settings["scale_factor"] if grid % s == 0)
    return settings


@dataclass(frozen=True)
class ProjectorConfig:
    """How patches become visual tokens. Fields that a system does not use are ignored by it.

    A field that is None takes the system's published setting (``published``).
    ``scale_factor`` s gives (grid/s)^2 tokens an image; a tuple makes the model elastic: a budget is drawn each step.
    ``levels`` are hidden-state indices of the tower (index i is the output of layer i); empty means the release's
    relative depths, 12, 16, 22 and 23 of 24. ``select_layer`` is the hidden state of the query features, from the end.
    """

    name: str = "delta"
    grid: int = 24
    scale_factor: int | tuple[int, ...] | None = None
    in_width: int = 1024
    out_width: int = 4096
    embed_width: int = 0  # 0: in_width
    select_layer: int | None = None
    levels: tuple[int, ...] = ()
    level_count: int = 4
    head_dim: int | None = None
    block_head_dim: int = 32
    rank: int = 16
    mix_ratio: float = 0.75
    drop_path: float = 0.1
    initializer_range: float = 0.02  # standard deviation of fresh Linear weights; small widths want more
    reduction: int = 1  # EMHSA's spatial reduction sr
    window: int = 1  # paper variant: query windows of window x window
    mlp_width: int | None = None  # paper variant: hidden width of equation 11; honeybee_d: of its layers
    variant: str = "release"
    ablation: str = "none"
    queries: int = 256  # mqt, resampler: learned queries
    tokens: tuple[int, ...] = ()  # mqt, fastervlm: the budgets; prumerge: (the most,); empty: as published
    keep_ratio: float | None = None  # share of the patches kept: prumerge (0: by outliers of each image; published
    # 0.125), evit and dynamicvit (in each stage; published 0.7)
    prune_layers: tuple[int, ...] = (6, 12, 18)  # evit, dynamicvit: the tower's layers, from 0, that drop patches
    fuse: bool = True  # evit: the dropped patches become one token
    reproduce_duplicates: bool = False  # prumerge_plus: the original's doubled and lost positions
    text_width: int = 0  # quecc: width of the question's hidden state; 0: out_width
    question_length: int = 64  # quecc: tokens of a question that are read, BOS first; a longer one is cut, and said
    depth: int = 0  # honeybee: blocks or layers; 0: as published, 3 and 6
    closing: bool = False  # resampler: Qwen-VL's LayerNorm and output matrix behind it

    def __post_init__(self):
        for name, value in published(self.name, self.grid).items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        require_at_least(1, "projector", self, "grid", "in_width", "out_width", "level_count", "rank", "mlp_width")
        require_at_least(
            1, "projector", self, "head_dim", "block_head_dim", "window", "reduction", "queries", "question_length"
        )
        require_at_least(0, "projector", self, "embed_width", "text_width", "depth")
        require_positive("projector", self, "initializer_range")
        require(self.select_layer < 0, f"projector.select_layer={self.select_layer}; expected -1, the last, or below")
        for name, least in (("levels", 0), ("prune_layers", 0), ("tokens", 1)):
            values = getattr(self, name)
            require(min(values, default=least) >= least, f"projector.{name}={values}; expected {least} or more")
        require(0 <= self.drop_path < 1, f"projector.drop_path={self.drop_path}; expected 0 to below 1")
        require(0 <= (self.keep_ratio or 0) <= 1, f"projector.keep_ratio={self.keep_ratio}; expected 0 to 1")
        require(0 < self.mix_ratio < 1, f"projector.mix_ratio={self.mix_ratio}; expected between 0 and 1")
        require(
            list(self.prune_layers) == sorted(set(self.prune_layers)),
            f"projector.prune_layers={self.prune_layers}; expected ascending layers, e.g. (6, 12, 18)",
        )
        for name, known in (("variant", ("release", "paper")), ("ablation", ABLATIONS)):
            value = getattr(self, name)
            require(value in known, f"projector.{name} is {value!r}; known: {', '.join(known)}")
        require(
            not self.levels or len(self.levels) == self.level_count,
            f"projector.levels has {len(self.levels)} entries; projector.level_count is {self.level_count}",
        )
        if self.name == "delta":
            self.check_scale()
            self._check_delta()

    def check_scale(self) -> None:
        """ConfigError with the valid values unless every scale factor divides the grid."""
        divisors = [s for s in range(1, self.grid + 1) if self.grid % s == 0]
        valid = f"valid values: {', '.join(map(str, divisors))}"
        require(self.scale_factors != (), f"projector.scale_factor is empty; {valid}")
        for s in self.scale_factors:
            require(
                s in divisors,
                f"projector.scale_factor={s} does not divide the {self.grid}x{self.grid} patch grid; {valid}",
            )

    def _check_delta(self):
        width, paper = self.width, self.variant == "paper"
        for name, of in (("head_dim", width), ("block_head_dim", width), ("block_head_dim", self.in_width)):
            value = getattr(self, name)
            require(of % value == 0, f"projector.{name}={value} does not divide the projector's width {of}")
        require(
            width >= 2 * self.block_head_dim,
            f"projector.block_head_dim={self.block_head_dim}; the block's two branches need two heads in width {width}",
        )
        require(self.in_width % 4 == 0, f"projector.in_width={self.in_width}; the position table needs a multiple of 4")
        require(
            paper or width == self.in_width,
            f"projector.embed_width={self.embed_width}; the release variant keeps in_width={self.in_width}",
        )
        require(
            bool(self.levels) or self.level_count <= 4,
            f"projector.level_count={self.level_count}; name the tower's layers in projector.levels",
        )
        for side in (self.grid // s for s in self.scale_factors):
            require(
                side % self.window == 0, f"projector.window={self.window} does not divide the {side}x{side} query grid"
            )
            require(
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
class RopeScaling:
    """Llama 3's: wavelengths beyond the original context are stretched by ``factor``, short ones kept."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_length: int

    def __post_init__(self):
        require(
            0 < self.low_freq_factor < self.high_freq_factor and self.factor >= 1 and self.original_length > 0,
            f"decoder.rope_scaling {self}; expected factor of 1 or more, 0 < low_freq_factor < high_freq_factor",
        )


@dataclass(frozen=True)
class DecoderConfig:
    """A Llama-architecture decoder (Vicuna, Llama, SmolLM2, Qwen2 with ``qkv_bias``)."""

    vocab_size: int = 32000
    width: int = 4096
    layers: int = 32
    heads: int = 32
    kv_heads: int = 32
    mlp_width: int = 11008
    rope_base: float = 10000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    qkv_bias: bool = False
    tied_head: bool = False
    initializer_range: float = 0.02  # standard deviation of fresh weights; small widths want more

    def __post_init__(self):
        require_at_least(1, "decoder", self, "vocab_size", "width", "layers", "heads", "kv_heads", "mlp_width")
        require_positive("decoder", self, "rope_base", "norm_eps", "initializer_range")
        require(
            self.width % self.heads == 0,
            f"decoder.heads={self.heads} does not divide decoder.width={self.width}",
        )
        require(
            self.heads % self.kv_heads == 0,
            f"decoder.kv_heads={self.kv_heads} does not divide decoder.heads={self.heads}",
        )
        require(self.head_dim % 2 == 0, f"decoder head width {self.head_dim} is odd; rotary positions need it even")

    @property
    def head_dim(self) -> int:
        return self.width // self.heads


@dataclass(frozen=True)
class FastVConfig:
    """FastV: before decoder layer ``layer``, ``keep`` visual tokens a prompt stay. Inference only."""

    layer: int = 2
    keep: int = 144

    def __post_init__(self):
        require_at_least(1, "fastv", self, "layer", "keep")


REMAT_POLICIES = ("none", "dots", "full")
DTYPES = ("bfloat16", "float32")
# Of parameters: the names in use for each.
PARAMETER_DTYPES = {
    "float32": ("float32", "fp32", "float"),
    "bfloat16": ("bfloat16", "bf16"),
    "float16": ("float16", "fp16", "half"),
}


def dtype_name(dtype: str | type | None) -> str | None:
    """The name of a dtype that parameters can have, from any name in use or a dtype of numpy, JAX or torch; None for
    None. Raises ConfigError with the list for any other."""
    if dtype is None:
        return None
    said = str(dtype if isinstance(dtype, str) else getattr(dtype, "__name__", dtype)).lower().removeprefix("torch.")
    found = next((name for name, names in PARAMETER_DTYPES.items() if said in names), None)
    known = ", ".join(f"{name} ({', '.join(names[1:])})" for name, names in PARAMETER_DTYPES.items())
    require(found is not None, f"dtype is {said!r}; known: {known}")
    return found


@dataclass(frozen=True)
class ModelConfig:
    """A whole vision-language model, or some of its parts: a converted decoder alone has vision and projector None.

    ``dtype`` is the compute dtype; parameters that train stay float32."""

    vision: VisionConfig | None = field(default_factory=VisionConfig)
    projector: ProjectorConfig | None = field(default_factory=ProjectorConfig)
    decoder: DecoderConfig | None = field(default_factory=DecoderConfig)
    fastv: FastVConfig | None = None
    dtype: str = "bfloat16"
    remat: str = "none"
    loss_chunk: int = 512  # row positions whose logits exist at a time
    tower_images: int = 0  # images of a row that the tower takes at a time; 0: all

    def __post_init__(self):
        require_at_least(1, "model", self, "loss_chunk")
        require_at_least(0, "model", self, "tower_images")
        require(self.dtype in DTYPES, f"model.dtype is {self.dtype!r}; known: {', '.join(DTYPES)}")
        require(self.remat in REMAT_POLICIES, f"model.remat is {self.remat!r}; known: {', '.join(REMAT_POLICIES)}")
        p, v, d = self.projector, self.vision, self.decoder
        require(any((p, v, d)), "model has neither vision nor projector nor decoder")
        if p and v:
            require(p.grid == v.grid, f"projector.grid={p.grid}, but the vision tower makes a {v.grid}x{v.grid} grid")
            require(p.in_width == v.width, f"projector.in_width={p.in_width}, but vision.width={v.width}")
            require(
                all(0 <= level <= v.layers for level in p.levels),
                f"projector.levels={p.levels}; the tower has {v.layers} layers",
            )
            require(
                -v.layers <= p.select_layer <= -1,
                f"projector.select_layer={p.select_layer}; expected -{v.layers} to -1 for {v.layers} layers",
            )
        if d and self.fastv:
            require(self.fastv.layer < d.layers, f"fastv.layer={self.fastv.layer}; the decoder has {d.layers} layers")
        if p and d:
            require(p.out_width == d.width, f"projector.out_width={p.out_width}, but decoder.width={d.width}")

    @property
    def missing(self) -> list[str]:
        """Names of the parts that are not there."""
        return [part for part in ("vision", "projector", "decoder") if getattr(self, part) is None]

    @property
    def whole(self) -> bool:
        return not self.missing

    def require_whole(self, what: str) -> None:
        """ConfigError naming the missing parts, unless tower, projector and decoder are all there."""
        require(not self.missing, f"{what} needs a whole model; this one has no {', no '.join(self.missing)}")

"""Tower, projector, decoder."""

from __future__ import annotations

from dataclasses import dataclass, field

from deltallava_jax.config.checks import require, require_at_least, require_positive
from deltallava_jax.config.systems import ProjectorConfig, system_config


@dataclass(frozen=True)
class VisionConfig:
    """A ViT tower."""

    family: str = "clip"  # clip: a CLS token, LayerNorm before the layers; siglip: neither, a bias on the patches
    image_size: int = 336  # pixels per side of the square input image
    patch_size: int = 14  # pixels per side of a patch; a remainder at the edges is cropped
    width: int = 1024  # width of the hidden states
    layers: int = 24  # transformer layers
    heads: int = 16  # attention heads; must divide the width
    mlp_width: int = 4096  # hidden width of a layer's MLP
    norm_eps: float = 1e-5  # epsilon of LayerNorm
    image_mean: tuple[float, ...] = (
        0.48145466,
        0.4578275,
        0.40821073,
    )  # mean of each channel, which is subtracted; pixels are 0 to 1
    image_std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)  # standard deviation of each channel

    def __post_init__(self):
        require_at_least(1, "vision", self, "patch_size", "width", "layers", "heads", "mlp_width")
        require_positive("vision", self, "norm_eps")
        for name in ("image_mean", "image_std"):
            require(
                len(getattr(self, name)) == 3, f"vision.{name}={getattr(self, name)}; expected one number per channel"
            )
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
        """Patches per side; a remainder of the image is cropped, as in Hugging Face's towers."""
        return self.image_size // self.patch_size

    @property
    def mean_color(self) -> tuple[int, ...]:
        """The mean as an 8-bit colour, truncated, with which images are padded."""
        return tuple(int(mean * 255) for mean in self.image_mean)


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's RoPE scaling: wavelengths beyond the original context are multiplied by ``factor``, short ones kept."""

    factor: float  # factor of the wavelengths beyond the original context, 1 or more
    low_freq_factor: float  # wavelengths above original_length / this are multiplied by the whole factor
    high_freq_factor: float  # wavelengths below original_length / this are kept; in between is interpolated
    original_length: int  # context length in tokens of the decoder's pretraining

    def __post_init__(self):
        require(
            0 < self.low_freq_factor < self.high_freq_factor and self.factor >= 1 and self.original_length > 0,
            f"decoder.rope_scaling {self}; expected factor 1 or more, 0 < low_freq_factor < high_freq_factor, "
            "original_length > 0",
        )


@dataclass(frozen=True)
class DecoderConfig:
    """A Llama-architecture decoder (Vicuna, Llama, SmolLM2, Qwen2 with ``qkv_bias``)."""

    vocab_size: int = 32000  # tokens of the vocabulary: rows of the embedding
    width: int = 4096  # width of the hidden states
    layers: int = 32  # transformer layers
    heads: int = 32  # query heads; must divide the width
    kv_heads: int = 32  # key and value heads; must divide heads (grouped-query attention)
    mlp_width: int = 11008  # hidden width of a layer's gated MLP
    rope_base: float = 10000.0  # base of the rotary embedding's wavelengths (theta)
    rope_scaling: RopeScaling | None = None  # Llama 3's scaling of the rotary embedding; None: off
    norm_eps: float = 1e-5  # epsilon of RMSNorm
    qkv_bias: bool = False  # whether queries, keys and values have a bias, as in Qwen2
    tied_head: bool = False  # whether the output matrix is the embedding
    initializer_range: float = 0.02  # standard deviation of initial weights; small widths need more

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
        require(
            self.head_dim % 2 == 0,
            f"decoder.width / decoder.heads is {self.head_dim}; rotary embeddings need an even number",
        )

    @property
    def head_dim(self) -> int:
        return self.width // self.heads


@dataclass(frozen=True)
class FastVConfig:
    """FastV: before decoder layer ``layer``, all but ``keep`` visual tokens per prompt are dropped. Inference only."""

    layer: int = 2  # the decoder layer, from 0, before which visual tokens are dropped
    keep: int = 144  # visual tokens kept per prompt: those with the most attention

    def __post_init__(self):
        require_at_least(1, "fastv", self, "layer", "keep")


# Implementations of kernels/; "auto": the one that was measured to be the fastest, else the library's for the device.
ATTENTION = ("auto", "xla", "blocks", "splash", "cudnn")
WINDOWED_ATTENTION = ("auto", "xla", "pallas")
REMAT_LADDER = ("none", "dots", "attention", "full")  # from the least recomputation to the least memory
REMAT_POLICIES = ("auto", *REMAT_LADDER)
DTYPES = ("bfloat16", "float32")
# Dtypes of parameters -> their names in use.
PARAMETER_DTYPES = {
    "float32": ("float32", "fp32", "float"),
    "bfloat16": ("bfloat16", "bf16"),
    "float16": ("float16", "fp16", "half"),
}


def dtype_name(dtype: str | type | None) -> str | None:
    """The name of a dtype of parameters, from any name in use or a dtype of numpy, JAX or torch; None for None. Raises
    ConfigError for any other."""
    if dtype is None:
        return None
    given = str(dtype if isinstance(dtype, str) else getattr(dtype, "__name__", dtype)).lower().removeprefix("torch.")
    found = next((name for name, names in PARAMETER_DTYPES.items() if given in names), None)
    known = ", ".join(f"{name} ({', '.join(names[1:])})" for name, names in PARAMETER_DTYPES.items())
    require(found is not None, f"dtype is {given!r}; known: {known}")
    return found


@dataclass(frozen=True)
class ModelConfig:
    """A whole vision-language model, or some of its parts: a converted decoder alone has vision and projector None."""

    vision: VisionConfig | None = field(default_factory=VisionConfig)  # the tower; None: absent
    projector: ProjectorConfig | None = field(default_factory=system_config)  # the projector; None: absent
    decoder: DecoderConfig | None = field(default_factory=DecoderConfig)  # the language model; None: absent
    fastv: FastVConfig | None = None  # drops visual tokens inside the decoder, in inference only; None: off
    dtype: str = "bfloat16"  # compute dtype, bfloat16 or float32; trained parameters are always float32
    remat: str = "dots"  # recomputed in the backward pass: none, all but dots, all but attention, full; auto: by memory
    attention: str = "auto"  # of rows that attend to themselves: auto (measured), xla, blocks, splash or cudnn
    windowed_attention: str = "auto"  # of Delta, TokenPacker and QueCC: auto (measured), xla or pallas
    loss_chunk: int = 512  # row positions whose logits are in memory at a time
    tower_images: int = 0  # images of a row that the tower processes at a time; 0: all

    def __post_init__(self):
        require_at_least(1, "model", self, "loss_chunk")
        require_at_least(0, "model", self, "tower_images")
        require(self.dtype in DTYPES, f"model.dtype is {self.dtype!r}; known: {', '.join(DTYPES)}")
        require(self.remat in REMAT_POLICIES, f"model.remat is {self.remat!r}; known: {', '.join(REMAT_POLICIES)}")
        for name, known in (("attention", ATTENTION), ("windowed_attention", WINDOWED_ATTENTION)):
            given = getattr(self, name)
            require(given in known, f"model.{name} is {given!r}; known: {', '.join(known)}")
        p, v, d = self.projector, self.vision, self.decoder
        require(any((p, v, d)), "model has neither vision nor projector nor decoder")
        if p and v:
            require(p.grid == v.grid, f"projector.grid={p.grid}, but the tower's grid is {v.grid}x{v.grid}")
            require(p.in_width == v.width, f"projector.in_width={p.in_width}, but vision.width={v.width}")
            p.validate_tower(v.layers)
        if d and self.fastv:
            require(self.fastv.layer < d.layers, f"fastv.layer={self.fastv.layer}; the decoder has {d.layers} layers")
        if p and d:
            require(p.out_width == d.width, f"projector.out_width={p.out_width}, but decoder.width={d.width}")

    @property
    def system(self) -> str:
        """The name of the system that computes or selects the visual tokens."""
        return "fastv" if self.fastv else self.projector.name

    @property
    def missing(self) -> list[str]:
        """Names of the parts that are absent."""
        return [part for part in ("vision", "projector", "decoder") if getattr(self, part) is None]

    @property
    def whole(self) -> bool:
        return not self.missing

    def require_whole(self, what: str) -> None:
        """Raises ConfigError, naming the missing parts, unless tower, projector and decoder are present."""
        require(not self.missing, f"{what} needs a whole model; this one has no {', no '.join(self.missing)}")

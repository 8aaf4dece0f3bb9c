"""The model families: what their config.json says in our terms and back, and which tensor is which.

One class a family, with ``to_ours(hf)``, ``to_hf(cfg)`` and ``table(cfg)``; names are relative to the family's prefix
in a checkpoint. Missing keys of a config.json have the defaults of the family's configuration class in transformers,
as published checkpoints rely on them. An option that would change the numbers and is not here is refused by name.
"""

from __future__ import annotations

from typing import Any

from deltallava_jax.config import DecoderConfig, RopeScaling, VisionConfig
from deltallava_jax.errors import ConversionError
from deltallava_jax.models.names import Entry, linear, norm


def refuse(hf: dict, kind: str, **allowed: Any) -> None:
    """ConversionError naming the first key of a config.json whose value is neither absent nor the allowed one."""
    for key, value in allowed.items():
        if hf.get(key, value) not in (value, None):
            raise ConversionError(f"{kind} option {key}={hf[key]!r} is not supported; expected {value!r}")


class Values:
    """The numbers of a config.json, with defaults; ConversionError naming the key of one that is none."""

    def __init__(self, hf: dict, kind: str, defaults: dict | None = None):
        self.hf, self.kind, self.defaults = hf, kind, defaults or {}

    def whole(self, key: str, default: int | None = None) -> int:
        """A whole number."""
        value = self.hf.get(key, self.defaults.get(key, default))
        if not isinstance(value, int) or isinstance(value, bool):
            raise ConversionError(f"{self.kind} option {key}={value!r}; expected a whole number")
        return value

    def real(self, key: str, default: float | None = None) -> float:
        value = self.hf.get(key, self.defaults.get(key, default))
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise ConversionError(f"{self.kind} option {key}={value!r}; expected a number")
        return value


class Llama:
    """Llama, Vicuna, SmolLM2; ``Qwen2`` adds biases."""

    model_type, architecture = "llama", "LlamaForCausalLM"
    qkv_bias = False
    defaults = dict(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32)
    fixed = dict(hidden_act="silu", attention_bias=False, mlp_bias=False, partial_rotary_factor=1.0)

    @classmethod
    def to_ours(cls, hf: dict) -> DecoderConfig:
        refuse(hf, cls.model_type, **cls.fixed)
        get = Values(hf, cls.model_type, cls.defaults)
        heads, width = get.whole("num_attention_heads", 32), get.whole("hidden_size")
        refuse(hf, cls.model_type, head_dim=width // max(heads, 1), quantization_config=None)
        rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
        return DecoderConfig(
            vocab_size=get.whole("vocab_size"),
            width=width,
            layers=get.whole("num_hidden_layers"),
            heads=heads,
            kv_heads=heads if hf.get("num_key_value_heads") is None else get.whole("num_key_value_heads"),
            mlp_width=get.whole("intermediate_size"),
            rope_base=float(rope.get("rope_theta") or get.real("rope_theta", 10000.0)),
            rope_scaling=_rope_scaling(rope, cls.model_type),
            norm_eps=get.real("rms_norm_eps", 1e-6),
            qkv_bias=cls.qkv_bias,
            tied_head=bool(hf.get("tie_word_embeddings", False)),
        )

    @classmethod
    def to_hf(cls, cfg: DecoderConfig) -> dict:
        rope = {"rope_type": "default"}
        if cfg.rope_scaling is not None:
            scaling = cfg.rope_scaling
            rope = {
                "rope_type": "llama3",
                "factor": scaling.factor,
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_length,
            }
        return {
            "architectures": [cls.architecture],
            "model_type": cls.model_type,
            "vocab_size": cfg.vocab_size,
            "hidden_size": cfg.width,
            "intermediate_size": cfg.mlp_width,
            "num_hidden_layers": cfg.layers,
            "num_attention_heads": cfg.heads,
            "num_key_value_heads": cfg.kv_heads,
            "hidden_act": "silu",
            "rms_norm_eps": cfg.norm_eps,
            "rope_theta": cfg.rope_base,
            "rope_parameters": {"rope_theta": cfg.rope_base, **rope},
            "tie_word_embeddings": cfg.tied_head,
        }

    @staticmethod
    def name_table(cfg: DecoderConfig) -> list[Entry]:
        """Names below the decoder's prefix ("model." of a LlamaForCausalLM); see head_name_table for the rest."""
        layer, attention = "layers.{}", "layers.{}.self_attn"
        table = [Entry("embed_tokens.weight", "embed/embedding")]
        table += norm(f"{layer}.input_layernorm", "layers/attention_norm", bias=False)
        for name in "qkvo":
            bias = cfg.qkv_bias and name != "o"
            table += linear(f"{attention}.{name}_proj", f"layers/{name}", bias=bias)
        table += norm(f"{layer}.post_attention_layernorm", "layers/mlp_norm", bias=False)
        for name in ("gate", "up", "down"):
            table += linear(f"{layer}.mlp.{name}_proj", f"layers/{name}", bias=False)
        return table + norm("norm", "head/norm", bias=False)

    @staticmethod
    def head_name_table(cfg: DecoderConfig) -> list[Entry]:
        """The output matrix, unless the embedding serves as one."""
        return [] if cfg.tied_head else linear("lm_head", "head/out", bias=False)


class Qwen2(Llama):
    model_type, architecture = "qwen2", "Qwen2ForCausalLM"
    qkv_bias = True
    defaults = dict(vocab_size=151936, hidden_size=4096, intermediate_size=22016, num_hidden_layers=32)
    fixed = dict(hidden_act="silu", use_sliding_window=False)


def _rope_scaling(rope: dict, kind: str) -> RopeScaling | None:
    how = rope.get("rope_type") or rope.get("type") or "default"
    if how == "default":
        return None
    if how != "llama3":
        raise ConversionError(f"{kind} option rope_type={how!r} is not supported; known: default, llama3")
    get = Values(rope, f"{kind} rope")
    return RopeScaling(
        factor=float(get.real("factor")),
        low_freq_factor=float(get.real("low_freq_factor")),
        high_freq_factor=float(get.real("high_freq_factor")),
        original_length=get.whole("original_max_position_embeddings"),
    )


class Clip:
    """CLIP's vision tower."""

    model_type, architecture, family = "clip_vision_model", "CLIPVisionModel", "clip"
    activation = "quick_gelu"
    defaults = dict(patch_size=32, layer_norm_eps=1e-5)
    statistics = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))

    @classmethod
    def to_ours(cls, hf: dict, preprocessor: dict | None = None) -> VisionConfig:
        """preprocessor: preprocessor_config.json, for the pixels' mean and standard deviation."""
        refuse(hf, cls.model_type, hidden_act=cls.activation, num_channels=3, quantization_config=None)
        get, pixels = Values(hf, cls.model_type, cls.defaults), preprocessor or {}
        return VisionConfig(
            family=cls.family,
            image_size=get.whole("image_size", 224),
            patch_size=get.whole("patch_size"),
            width=get.whole("hidden_size", 768),
            layers=get.whole("num_hidden_layers", 12),
            heads=get.whole("num_attention_heads", 12),
            mlp_width=get.whole("intermediate_size", 3072),
            norm_eps=get.real("layer_norm_eps"),
            image_mean=tuple(pixels.get("image_mean") or cls.statistics[0]),
            image_std=tuple(pixels.get("image_std") or cls.statistics[1]),
        )

    @classmethod
    def to_hf(cls, cfg: VisionConfig) -> dict:
        return {
            "architectures": [cls.architecture],
            "model_type": cls.model_type,
            "hidden_size": cfg.width,
            "intermediate_size": cfg.mlp_width,
            "num_hidden_layers": cfg.layers,
            "num_attention_heads": cfg.heads,
            "num_channels": 3,
            "image_size": cfg.image_size,
            "patch_size": cfg.patch_size,
            "hidden_act": cls.activation,
            "layer_norm_eps": cfg.norm_eps,
        }

    @classmethod
    def name_table(cls, cfg: VisionConfig) -> list[Entry]:
        """Names below the tower's prefix ("" or "vision_model." of a CLIPVisionModel)."""
        clip, layer = cfg.family == "clip", "encoder.layers.{}"
        table = linear("embeddings.patch_embedding", "embeddings/patch", bias=not clip, kind="patch")
        table += [Entry("embeddings.position_embedding.weight", "embeddings/position")]
        if clip:
            table += [Entry("embeddings.class_embedding", "embeddings/cls")]
            table += norm("pre_layrnorm", "embeddings/pre_norm")
        table += norm(f"{layer}.layer_norm1", "layers/attention_norm") + norm(f"{layer}.layer_norm2", "layers/mlp_norm")
        for theirs, ours in (("q", "q"), ("k", "k"), ("v", "v"), ("out", "o")):
            table += linear(f"{layer}.self_attn.{theirs}_proj", f"layers/{ours}")
        table += linear(f"{layer}.mlp.fc1", "layers/up") + linear(f"{layer}.mlp.fc2", "layers/down")
        return table + norm("post_layernorm", "final/norm")


class Siglip(Clip):
    """SigLIP's vision tower without its pooling head."""

    model_type, architecture, family = "siglip_vision_model", "SiglipVisionModel", "siglip"
    activation = "gelu_pytorch_tanh"
    defaults = dict(patch_size=16, layer_norm_eps=1e-6)
    statistics = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


DECODERS = {family.model_type: family for family in (Llama, Qwen2)}
TOWERS = {family.model_type: family for family in (Clip, Siglip)}
# Models that hold a tower in their vision_config.
PAIRS = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}


def decoder_family(cfg: DecoderConfig) -> type[Llama]:
    return Qwen2 if cfg.qkv_bias else Llama


def tower_family(cfg: VisionConfig) -> type[Clip]:
    return Clip if cfg.family == "clip" else Siglip

"""Published sizes by name."""

from __future__ import annotations

from deltallava_jax.config.checks import nearest
from deltallava_jax.config.model import DecoderConfig, ModelConfig, VisionConfig
from deltallava_jax.config.systems import system_config
from deltallava_jax.errors import ConfigError

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
        raise ConfigError(f"no {kind.__name__} preset {name!r}{nearest(name, known)}")
    return kind(**{**known[name], **changes})


def compose(vision: VisionConfig, decoder: DecoderConfig, projector: dict | None = None, **changes) -> ModelConfig:
    """A ModelConfig whose projector's grid and widths are those of the tower and the decoder."""
    fitted = dict(grid=vision.grid, in_width=vision.width, out_width=decoder.width)
    return ModelConfig(vision, system_config(**{**fitted, **(projector or {})}), decoder, **changes)

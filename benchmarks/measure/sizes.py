"""The models whose speed is measured, with random weights: 576 patches an image in each of them."""

from __future__ import annotations

SIZES = ("vicuna_7b", "small")
HELP = "vicuna_7b: CLIP ViT-L/14-336 and Vicuna-7B in bfloat16; small: shares of these, in float32, for a CPU"


def model(size: str, projector: dict):
    """The ModelConfig of a size with a projector. Small: the tower has a sixteenth of the decoder's parameters, as at
    7B a twentieth; scores of attention and the vocabulary weigh more than there, since they do not shrink as widths."""
    from deltallava_jax.config import DecoderConfig, VisionConfig, compose, preset, settings_of

    if size == "vicuna_7b":
        tower, decoder = preset(VisionConfig, "clip_l_14_336"), preset(DecoderConfig, "vicuna_7b")
        return compose(tower, decoder, projector, dtype="bfloat16", remat="full")
    tower = VisionConfig(width=128, layers=4, heads=4, mlp_width=512)
    decoder = DecoderConfig(vocab_size=2048, width=512, layers=4, heads=8, kv_heads=8, mlp_width=1376)
    return compose(
        tower,
        decoder,
        settings_of(projector.get("name", "delta"), dict(head_dim=32)) | projector,
        dtype="float32",
        remat="full",
    )

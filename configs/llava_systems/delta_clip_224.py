"""Delta on CLIP-L/14 at 224 pixels, 64 tokens."""

from configs.llava import base


def get_config(stage="finetune"):
    return base("delta_clip_224", stage, dict(name="delta", scale_factor=2), tokens=64, vision="clip_l_14_224")

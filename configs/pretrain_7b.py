"""Stage 1 of Delta-LLaVA-7B: 558k captions, the projector alone trains, 144 tokens an image."""

from configs.llava import base


def get_config():
    return base("delta", "pretrain", dict(name="delta", scale_factor=2), tokens=144)

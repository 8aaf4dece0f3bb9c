"""Stage 2 of Delta-LLaVA-7B: 665k conversations, projector and Vicuna train, 144 tokens an image."""

from configs.llava import base


def get_config():
    return base("delta", "finetune", dict(name="delta", scale_factor=2), tokens=144)

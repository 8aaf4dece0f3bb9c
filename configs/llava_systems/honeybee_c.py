"""Honeybee's C-Abstractor, 144 tokens."""

from configs.llava import base


def get_config(stage="finetune"):
    return base("honeybee_c", stage, dict(name="honeybee_c", scale_factor=2), tokens=144)

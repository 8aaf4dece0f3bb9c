"""Honeybee's D-Abstractor, 144 tokens."""

from configs.llava import base


def get_config(stage="finetune"):
    return base("honeybee_d", stage, dict(name="honeybee_d", scale_factor=2), tokens=144)

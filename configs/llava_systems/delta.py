"""Delta as the public code has it, 144 tokens."""

from configs.llava import base


def get_config(stage="finetune"):
    return base("delta", stage, dict(name="delta", scale_factor=2), tokens=144)

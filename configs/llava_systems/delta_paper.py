"""Delta by the paper's equations, 144 tokens."""

from configs.llava import base


def get_config(stage="finetune"):
    return base("delta_paper", stage, dict(name="delta", variant="paper", scale_factor=2), tokens=144)

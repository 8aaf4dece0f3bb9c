"""The control of every projector: each cell's patches averaged before LLaVA's MLP."""

from configs.llava import base


def get_config(stage: str = "finetune"):
    return base("average_pooling", stage, dict(name="average_pooling", scale_factor=2), tokens=144)

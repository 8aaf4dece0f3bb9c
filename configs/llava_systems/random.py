"""The control of every selection: random patches, others in each step of the training."""

from configs.llava import base


def get_config(stage: str = "finetune"):
    return base("random", stage, dict(name="random", tokens=(144,)), tokens=144)

"""Delta with a budget drawn each step: 576, 144, 64, 36, 16, 4 or 1 tokens from one set of weights."""

from configs.llava import base


def get_config(stage="finetune"):
    return base("delta_elastic", stage, dict(name="delta", scale_factor=(1, 2, 3, 4, 6, 12, 24)), tokens=64)

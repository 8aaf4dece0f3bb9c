"""Delta without the low-rank updates."""

from configs.llava import base


def get_config(stage="finetune"):
    return base("delta_no_delta", stage, dict(name="delta", scale_factor=2, ablation="no_delta"), tokens=144)

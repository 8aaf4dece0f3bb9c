"""Delta without the block."""

from configs.llava import base


def get_config(stage="finetune"):
    return base("delta_no_tb", stage, dict(name="delta", scale_factor=2, ablation="no_tb"), tokens=144)

"""Delta without the self-attention of the block."""

from configs.llava import base


def get_config(stage="finetune"):
    return base("delta_no_emhsa", stage, dict(name="delta", scale_factor=2, ablation="no_emhsa"), tokens=144)

"""Honeybee's D-Abstractor, 144 tokens."""

from configs.llava import base


def get_config(stage="finetune"):
    return base(
        "honeybee_d", stage, dict(name="honeybee_d", scale_factor=2, select_layer=-1, mlp_width=1024), tokens=144
    )

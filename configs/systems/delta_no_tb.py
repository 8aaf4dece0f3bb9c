"""Delta without the block."""

from configs.easy_vqa import base


def get_config():
    return base("delta_no_tb", dict(name="delta", variant="paper", scale_factor=2, ablation="no_tb"))

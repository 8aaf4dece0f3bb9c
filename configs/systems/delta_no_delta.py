"""Delta without the low-rank updates."""

from configs.easy_vqa import base


def get_config():
    return base("delta_no_delta", dict(name="delta", variant="paper", scale_factor=2, ablation="no_delta"))

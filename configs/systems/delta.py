"""Delta, the paper's variant."""

from configs.easy_vqa import base


def get_config():
    return base("delta", dict(name="delta", variant="paper", scale_factor=2))

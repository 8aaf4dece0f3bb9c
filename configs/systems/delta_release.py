"""Delta as the public code has it."""

from configs.easy_vqa import base


def get_config():
    return base("delta_release", dict(name="delta", variant="release", scale_factor=2))

"""Honeybee's C-Abstractor."""

from configs.easy_vqa import base


def get_config():
    return base("honeybee_c", dict(name="honeybee_c", scale_factor=2))

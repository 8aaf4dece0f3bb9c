"""Honeybee's D-Abstractor, two layers of the published six."""

from configs.easy_vqa import base


def get_config():
    return base("honeybee_d", dict(name="honeybee_d", scale_factor=2, depth=2))

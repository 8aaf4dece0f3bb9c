"""Matryoshka Multimodal Models: each step averages the loss of all scales."""

from configs.easy_vqa import base


def get_config():
    return base("m3", dict(name="m3", scale_factor=(2, 4, 8)), training=dict(every_budget=True))

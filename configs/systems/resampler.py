"""Qwen-VL's resampler."""

from configs.easy_vqa import base


def get_config():
    return base("resampler", dict(name="resampler", queries=16))

"""Qwen-VL's resampler, 144 tokens."""

from configs.llava import base


def get_config(stage="finetune"):
    return base("resampler", stage, dict(name="resampler", queries=144), tokens=144)

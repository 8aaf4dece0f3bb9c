"""Matryoshka Multimodal Models: from LLaVA-1.5, each step averages the loss of five scales."""

from configs.llava import base


def get_config(stage="finetune"):
    return base("m3", stage, dict(name="m3"), tokens=576, training=dict(every_budget=True))

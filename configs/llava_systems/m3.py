"""Matryoshka Multimodal Models: from LLaVA-1.5, each step averages the loss of five scales."""

from configs.llava import base


def get_config(stage="finetune"):
    return base(
        "m3", stage, dict(name="m3", scale_factor=(1, 2, 4, 8, 24)), tokens=576, training=dict(every_budget=True)
    )

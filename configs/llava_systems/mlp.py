"""LLaVA-1.5's MLP, all 576 tokens."""

from configs.llava import base


def get_config(stage="finetune"):
    return base("mlp", stage, dict(name="mlp"), tokens=576)

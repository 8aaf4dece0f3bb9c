"""LLaVA-1.5's MLP: every patch a token. PruMerge, FasterVLM and FastV run on it without training."""

from configs.easy_vqa import base


def get_config():
    return base("mlp", dict(name="mlp", select_layer=-2), data=dict(row_length=512))

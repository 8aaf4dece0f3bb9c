"""DynamicViT with its published ratio: 197 tokens leave the tower."""

from configs.llava import base


def get_config(stage="finetune"):
    return base("dynamicvit", stage, dict(name="dynamicvit"), tokens=197)

"""EViT with its published ratio: 201 tokens leave the tower."""

from configs.llava import base


def get_config(stage="finetune"):
    return base("evit", stage, dict(name="evit"), tokens=201)

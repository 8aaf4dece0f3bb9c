"""DynamicViT: trained predictors choose 32, then 16 of the tower's 64 patches."""

from configs.easy_vqa import base


def get_config():
    return base("dynamicvit", dict(name="dynamicvit", prune_layers=(1, 2), keep_ratio=0.5))

"""EViT: the tower goes on with the patches that its CLS token looks at, 31 and 16 of 64 tokens behind its layers."""

from configs.easy_vqa import base


def get_config():
    return base("evit", dict(name="evit", prune_layers=(1, 2), keep_ratio=0.46))

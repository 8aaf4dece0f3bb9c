"""PruMerge with its published ratio: 72 patches and one token of the rest."""

from configs.llava import base


def get_config(stage="finetune"):
    return base("prumerge", stage, dict(name="prumerge"), tokens=73)

"""PruMerge+ with its published ratio."""

from configs.llava import base


def get_config(stage="finetune"):
    return base("prumerge_plus", stage, dict(name="prumerge_plus"), tokens=145)

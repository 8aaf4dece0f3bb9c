"""Matryoshka Query Transformer: 256 queries in stage 1, one of eight numbers of them drawn each step in stage 2."""

from configs.llava import base


def get_config(stage="finetune"):
    return base("mqt", stage, dict(name="mqt", tokens=(256,) if stage == "pretrain" else ()), tokens=256)

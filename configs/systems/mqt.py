"""Matryoshka Query Transformer: the number of queries is drawn each step."""

from configs.easy_vqa import base


def get_config():
    return base("mqt", dict(name="mqt", queries=64, tokens=(16, 4, 1)))

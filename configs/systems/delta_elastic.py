"""Delta with a budget drawn each step: 64, 16, 4 or 1 tokens from one set of weights."""

from configs.easy_vqa import base


def get_config():
    return base(
        "delta_elastic", dict(name="delta", variant="paper", scale_factor=(1, 2, 4, 8)), data=dict(row_length=320)
    )

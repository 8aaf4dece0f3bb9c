"""LLaVolta: LLaVA-1.5's MLP, its tokens pooled inside the decoder for the first three quarters of the training."""

from configs.easy_vqa import base


def get_config():
    return base(
        "llavolta",
        dict(name="mlp", select_layer=-2),
        data=dict(row_length=512),
        training=dict(llavolta=((8, 1), (2, 1), (2, 2), (1, 0))),
    )

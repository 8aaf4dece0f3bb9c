"""LLaVolta: LLaVA-1.5's MLP, its tokens pooled inside the decoder for the first three quarters of stage 2."""

from configs.llava import base


def get_config(stage="finetune"):
    stages = ((8, 2), (2, 2), (2, 16), (1, 0)) if stage == "finetune" else ()
    return base("llavolta", stage, dict(name="mlp"), tokens=576, training=dict(llavolta=stages))

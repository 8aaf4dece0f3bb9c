"""Stage 2 of Delta-LLaVA-7B: 665k conversations, projector and Vicuna train, 144 tokens an image."""

from configs.llava import base


def get_config():
    # The name and projector of stage 1 (pretrain_7b.py): the run begins with runs/delta_pretrain.
    return base("delta", "finetune", dict(name="delta", scale_factor=2), tokens=144)

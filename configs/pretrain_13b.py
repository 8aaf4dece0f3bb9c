"""Stage 1 of Delta-LLaVA-13B."""

from configs.llava import base


def get_config():
    return base("delta_13b", "pretrain", dict(name="delta", scale_factor=2), tokens=144, decoder="vicuna_13b")

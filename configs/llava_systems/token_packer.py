"""TokenPacker, 144 tokens."""

from configs.llava import base


def get_config(stage="finetune"):
    return base("token_packer", stage, dict(name="token_packer", scale_factor=2), tokens=144)

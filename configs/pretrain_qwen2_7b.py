"""Stage 1 with Qwen2-7B as the decoder."""

from configs.llava import base


def get_config():
    return base("delta_qwen2", "pretrain", dict(name="delta", scale_factor=2), tokens=144, decoder="qwen2_7b")

"""Stage 1 of Delta-LLaVA with Qwen2-7B as the decoder: as pretrain_7b.py."""

from configs.llava import base


def get_config():
    # No template: stage 1 trains on captions alone, whatever the decoder.
    return base("delta_qwen2", "pretrain", dict(name="delta", scale_factor=2), tokens=144, decoder="qwen2_7b")

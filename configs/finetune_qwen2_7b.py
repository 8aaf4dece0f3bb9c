"""Stage 2 of Delta-LLaVA with Qwen2-7B as the decoder: as finetune_7b.py."""

from configs.llava import base


def get_config():
    # Qwen2 was instructed in ChatML, whose markers are single tokens of its vocabulary.
    return base(
        "delta_qwen2", "finetune", dict(name="delta", scale_factor=2), tokens=144, decoder="qwen2_7b", template="chatml"
    )

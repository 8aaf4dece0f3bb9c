"""Stage 2 of Delta-LLaVA-7B with adapters (LoRA) beside the frozen Vicuna: as finetune_7b.py, for smaller GPUs.

On one H100 add --config.optimizer.accumulation=8."""

from configs import finetune_7b
from configs.llava import adapted


def get_config():
    return adapted(finetune_7b.get_config(), "delta_lora")

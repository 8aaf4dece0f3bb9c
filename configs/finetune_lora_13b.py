"""Stage 2 of Delta-LLaVA-13B with adapters (LoRA) beside the frozen Vicuna: as finetune_13b.py, for smaller GPUs."""

from configs import finetune_13b
from configs.llava import adapted


def get_config():
    return adapted(finetune_13b.get_config(), "delta_13b_lora")

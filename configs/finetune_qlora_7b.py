"""Stage 2 of Delta-LLaVA-7B with adapters beside a Vicuna in 4 bits (QLoRA), on one GPU of 24 GB."""

from dataclasses import replace

from configs import finetune_7b
from configs.llava import adapted


def get_config():
    cfg = finetune_7b.get_config()
    # One row at a time; LLaVA's script for QLoRA has the rate of full tuning.
    cfg = replace(cfg, optimizer=replace(cfg.optimizer, accumulation=cfg.data.rows))
    return adapted(cfg, "delta_qlora", lr=2e-5, base="nf4")

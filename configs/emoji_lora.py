"""Stage 2 of the emoji (emoji.py) with small adapters beside a frozen SmolLM2-135M, on a CPU in minutes.

``configs/emoji_lora.py:SYSTEM``, Delta by default; begins where emoji.py's stage 1 ended."""

from dataclasses import replace

from configs import emoji
from configs.llava import adapted


def get_config(system: str = "delta"):
    cfg = adapted(
        emoji.get_config(f"{system}-finetune"), f"emoji_{system}_lora", lr=1e-3, rank=16, alpha=32, dropout=0.0
    )
    return replace(cfg, optimizer=replace(cfg.optimizer, rates={"^projector/": 1e-4}))

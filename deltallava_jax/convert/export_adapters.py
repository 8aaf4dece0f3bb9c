"""Writes LoRA adapters: as peft's folders beside a base model for transformers, and as LLaVA's."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from deltallava_jax import cli
from deltallava_jax.config import ModelConfig
from deltallava_jax.convert.adapters import WRAPPED, module_names, tensor_names
from deltallava_jax.convert.card import write_adapter_card, write_card
from deltallava_jax.convert.export import LLAVA, write_hf, write_llava
from deltallava_jax.convert.folder import write_json
from deltallava_jax.convert.pretrained import CheckpointLayout, Pretrained
from deltallava_jax.convert.shards import write_stacks
from deltallava_jax.convert.tensors import ADAPTER_CONFIG, ADAPTER_WEIGHTS, NON_LORA
from deltallava_jax.errors import ConversionError
from deltallava_jax.models import lora, systems
from deltallava_jax.models.names import Entry, to_torch

BASE = "base"  # the folder of the base model in an adapter's


def write_peft(model: Pretrained, folder: Path, target: Path) -> None:
    """An adapter for peft, and in base/ its base model for transformers, which holds the projector.

    target: where ``folder`` will be. Raises ConversionError for a model without adapters, or as ``write_hf``."""
    if model.lora is None:
        raise ConversionError("--to peft is for models with LoRA adapters; this one has none; --to hf writes it whole")
    base = folder / BASE
    base.mkdir()
    write_hf(model.base, base)
    write_card(model.base, base, f"{target.name}/{BASE}", None)
    cfg = model.cfg
    heads = {"decoder": r".*language_model.*", "vision": r".*vision_tower.*layers.*"}  # not SigLIP's pooling head
    if not cfg.whole:
        prefixes = "model.", ""
        heads = {"decoder": r".*layers.*", "vision": r".*layers.*"}
    elif systems.system(cfg.projector).is_llava:
        prefixes = "model.language_model.", "model.vision_tower."
    else:
        prefixes = "language_model.model.", "vision_tower."
    _write_adapter(model, folder, module_names(cfg, *prefixes), heads, str(target / BASE))
    write_adapter_card(model, folder, target.name, BASE)
    if cfg.projector:
        cli.log(f"the projector: in {target / BASE}, the adapter's base model")


def write_llava_adapter(model: Pretrained, folder: Path, target: Path) -> None:
    """An adapter as LLaVA's code reads it, with the projector in non_lora_trainables.bin.

    target: where ``folder`` will be. Raises ConversionError without torch, or as ``write_llava``."""
    try:
        import torch
    except ImportError as error:
        raise ConversionError(f"--to llava writes an adapter's {NON_LORA} with torch: pip install torch") from error
    model.require_base("a LLaVA adapter's folder")
    write_llava(model.base, folder, shard_bytes=None)
    heads = {"decoder": r"model\.layers.*", "vision": r".*vision_tower.*layers.*"}
    names = module_names(model.cfg, LLAVA.decoder, LLAVA.vision)
    _write_adapter(model, folder, names, heads, model.base_name or None)
    layout = CheckpointLayout(projector=WRAPPED + LLAVA.projector)
    alone = ModelConfig(None, model.cfg.projector, None)
    state = to_torch(model.params, layout.name_table(alone))
    torch.save({name: _torch(value) for name, value in state.items()}, folder / NON_LORA)
    write_adapter_card(model, folder, target.name, None)
    cli.log(f"the projector: in {target / NON_LORA}")
    if not {"llava", "lora"} <= set(re.findall("llava|lora", target.name.lower())):
        cli.log(f'note: LLaVA\'s code wants "llava" and "lora" in the folder\'s name; this one is {target.name}')


def _write_adapter(model: Pretrained, folder: Path, names: dict[str, str], heads: dict, base: str | None) -> None:
    """adapter_config.json and the tensors. names: our modules' paths in PyTorch; heads: of a part, the regular
    expression of its modules' paths up to their last names."""
    table, ends = [], {}
    for module, name in names.items():
        if f"{module}/{lora.A}" in model.adapters:
            a, b = tensor_names(name)
            table += [Entry(a, f"{module}/{lora.A}", "linear"), Entry(b, f"{module}/{lora.B}", "linear")]
            ends.setdefault(module.split("/")[0], []).append(name.rsplit(".", 1)[1])
    left = set(model.adapters) - {entry.path for entry in table}
    assert not left, left
    settings = model.lora
    if settings.base != "bfloat16":
        cli.log(f"note: the adapter was trained beside the base in {settings.base}, not in its original precision")
    alpha = int(settings.alpha) if settings.alpha == int(settings.alpha) else settings.alpha
    targets = "|".join(rf"{heads[part]}\.({'|'.join(found)})" for part, found in ends.items())
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if model.cfg.decoder else "FEATURE_EXTRACTION",
        "base_model_name_or_path": base,
        "r": settings.rank,
        "lora_alpha": alpha,
        "lora_dropout": settings.dropout,
        "use_rslora": settings.rslora,
        "target_modules": targets,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
        "layers_pattern": None,
        "layers_to_transform": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "revision": None,
        "auto_mapping": None,
    }
    write_json(folder / ADAPTER_CONFIG, config)
    write_stacks(folder / ADAPTER_WEIGHTS[0], table, model.adapters)


def _torch(value: np.ndarray):
    import torch

    if value.dtype.name == "bfloat16":
        return torch.tensor(value.view(np.uint16)).view(torch.bfloat16)
    return torch.tensor(value)

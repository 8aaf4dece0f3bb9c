"""The tensors of a checkpoint in other files: torch.save's, and LLaVA's original layout."""

import json
import shutil

import ml_dtypes
import numpy as np
import torch

from tests.convert.checkpoints import renamed, tensors, write_config, write_tensors


def save_bin(folder, named: dict, shards: int, name: str = "pytorch_model"):
    """torch.save in shards with an index, or whole."""
    state = {key: torch_tensor(value) for key, value in named.items()}
    if shards == 1:
        torch.save(state, folder / f"{name}.bin")
        return
    files = [f"{name}-{i + 1:05d}-of-{shards:05d}.bin" for i in range(shards)]
    where = {key: files[i % shards] for i, key in enumerate(state)}
    for file in files:
        torch.save({key: value for key, value in state.items() if where[key] == file}, folder / file)
    (folder / f"{name}.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def torch_tensor(value: np.ndarray):
    if value.dtype == ml_dtypes.bfloat16:
        return torch.tensor(value.view(np.int16)).view(torch.bfloat16)
    return torch.tensor(value)


TO_LLAVA = (
    ("language_model.lm_head.", "lm_head."),
    ("language_model.model.", "model."),
    ("multi_modal_projector.linear_1.", "model.mm_projector.0."),
    ("multi_modal_projector.linear_2.", "model.mm_projector.2."),
    ("vision_tower.", "model.vision_tower.vision_tower.vision_model."),
)
FROM_EXPORT = (("vision_tower.vision_model.", "model.vision_tower.vision_tower.vision_model."),)


def llava_folder(source, folder, *, tower: bool = True, projector: dict | None = None, **settings):
    """A Hugging Face LLaVA folder in the original layout; the tower's config lies in a folder beside the weights.

    tower: whether its tensors are in the checkpoint. projector: other tensors for it, by their names below
    model.mm_projector."""
    hf = json.loads((source / "config.json").read_text())
    named = renamed(tensors(source), *TO_LLAVA)
    if projector is not None:
        named = {name: value for name, value in named.items() if "mm_projector" not in name}
        named |= {f"model.mm_projector.{name}": value for name, value in projector.items()}
    if not tower:
        named = {name: value for name, value in named.items() if "vision_tower" not in name}
    folder.mkdir()
    write_tensors(folder, named)
    kind = "llava_qwen" if hf["text_config"]["model_type"] == "qwen2" else "llava_llama"
    write_config(
        folder,
        **hf["text_config"]
        | {
            "model_type": kind,
            "architectures": ["LlavaLlamaForCausalLM"],
            "mm_vision_tower": "tower",
            "mm_hidden_size": hf["vision_config"]["hidden_size"],
            "mm_projector_type": "mlp2x_gelu",
            "mm_vision_select_layer": -2,
            "mm_vision_select_feature": "patch",
            "mm_use_im_start_end": False,
            "mm_use_im_patch_token": False,
            "tune_mm_mlp_adapter": False,
        }
        | settings,
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, folder)
    if tower:
        write_tower_config(source, folder / "tower")
    return folder


def write_tower_config(source, folder):
    folder.mkdir()
    hf = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({"model_type": "clip_vision_model"} | hf["vision_config"]))


def tower_folder(source, folder):
    """The tower of a LLaVA folder as a CLIPVisionModel."""
    write_tower_config(source, folder)
    own = {name: value for name, value in tensors(source).items() if name.startswith("vision_tower.")}
    write_tensors(folder, renamed(own, ("vision_tower.", "vision_model.")))
    return folder

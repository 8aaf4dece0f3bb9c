"""LoRA adapters as peft and LLaVA save them, on tiny models, and what peft answers with them."""

import json
from pathlib import Path

import numpy as np
import peft
import torch
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForImageTextToText

from tests.convert.checkpoints import pixels, rows_of, tensors, torch_pixels, torch_rows
from tests.convert.exports import loaded
from tests.convert.layouts import llava_folder

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
DECODER = rf".*language_model.*\.({'|'.join(LINEARS)})"
SOME = r".*language_model.*\.(q_proj|v_proj)"
BOTH = r".*language_model.*\.(q_proj|down_proj)|.*vision_tower.*layers.*\.(q_proj|out_proj|fc1)"


def save_peft(base: Path, folder: Path, targets=DECODER, seed: int = 0, kind=AutoModelForImageTextToText, **settings):
    """A folder with an adapter of random matrices for the model in ``base``, as peft saves it."""
    settings = dict(r=4, lora_alpha=6, lora_dropout=0.05, task_type="CAUSAL_LM") | settings
    model = peft.get_peft_model(kind.from_pretrained(base), peft.LoraConfig(target_modules=targets, **settings))
    redraw(model, seed)
    model.save_pretrained(folder)
    return folder


def redraw(model, seed: int) -> None:
    torch.manual_seed(seed)
    for name, value in model.named_parameters():
        if "lora_" in name:
            value.data.normal_(std=0.3)


def config(folder: Path) -> dict:
    return json.loads((folder / "adapter_config.json").read_text())


def edit(folder: Path, **changes) -> Path:
    """Changes values of a folder's adapter_config.json."""
    (folder / "adapter_config.json").write_text(json.dumps(config(folder) | changes))
    return folder


def weights(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "adapter_model.safetensors")


def write_weights(folder: Path, named: dict[str, np.ndarray]) -> Path:
    save_file(named, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


def with_adapter(base: Path, adapter: Path):
    """The model that peft makes of both: every tensor of the file found and used."""
    model = peft.PeftModel.from_pretrained(loaded(base), adapter)
    state = {name.replace(".default.", "."): value for name, value in model.state_dict().items() if "lora_" in name}
    named = weights(adapter)
    assert len(state) == len(named)
    values = sorted(np.asarray(value).tobytes() for value in state.values())
    assert values == sorted(value.astype(np.float32).tobytes() for value in named.values())
    return model.eval()


def adapted_modules(base: Path, folder: Path) -> set[str]:
    """The modules of a model that the target_modules of an adapter match."""
    settings = peft.PeftConfig.from_pretrained(folder)
    return {name for name, _ in loaded(base).named_modules() if check_target_module_exists(settings, name)}


def llava_adapter(source: Path, adapter: Path, folder: Path, seed: int = 5) -> tuple[Path, dict]:
    """A LLaVA folder of an adapter for transformers' LLaVA, with a projector of its own; the projector's tensors."""
    whole = llava_folder(source, folder.parent / f"{folder.name}-whole", tower=False, image_aspect_ratio="pad")
    rng = np.random.default_rng(seed)
    old = {name: value for name, value in tensors(whole).items() if "mm_projector" in name}
    projector = {name: rng.standard_normal(value.shape).astype(value.dtype) * 0.2 for name, value in old.items()}
    folder.mkdir()
    named = {
        name.replace("base_model.model.model.language_model.", "base_model.model.model."): value
        for name, value in weights(adapter).items()
    }
    write_weights(folder, named)
    settings = config(adapter) | dict(target_modules=list(LINEARS), base_model_name_or_path="lmsys/vicuna-7b-v1.5")
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text((whole / "config.json").read_text())
    state = {f"base_model.model.{name}": torch.tensor(value) for name, value in projector.items()}
    torch.save(state, folder / "non_lora_trainables.bin")
    return folder, projector


ROWS, IMAGES = rows_of([1, 2, 0], [12, 9, 20]), pixels(3)

PROMPTS = rows_of([1, 1, 1], [12, 6, 9])


def their_tokens(model, opened: int = 16) -> list[list[int]]:
    """8 greedy tokens after PROMPTS with IMAGES."""
    inputs = torch_rows(PROMPTS, opened, left=True, image_token=model.config.image_token_index)
    settings = dict(do_sample=False, max_new_tokens=8, pad_token_id=0, eos_token_id=None)
    made = model.generate(**inputs, pixel_values=torch_pixels(IMAGES), **settings)
    return made[:, -8:].tolist()


def their_logits(model, opened: int = 16) -> torch.Tensor:
    """[tokens that are not padding, vocab] of ROWS with IMAGES; opened: image tokens of an image in the rows."""
    inputs = torch_rows(ROWS, opened, image_token=model.config.image_token_index)
    with torch.no_grad():
        logits = model(**inputs, pixel_values=torch_pixels(IMAGES)).logits
    lengths = inputs["attention_mask"].sum(1).tolist()
    if opened == 1:  # the model opens them itself, into 16
        lengths = [length + 15 * len(row.image_positions) for length, row in zip(lengths, ROWS, strict=True)]
    return torch.cat([row[:length] for row, length in zip(logits, lengths, strict=True)])

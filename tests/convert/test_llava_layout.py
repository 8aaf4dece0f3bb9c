"""LLaVA's original layout and projectors' files through the converter and back, to the bit."""

import dataclasses

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")

import ml_dtypes  # noqa: E402
import transformers  # noqa: E402

from deltallava_jax.config import ProjectorConfig, system_config  # noqa: E402
from deltallava_jax.convert.export import write_hf, write_llava  # noqa: E402
from deltallava_jax.convert.read import Pretrained, read  # noqa: E402
from deltallava_jax.convert.workdir import compose, read_workdir, write_workdir  # noqa: E402
from deltallava_jax.models import systems  # noqa: E402
from tests.convert import checkpoints  # noqa: E402
from tests.convert.checkpoints import (  # noqa: E402
    assert_same_bits,
    assert_same_folder,
    assert_same_params,
    convert,
    folders,
    renamed,
    tensors,
)
from tests.convert.layouts import FROM_EXPORT, TO_LLAVA, llava_folder, save_bin, tower_folder  # noqa: E402
from tests.models.rows import random_params  # noqa: E402

# ------------------------------------------------------------------ the original LLaVA layout


@pytest.mark.parametrize("name, dtype", [("llava", "float16"), ("llava_qwen2", "bfloat16")])
def test_llava_layout_through_a_workdir(name, dtype, saved, opened, tmp_path):
    source = llava_folder(saved(name, dtype), tmp_path / "llava")
    convert(source, tmp_path / "work")
    assert_same_params(read_workdir(tmp_path / "work").params, opened(name, dtype).params)
    convert(tmp_path / "work", tmp_path / "back", "--to", "llava")
    assert_same_folder(tmp_path / "back", source)


def test_an_exported_llava_folder_holds_what_it_names(saved, opened, tmp_path):
    """mm_vision_tower names a folder beside the weights: without it the export could not be read again."""
    source = llava_folder(saved("llava", "float16"), tmp_path / "llava")
    convert(source, tmp_path / "back", "--to", "llava")
    assert_same_params(read(tmp_path / "back").params, opened("llava", "float16").params)


def test_llava_layout_to_hugging_face_and_back(saved, tmp_path):
    """Both exports of the same model; transformers' logits are those of the model it was made from."""
    source = llava_folder(saved("llava"), tmp_path / "llava")
    convert(source, tmp_path / "work")
    convert(tmp_path / "work", tmp_path / "hf", "--to", "hf")
    convert(tmp_path / "hf", tmp_path / "again", "--to", "llava")
    ours, theirs = tensors(tmp_path / "again"), renamed(tensors(tmp_path / "hf"), *FROM_EXPORT, *TO_LLAVA)
    assert_same_bits(ours, theirs)
    model = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf")
    original = checkpoints.model("llava")
    rows, images = checkpoints.rows_of([1], [12]), checkpoints.torch_pixels(checkpoints.pixels(1))
    with torch.no_grad():
        token = model.config.image_token_index
        mine = model(**checkpoints.torch_rows(rows, 16, image_token=token), pixel_values=images).logits
        reference = original(**checkpoints.torch_rows(rows, 16), pixel_values=images).logits
    np.testing.assert_allclose(mine[..., : checkpoints.VOCAB], reference, atol=1e-5)


def test_llava_layout_without_the_tower(saved, opened, tmp_path):
    """As stage 2 saves it with a frozen tower: the tower comes from --vision, and the export has no tower either."""
    whole = saved("llava", "float16")
    source = llava_folder(whole, tmp_path / "llava", tower=False)
    tower = tower_folder(whole, tmp_path / "clip")
    convert(source, tmp_path / "work", "--vision", tower)
    model = read_workdir(tmp_path / "work")
    assert model.cfg.whole
    assert_same_params(model.params, opened("llava", "float16").params)
    convert(tmp_path / "work", tmp_path / "back", "--to", "llava")
    assert_same_folder(tmp_path / "back", source)


# ------------------------------------------------------------------ Delta-LLaVA and projectors' files


def delta_tensors(cfg: ProjectorConfig, dtype) -> dict[str, np.ndarray]:
    named = systems.to_torch(random_params(systems.init_params, cfg), cfg)
    return {name: value.astype(dtype) for name, value in named.items()}


def delta_config(**changes) -> ProjectorConfig:
    """The release's projector for the wide tower; its head widths of 128 and 32 are in no tensor's shape."""
    values = dict(grid=4, in_width=128, embed_width=128, out_width=checkpoints.WIDTH, rank=4, scale_factor=2)
    return system_config(**values | changes)


def test_delta_llava_release_layout(saved, tmp_path):
    """A checkpoint as the public code saves it: the projector's settings follow from its tensors and scale_factor."""
    cfg = delta_config()
    named = delta_tensors(cfg, np.float16)
    source = llava_folder(
        saved("llava_wide", "float16"), tmp_path / "delta", projector=named, mm_projector_type="delta", scale_factor=2
    )
    model = read(source)
    assert model.cfg.projector == cfg
    ours = systems.to_torch(model.params["projector"], cfg)
    assert_same_bits(ours, named)
    work, back = folders(tmp_path, "work", "back")
    write_workdir(model, work, "work")
    write_llava(read_workdir(work), back)
    assert_same_folder(back, source)


def delta_model(opened, variant: str, ablation: str) -> Pretrained:
    """An elastic Delta model with settings that no tensor shows: window, head widths, scale factors."""
    window = 2 if variant == "paper" else 1
    cfg = delta_config(
        variant=variant, ablation=ablation, window=window, scale_factor=(1, 2), head_dim=32, block_head_dim=16,
        mlp_width=24,
    )  # fmt: skip
    model = opened("llava_wide", "float16")
    params = model.params | {"projector": random_params(systems.init_params, cfg)}
    return dataclasses.replace(model, cfg=dataclasses.replace(model.cfg, projector=cfg), params=params)


@pytest.mark.parametrize("variant, ablation", [("release", "no_tb"), ("paper", "none")])
@pytest.mark.parametrize("write", [write_hf, write_llava])
def test_our_exports_of_delta_models_are_read_and_written_again(write, variant, ablation, opened, tmp_path):
    """All settings of the projector are in config.json; the second export is the first one."""
    model = delta_model(opened, variant, ablation)
    first, second = folders(tmp_path, "first", "second")
    write(model, first)
    back = read(first)
    assert back.cfg.projector == model.cfg.projector and back.cfg.vision == model.cfg.vision
    for part in ("vision", "projector"):
        assert_same_params(back.params[part], model.params[part])
    write(back, second)
    assert_same_folder(second, first)
    assert sorted(file.name for file in second.iterdir()) == sorted(file.name for file in first.iterdir())


@pytest.mark.parametrize("system", ["mlp", "delta"])
def test_stage_1_projector_file(system, saved, opened, tmp_path):
    """mm_projector.bin, names with model.mm_projector. before them: read alone, and composed with tower and decoder."""
    if system == "delta":
        named = delta_tensors(delta_config(), ml_dtypes.bfloat16)
    else:
        ours = renamed(tensors(saved("llava_wide", "bfloat16")), *TO_LLAVA)
        named = {k.removeprefix("model.mm_projector."): v for k, v in ours.items() if "mm_projector" in k}
    stage1 = tmp_path / "stage1"
    stage1.mkdir()
    save_bin(stage1, {f"model.mm_projector.{k}": v for k, v in named.items()}, shards=1, name="mm_projector")
    checkpoints.write_config(stage1, model_type="llava_llama", mm_vision_tower="somewhere", scale_factor=2)
    for path in [stage1 / "mm_projector.bin"] + [stage1] * (system == "mlp"):
        alone = read(path)
        assert (alone.cfg.vision, alone.cfg.decoder) == (None, None) and alone.cfg.projector.name == system
        assert_same_bits(systems.to_torch(alone.params["projector"], alone.cfg.projector), named)

    tower = tower_folder(saved("llava_wide", "float16"), tmp_path / "clip")
    settings = {"scale_factor": (1, 2)} if system == "delta" else {}
    model = compose(tower, saved("llama_grouped", "float16"), str(stage1 / "mm_projector.bin"), settings)
    assert model.cfg.whole and model.cfg.projector.grid == 4
    assert_same_bits(systems.to_torch(model.params["projector"], model.cfg.projector), named)
    assert_same_params(model.params["vision"], opened("llava_wide", "float16").params["vision"])
    assert_same_params(model.params["decoder"], opened("llama_grouped", "float16").params["decoder"])
    if system == "delta":
        assert systems.budgets(model.cfg.projector) == (16, 4)


def test_the_export_has_the_requested_dtype(saved, tmp_path):
    """Transformers loads a checkpoint in the dtype of its config.json."""
    convert(saved("qwen2"), tmp_path / "half", "--dtype", "float16", "--to", "hf")
    assert {str(value.dtype) for value in tensors(tmp_path / "half").values()} == {"float16"}
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "half").dtype == torch.float16


def test_dtype_casts_a_fresh_projector(saved):
    """--dtype is "of all parameters"."""
    model = compose(saved("clip"), saved("llama"), "mlp", {}, dtype="bfloat16")
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(model.params)} == {"bfloat16"}

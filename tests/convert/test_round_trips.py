"""Hugging Face folders through the converter and back: every tensor, name and companion file as it was, to the bit."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import transformers  # noqa: E402

from deltallava_jax.config import ASPECTS  # noqa: E402
from deltallava_jax.convert.export import write_hf, write_llava  # noqa: E402
from deltallava_jax.convert.read import read  # noqa: E402
from deltallava_jax.convert.workdir import read_workdir, write_workdir  # noqa: E402
from tests.convert import checkpoints  # noqa: E402
from tests.convert.checkpoints import (  # noqa: E402
    assert_same_bits,
    assert_same_folder,
    assert_same_params,
    convert,
    copy_with,
    folders,
    renamed,
    tensors,
)
from tests.convert.layouts import save_bin  # noqa: E402

FAMILIES = ("llama_grouped", "qwen2", "clip", "siglip", "llava", "llava_qwen2")


def test_the_models_cover_the_families(saved):
    """SigLIP's pooling head is among the tensors that come back; a tied head is not stored."""
    assert any(name.startswith("head.") for name in tensors(saved("siglip")))
    assert "lm_head.weight" not in tensors(saved("qwen2")) and "lm_head.weight" in tensors(saved("llama"))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("name", FAMILIES)
def test_hugging_face_directly_and_through_a_workdir(name, dtype, saved, opened, tmp_path):
    source, work, direct, back = saved(name, dtype), *folders(tmp_path, "work", "direct", "back")
    write_hf(opened(name, dtype), direct)
    assert_same_folder(direct, source)
    assert {str(value.dtype) for value in tensors(direct).values()} == {dtype}
    write_workdir(opened(name, dtype), work, name)
    write_hf(read_workdir(work), back)
    assert_same_folder(back, source)


@pytest.mark.parametrize("dtype, bits", [("float16", np.uint16), ("bfloat16", np.uint16), ("float32", np.uint32)])
def test_special_values_keep_their_bits(dtype, bits, saved, tmp_path):
    """Negative zero, subnormals, infinities and NaN. (A NaN's payload may get lost where XLA does not optimise.)"""
    source = saved("llama", dtype)
    sign = 1 << (8 * bits().itemsize - 1)
    kind = tensors(source)["lm_head.weight"].dtype
    infinity, nan = (np.array(value, np.float32).astype(kind).view(bits) for value in (np.inf, np.nan))
    special = np.array([sign, 1, sign + 1, infinity, sign + infinity, nan], bits)
    changed = {name: value.copy() for name, value in tensors(source).items()}
    for value in changed.values():
        value.reshape(-1).view(bits)[: len(special)] = special
    copy_with(source, tmp_path / "source", changed)
    convert(tmp_path / "source", tmp_path / "work")
    convert(tmp_path / "work", tmp_path / "back", "--to", "hf")
    assert_same_bits(tensors(tmp_path / "back"), changed)


@pytest.mark.parametrize("name, alone", [("clip_pair", "CLIPVisionModel"), ("siglip_pair", "SiglipVisionModel")])
def test_of_a_pair_the_tower_comes_back(name, alone, saved, tmp_path):
    """CLIPModel and SiglipModel: the vision tensors with their names; transformers loads them as the tower."""
    source = saved(name, "float16")
    convert(source, tmp_path / "work")
    convert(tmp_path / "work", tmp_path / "back", "--to", "hf")
    vision = {key: value for key, value in tensors(source).items() if key.startswith("vision_model.")}
    assert_same_bits(tensors(tmp_path / "back"), vision)
    model = getattr(transformers, alone).from_pretrained(tmp_path / "back", dtype=torch.float32)
    images = checkpoints.torch_pixels(checkpoints.pixels(1))
    with torch.no_grad():
        mine, reference = (
            part(images).pooler_output for part in (model, checkpoints.model(name).vision_model)
        )  # fmt: skip
    np.testing.assert_allclose(mine, reference, atol=2e-2)


LAYOUTS = {
    "old": (("vision_tower.", "vision_tower.vision_model."), ("", "")),
    "current": (
        ("language_model.lm_head.", "lm_head."),
        ("language_model.model.", "model.language_model."),
        ("vision_tower.", "model.vision_tower."),
        ("", "model."),
    ),
    "current_with_vision_model": (
        ("language_model.lm_head.", "lm_head."),
        ("language_model.model.", "model.language_model."),
        ("vision_tower.", "model.vision_tower.vision_model."),
        ("", "model."),
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_hugging_face_llava(layout, saved, opened, tmp_path):
    """The same parameters, and the names come back as they were."""
    source = saved("llava", "float16")
    other = copy_with(source, tmp_path / "source", renamed(tensors(source), *LAYOUTS[layout]))
    model = read(other)
    assert_same_params(model.params, opened("llava", "float16").params)
    if layout == "current":  # the layout is kept in a workdir, too
        (work,) = folders(tmp_path, "work")
        write_workdir(model, work, "work")
        model = read_workdir(work)
    (back,) = folders(tmp_path, "back")
    write_hf(model, back)
    assert_same_folder(back, other)


def test_llava_of_siglip(saved, opened, tmp_path):
    """The pooling head comes back in the same layout; another layout has only what LLaVA uses, by its names there."""
    source, back, llava = saved("llava_siglip", "float16"), *folders(tmp_path, "back", "llava")
    assert any(".head." in name for name in tensors(source))
    model = opened("llava_siglip", "float16")
    assert model.cfg.projector.select_layer == -1 and model.cfg.vision.family == "siglip"
    write_hf(model, back)
    assert_same_folder(back, source)
    write_llava(model, llava)
    assert_same_params(read(llava).params, model.params)
    assert all(name.startswith(("model.", "lm_head.")) for name in tensors(llava))


@pytest.mark.parametrize("aspect", ASPECTS)
@pytest.mark.parametrize("name", ["llava", "llava_siglip"])
def test_the_original_layout_records_how_images_become_square(name, aspect, opened, tmp_path):
    llava, again = folders(tmp_path, "llava", "again")
    write_llava(dataclasses.replace(opened(name), aspect=aspect), llava)
    assert read(llava).aspect == aspect
    write_llava(read(llava), again)
    assert_same_folder(again, llava)


def test_a_layer_counted_from_the_front(saved, tmp_path):
    """vision_feature_layer 2 of the four hidden states of three layers is -2."""
    source = copy_with(saved("llava"), tmp_path / "llava", tensors(saved("llava")))
    hf = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(hf | {"vision_feature_layer": 2}))
    assert read(source).cfg.projector.select_layer == -2


@pytest.mark.parametrize(
    "name, dtype, shards", [("llama", "bfloat16", 3), ("llava", "float16", 4), ("clip", "float32", 1)]
)
def test_pytorch_files_are_read_like_safetensors(name, dtype, shards, saved, opened, tmp_path):
    source = saved(name, dtype)
    shutil.copytree(source, tmp_path / "bin", ignore=shutil.ignore_patterns("*.safetensors"))
    save_bin(tmp_path / "bin", tensors(source), shards)
    model = read(tmp_path / "bin")
    assert_same_params(model.params, opened(name, dtype).params)
    (back,) = folders(tmp_path, "back")
    write_hf(model, back)
    assert_same_folder(back, source)


def test_shards_of_safetensors(saved, opened, tmp_path):
    """A small shard size: several files of at most that size, and an index that transformers and we load."""
    source, shard_bytes = saved("llava", "float16"), 20_000
    write_hf(opened("llava", "float16"), tmp_path, shard_bytes=shard_bytes)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 3 and sorted(set(index["weight_map"].values())) == [file.name for file in files]
    assert not (tmp_path / "model.safetensors").exists()
    whole = tensors(source)
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in whole.values())
    from safetensors.numpy import load_file

    for file in files:
        held = load_file(file)
        assert sum(value.nbytes for value in held.values()) <= shard_bytes or len(held) == 1
        assert all(index["weight_map"][name] == file.name for name in held)
    assert_same_folder(tmp_path, source)
    assert_same_params(read(tmp_path).params, opened("llava", "float16").params)
    ours = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float16).state_dict()
    theirs = transformers.LlavaForConditionalGeneration.from_pretrained(source, dtype=torch.float16).state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)

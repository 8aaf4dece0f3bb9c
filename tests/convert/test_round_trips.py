"""Checkpoints through the converter and back: every tensor, name and companion file as it was, to the bit."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")

import checkpoints  # noqa: E402
import ml_dtypes  # noqa: E402
import transformers  # noqa: E402
from checkpoints import assert_same_bits, convert, copy_with, renamed, tensors, write_tensors  # noqa: E402
from rows import random_params  # noqa: E402

from deltallava_jax.config import ASPECTS, ProjectorConfig, system_config  # noqa: E402
from deltallava_jax.convert.export import write_hf, write_llava  # noqa: E402
from deltallava_jax.convert.read import Pretrained, read  # noqa: E402
from deltallava_jax.convert.workdir import compose, read_workdir, write_workdir  # noqa: E402
from deltallava_jax.models import systems  # noqa: E402
from deltallava_jax.models.names import flatten  # noqa: E402

COMPANIONS = ("config.json", "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json",
              "generation_config.json")  # fmt: skip


def assert_same_folder(ours, theirs):
    """Tensors, names and companion files."""
    assert_same_bits(tensors(ours), tensors(theirs))
    kept = [name for name in COMPANIONS if (theirs / name).exists()]
    assert "config.json" in kept
    for name in kept:
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name


def folders(parent, *names):
    """New empty folders."""
    for name in names:
        (parent / name).mkdir()
    return [parent / name for name in names]


def assert_same_params(ours: dict, theirs: dict):
    ours, theirs = ({path: np.asarray(leaf) for path, leaf in flatten(tree).items()} for tree in (ours, theirs))
    assert_same_bits(ours, theirs)


# ------------------------------------------------------------------ Hugging Face folders

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
def test_the_original_layout_says_how_images_become_square(name, aspect, opened, tmp_path):
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


# ------------------------------------------------------------------ the original LLaVA layout

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
    checkpoints.write_config(
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


def test_the_export_says_the_dtype_that_was_asked_for(saved, tmp_path):
    """Transformers loads a checkpoint in the dtype of its config.json."""
    convert(saved("qwen2"), tmp_path / "half", "--dtype", "float16", "--to", "hf")
    assert {str(value.dtype) for value in tensors(tmp_path / "half").values()} == {"float16"}
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "half").dtype == torch.float16


def test_dtype_casts_a_fresh_projector(saved):
    """--dtype is "of all parameters"."""
    model = compose(saved("clip"), saved("llama"), "mlp", {}, dtype="bfloat16")
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(model.params)} == {"bfloat16"}

"""LoRA adapters that cannot be read, and options that contradict each other: refused in words, nothing left behind."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import deltallava_jax
from deltallava_jax.errors import ConversionError
from tests.convert.broken import (
    LLAVA,
    assert_has,
    clip,
    convert,
    llama,
    llava_hf,
    mlp_weights,
    refused,
)

SETTINGS = dict(
    peft_type="LORA", r=4, lora_alpha=8, lora_dropout=0.0, bias="none", base_model_name_or_path="some/base",
    target_modules=["q_proj", "v_proj"], init_lora_weights=True, modules_to_save=None, use_dora=False,
)  # fmt: skip
SHAPES = {"self_attn.q_proj": (32, 32), "self_attn.v_proj": (32, 16)}  # inputs and outputs, of tests.convert.broken


def adapter(folder, rank: int = 4, inputs: int = 32, **changes):
    """A folder with an adapter for the decoder of ``llava_hf``, as of transformers' LLaVA."""
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(SETTINGS | changes))
    rng, state = np.random.default_rng(0), {}
    for layer in range(2):
        for name, (_, outputs) in SHAPES.items():
            module = f"base_model.model.model.language_model.layers.{layer}.{name}"
            state[f"{module}.lora_A.weight"] = rng.standard_normal((rank, inputs), np.float32)
            state[f"{module}.lora_B.weight"] = rng.standard_normal((outputs, rank), np.float32)
    save_file(state, folder / "adapter_model.safetensors")
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return llava_hf(tmp_path_factory.mktemp("base") / "llava")


OPTIONS = {
    "use_dora": True,
    "modules_to_save": ["multi_modal_projector"],
    "bias": "lora_only",
    "lora_bias": True,
    "fan_in_fan_out": True,
    "layers_to_transform": [0],
    "layer_replication": [[0, 1]],
    "init_lora_weights": "pissa_niter_4",
    "trainable_token_indices": [3],
    "target_parameters": ["weight"],
    "alora_invocation_tokens": [3],
    "use_qalora": True,
    "an_option_of_the_future": 1,
}


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_that_is_not_honoured(option, base, tmp_path, target):
    source = adapter(tmp_path / "lora", **{option: OPTIONS[option]})
    words = "adapter_config.json", f"option {option}={OPTIONS[option]!r}", "merge_and_unload"
    assert_has(refused(target, source, "--base", base), *words)


@pytest.mark.parametrize("value", [None, {}, []])
def test_options_that_are_off(value, base, tmp_path):
    off = ("layers_to_transform", "rank_pattern", "layers_pattern", "loftq_config", "an_option_of_the_future")
    convert(adapter(tmp_path / "lora", **dict.fromkeys(off, value)), tmp_path / "made", "--base", base)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(peft_type="IA3"), ("peft_type='IA3'", "LORA")),
        (dict(r="4"), ("adapter_config.json option r='4'", "whole number")),
        (dict(lora_alpha=0), ("alpha_pattern", "above 0")),
        (dict(rank_pattern=[4]), ("rank_pattern=[4]",)),
        (dict(alpha_pattern={"q_proj": 2}), ("alphas ([2, 8])", "--merge")),
        (dict(alpha_pattern={"(": 2}), ("alpha_pattern",)),
    ],
)
def test_settings_without_a_meaning_here(changes, words, base, tmp_path, target):
    assert_has(refused(target, adapter(tmp_path / "lora", **changes), "--base", base), *words)


def edited(source, change):
    file = source / "adapter_model.safetensors"
    state = load_file(file)
    change(state)
    save_file(state, file)
    return source


KEY = "base_model.model.model.language_model.layers.1.self_attn.q_proj.lora_B.weight"
HEAD = "base_model.model.lm_head.lora_A.weight"
OTHER = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def test_a_layer_is_missing(base, tmp_path, target):
    source = edited(adapter(tmp_path / "lora"), lambda state: state.pop(KEY))
    words = source, base, f"missing     {KEY}  (32, 4)", "decoder/layers/q"
    assert_has(refused(target, source, "--base", base, lines=2), *words)


@pytest.mark.parametrize("name", [HEAD, OTHER, KEY.replace("lora_B", "lora_magnitude_vector"), "x"])
def test_a_key_without_a_place(name, base, tmp_path, target):
    source = edited(adapter(tmp_path / "lora"), lambda state: state.update({name: np.ones((4, 32), np.float32)}))
    assert_has(refused(target, source, "--base", base, lines=2), f"unexpected  {name}  (4, 32)")


def test_the_adapter_of_another_base(base, tmp_path, target):
    """Every wrong shape is listed with the expected one."""
    message = refused(target, adapter(tmp_path / "lora", inputs=48), "--base", base, lines=5)
    assert_has(message, "is (4, 48), expected (4, 32)", "lora_A", base)
    message = refused(target, adapter(tmp_path / "rank", rank=2), "--base", base, lines=9)
    assert_has(message, "is (2, 32), expected (4, 32)", "is (16, 2), expected (16, 4)")


def test_an_empty_adapter(base, tmp_path, target):
    source = edited(adapter(tmp_path / "lora"), lambda state: state.clear())
    assert_has(refused(target, source, "--base", base), source, "holds no adapters")


def test_the_base_is_missing(base, tmp_path, target):
    source = adapter(tmp_path / "lora")
    assert_has(refused(target, source), source, "'some/base'", "--base")
    assert_has(refused(target, source, "--base", tmp_path / "none"), f"--base {tmp_path / 'none'} does not exist")
    nameless = adapter(tmp_path / "nameless", base_model_name_or_path=None)
    assert_has(refused(target, nameless), nameless, "does not name", "--base")
    with pytest.raises(ConversionError, match="some/base.*--base"):
        deltallava_jax.load(source)


def test_options_that_contradict_each_other(base, tmp_path, target):
    source = adapter(tmp_path / "lora")
    assert_has(refused(target, base, "--base", base), "--base is for a LoRA adapter", base)
    assert_has(refused(target, base, "--merge"), "--merge is for LoRA adapters", base)
    assert_has(refused(target, base, "--to", "peft"), "--to peft", "none", "--to hf")
    assert_has(refused(target, source, "--base", base, "--to", "peft", "--merge"), "--merge", "--to peft")
    assert_has(refused(target, source, "--base", base, "--vision", base), "--vision")
    parts = "--vision", clip(tmp_path / "clip"), "--decoder", llama(tmp_path / "llama"), "--projector", "mlp"
    assert_has(refused(target, *parts, "--base", base), "--base", "composing")
    with pytest.raises(ConversionError, match="base=.* is for a LoRA adapter"):
        deltallava_jax.load(base, base=base)


def test_an_adapter_is_no_base(base, tmp_path, target):
    source, other = adapter(tmp_path / "lora"), adapter(tmp_path / "other")
    assert_has(refused(target, source, "--base", other), other, "--base")


# ------------------------------------------------------------------ LLaVA's non_lora_trainables.bin


def llava_adapter(folder, state: dict, **changes):
    torch = pytest.importorskip("torch")
    source = adapter(folder)
    (source / "config.json").write_text(json.dumps(LLAVA | changes))
    torch.save({name: torch.tensor(value) for name, value in state.items()}, source / "non_lora_trainables.bin")
    return source


PROJECTOR = mlp_weights("base_model.model.model.mm_projector.")


def test_more_than_a_projector(base, tmp_path, target):
    name = "base_model.model.model.embed_tokens.weight"
    source = llava_adapter(tmp_path / "lora", PROJECTOR | {name: np.ones((320, 32), np.float32)})
    message = refused(target, source, "--base", base, lines=2)
    assert_has(message, "non_lora_trainables.bin", f"unexpected  {name}  (320, 32)")


def test_a_projector_of_other_widths(base, tmp_path, target):
    source = llava_adapter(tmp_path / "lora", mlp_weights("base_model.model.model.mm_projector.", width=48))
    assert_has(refused(target, source, "--base", base, lines=None), "expected", "48")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(mm_use_im_start_end=True), "mm_use_im_start_end=True"),
        (dict(image_aspect_ratio="anyres"), "image_aspect_ratio='anyres'"),
    ],
)
def test_options_of_llava_that_are_not_honoured(changes, words, base, tmp_path, target):
    assert_has(refused(target, llava_adapter(tmp_path / "lora", PROJECTOR, **changes), "--base", base), words)


def test_the_tower_is_missing(tmp_path, target):
    base = llama(tmp_path / "llama")
    source = llava_adapter(tmp_path / "lora", PROJECTOR)
    assert_has(refused(target, source, "--base", base), "no tower", "'some/tower'", "--vision")


def test_an_empty_file_leaves_the_projector_of_the_base(base, tmp_path, capsys):
    convert(llava_adapter(tmp_path / "lora", {}), tmp_path / "made", "--base", base)
    assert f"the projector: from {base}" in capsys.readouterr().err

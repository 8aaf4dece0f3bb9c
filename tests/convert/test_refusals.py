"""Checkpoints that cannot be converted: one clear message, and nothing is left where the result would have been."""

import re
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.convert import broken
from tests.convert.broken import (
    CLIP,
    LLAMA,
    assert_has,
    clip,
    clip_weights,
    convert,
    edit,
    llama,
    llama_weights,
    llava,
    llava_hf,
    random,
    refused,
    save,
)

# ------------------------------------------------------------------ config.json


@pytest.mark.parametrize(
    "state", [llama_weights(), random({"backbone.embeddings.weight": (8, 4), "lm_head.weight": (8, 4)}, 0)]
)
def test_an_unknown_architecture_is_named_and_the_known_ones_listed(tmp_path, target, state):
    source = save(tmp_path / "mamba", {"model_type": "mamba", "architectures": ["MambaForCausalLM"]}, state)
    assert_has(refused(target, source), source, "'mamba'", "known: llama, qwen2", "llava")


@pytest.mark.parametrize("state", [llama_weights(), clip_weights()])
def test_config_json_is_missing(tmp_path, target, state):
    source = save(tmp_path / "source", None, state)
    assert_has(refused(target, source), source, "config.json")


@pytest.mark.parametrize("text", ["", '{"model_type": ', "[]", "null", '"llama"'])
def test_config_json_is_broken(tmp_path, target, text):
    source = llama(tmp_path / "llama")
    (source / "config.json").write_text(text)
    assert_has(refused(target, source), source / "config.json")


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}


@pytest.mark.parametrize(
    ("make", "option", "value", "expected"),
    [
        (llama, "attention_bias", True, "expected False"),
        (llama, "mlp_bias", True, "expected False"),
        (llama, "hidden_act", "gelu", "expected 'silu'"),
        (llama, "head_dim", 16, "expected 8"),
        (llama, "partial_rotary_factor", 0.5, "expected 1.0"),
        (llama, "quantization_config", {"bits": 4}, "not supported"),
        (clip, "hidden_act", "gelu", "expected 'quick_gelu'"),
        (clip, "num_channels", 1, "expected 3"),
        (clip, "quantization_config", {"bits": 4}, "not supported"),
        (llava_hf, "projector_hidden_act", "relu", "expected 'gelu'"),
        (llava_hf, "vision_feature_layer", [-2, -3], "expected a number"),
        (llava_hf, "vision_feature_select_strategy", "full", "expected 'default'"),
        (llava_hf, "multimodal_projector_bias", False, "expected True"),
        (llava_hf, "quantization_config", {"bits": 4}, "not supported"),
        (llava, "mm_vision_select_feature", "cls_patch", "expected 'patch'"),
        (llava, "mm_use_im_start_end", True, "expected False"),
        (llava, "quantization_config", {"bits": 4}, "not supported"),
        (llava, "image_aspect_ratio", "anyres", "known: square, pad, squash"),
        (llava_hf, "image_aspect_ratio", ["pad"], "known: square, pad, squash"),
    ],
)
def test_an_option_that_would_change_the_numbers_is_refused_by_name(tmp_path, target, make, option, value, expected):
    source = make(tmp_path / "source", **{option: value})
    assert_has(refused(target, source), f"{option}={value!r}", expected)


def test_sliding_windows_of_qwen2_are_refused_by_name(tmp_path, target):
    source = llama(tmp_path / "qwen2", model_type="qwen2", use_sliding_window=True)
    assert_has(refused(target, source), "qwen2 option use_sliding_window=True", "expected False")


@pytest.mark.parametrize("option", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("key", ["rope_type", "type"])
@pytest.mark.parametrize("kind", ["yarn", "linear"])
def test_other_ways_to_stretch_the_positions_are_refused_by_name(tmp_path, target, option, key, kind):
    source = llama(tmp_path / "llama", **{option: {key: kind, "factor": 2.0}})
    assert_has(refused(target, source), f"rope_type={kind!r}", "known: default, llama3")


@pytest.mark.parametrize(
    ("make", "option", "value", "word"),
    [
        (llama, "hidden_size", "wide", "hidden_size|width"),
        (llama, "hidden_size", None, "hidden_size|width"),
        (llama, "num_attention_heads", 0, "heads"),
        (llama, "num_attention_heads", 5, "decoder.heads=5"),
        (llama, "num_key_value_heads", 3, "decoder.kv_heads=3"),
        (llama, "num_hidden_layers", 2.5, "layers"),
        (llama, "vocab_size", "many", "vocab_size"),
        (llama, "rope_parameters", LLAMA3, "high_freq_factor"),
        (clip, "patch_size", 0, "vision.patch_size=0"),
        (clip, "image_size", [32, 32], "image_size"),
        (llava_hf, "text_config", None, "text_config"),
        (llava_hf, "vision_feature_layer", -9, "select_layer=-9"),
        (llava, "mm_vision_tower", None, "mm_vision_tower"),
        (llava, "model_type", None, "model_type"),
    ],
)
def test_a_value_of_config_json_that_cannot_be_is_refused_by_name(tmp_path, target, make, option, value, word):
    source = make(tmp_path / "source", **{option: value})
    message = refused(target, source)
    assert re.search(word, message), message


# ------------------------------------------------------------------ config.json against the weights


def test_names_that_are_not_config_jsons_are_listed_side_by_side(tmp_path, target):
    state = llama_weights()
    del state["model.norm.weight"]
    state["model.rotary.weight"] = np.zeros((3, 4), np.float32)
    state["model.layers.1.mlp.down_proj.weight"] = np.zeros((48, 32), np.float32)
    message = refused(target, save(tmp_path / "llama", LLAMA, state), lines=4)
    assert_has(message, "the weights do not fit the model", "missing     model.norm.weight  (32,)")
    assert_has(message, "unexpected  model.rotary.weight  (3, 4)")
    assert_has(message, "shape       model.layers.1.mlp.down_proj.weight  is (48, 32), expected (32, 48)")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_hidden_layers": 3}, ["missing     model.layers.2.self_attn.q_proj.weight  (32, 32)"]),
        ({"num_hidden_layers": 1}, ["unexpected  model.layers.1.self_attn.q_proj.weight  (32, 32)"]),
        ({"vocab_size": 321}, ["model.embed_tokens.weight  is (320, 32), expected (321, 32)", "lm_head.weight"]),
        ({"num_key_value_heads": 4}, ["model.layers.0.self_attn.k_proj.weight  is (16, 32), expected (32, 32)"]),
    ],
)
def test_a_config_json_of_another_size(tmp_path, target, changes, words):
    source = edit(llama(tmp_path / "llama"), **changes)
    assert_has(refused(target, source, lines=None), "the weights do not fit the model", *words)


def test_hundreds_of_wrong_names_are_cut_to_a_page(tmp_path, target):
    message = refused(target, llama(tmp_path / "llama", num_hidden_layers=40), lines=None)
    assert 40 <= len(message.splitlines()) <= 45 and "and 302 more" in message


@pytest.mark.parametrize(
    ("state", "config", "missing"),
    [
        (llama_weights(), LLAMA, "model.embed_tokens.weight"),
        (clip_weights(), CLIP, "vision_model.embeddings.patch_embedding.weight"),
    ],
)
def test_the_tensor_that_a_part_is_known_by_is_missing(tmp_path, target, state, config, missing):
    del state[missing]
    message = refused(target, save(tmp_path / "source", config, state), lines=None)
    assert_has(message, "missing", missing.split(".", 1)[1])


@pytest.mark.parametrize("part", ["vision_tower", "multi_modal_projector", "language_model"])
def test_a_llava_that_lacks_a_part(tmp_path, target, part):
    source = llava_hf(tmp_path / "llava")
    state = {name: x for name, x in load_file(source / "model.safetensors").items() if not name.startswith(part)}
    save_file(state, source / "model.safetensors")
    kind = {"vision_tower": "vision|tower", "multi_modal_projector": "projector", "language_model": "decoder"}[part]
    message = refused(target, source, lines=None)
    assert re.search(rf"({kind}).*missing|(lacks|missing|holds no).*({kind})", message, re.DOTALL), message


# ------------------------------------------------------------------ towers that are only named


@pytest.mark.parametrize("name", ["some/tower", "openai/clip-vit-large-patch14-336"])
def test_a_llava_that_names_a_tower_it_does_not_hold(tmp_path, target, name):
    source = llava(tmp_path / "llava", tower="", mm_vision_tower=name)
    assert_has(refused(target, source), source, repr(name), "give its folder with --vision")
    convert("--vision", clip(tmp_path / "clip"), source, target)  # and then it works
    assert (target / "checkpoints").is_dir()


def test_a_llava_that_names_a_folder_on_this_machine(tmp_path, target):
    """The folder is read, or asked for with --vision."""
    source = llava(tmp_path / "llava", tower="", mm_vision_tower=str(clip(tmp_path / "clip")))
    try:
        convert(source, target)
    except broken.KNOWN as error:
        assert_has(str(error), tmp_path / "clip", "--vision")


def test_a_vision_option_that_does_not_exist_is_named(tmp_path, target):
    source = llava(tmp_path / "llava", tower="")
    assert_has(refused(target, "--vision", tmp_path / "nowhere", source), tmp_path / "nowhere")


def test_a_vision_option_that_is_no_tower(tmp_path, target):
    decoder = llama(tmp_path / "llama")
    message = refused(target, "--vision", decoder, llava(tmp_path / "llava", tower=""))
    assert_has(message, decoder, "'llama'", "known:", "clip_vision_model")


def test_a_vision_option_of_another_width(tmp_path, target):
    tower = save(tmp_path / "clip", CLIP | {"hidden_size": 32, "intermediate_size": 64}, clip_weights())
    message = refused(target, "--vision", tower, llava(tmp_path / "llava", tower=""))
    assert_has(message, "projector.in_width=64", "vision.width=32")


# ------------------------------------------------------------------ tokenizers and workdirs


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_broken_tokenizer_is_named_where_it_lies(tmp_path, target, name):
    source = llama(tmp_path / "llama")
    (source / name).write_text('{"version": ')
    message = refused(target, source)
    assert_has(message, "tokenizer", "cannot be read")
    assert_has(message, source)  # and not a copy in a folder that is gone


@pytest.fixture
def converted(tmp_path):
    convert(llama(tmp_path / "llama"), tmp_path / "converted")
    return tmp_path / "converted"


def test_a_workdir_without_its_config(converted, target):
    (converted / "config.json").unlink()
    assert_has(refused(target, converted), converted, "config.json")


def test_a_workdir_without_a_finished_checkpoint(converted, target):
    shutil.rmtree(converted / "checkpoints" / "0")
    assert_has(refused(target, converted), converted, "no finished checkpoint")


def test_a_workdir_with_a_checkpoint_cut_short(converted, target):
    for file in (converted / "checkpoints" / "0" / "params").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[:10])
    assert_has(refused(target, converted, lines=None), converted / "checkpoints" / "0", "cannot be read")

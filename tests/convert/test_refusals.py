"""Checkpoints that cannot be converted: one clear message, and nothing is left where the result would have been."""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import broken
import numpy as np
import pytest
from broken import (
    CLIP,
    LLAMA,
    clip,
    clip_weights,
    convert,
    edit,
    llama,
    llama_weights,
    llava,
    llava_hf,
    mlp_weights,
    random,
    refused,
    save,
)
from safetensors.numpy import load_file, save_file

from deltallava_jax.convert import shards, workdir

ROOT = Path(__file__).parents[2]


@pytest.fixture
def target(tmp_path) -> Path:
    """Where a conversion that should be refused is told to go."""
    return tmp_path / "out" / "model"


def assert_says(message: str, *words) -> None:
    for word in words:
        assert str(word) in message, message


# ------------------------------------------------------------------ weights on disk


@pytest.mark.parametrize("kept", [0, 4, 100, 5000, -1])
def test_a_safetensors_file_cut_short(tmp_path, target, kept):
    file = llama(tmp_path / "llama") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    assert_says(refused(target, file.parent), file, "cut short or no safetensors file")


def test_a_pointer_that_git_lfs_left_in_place_of_the_weights(tmp_path, target):
    file = llama(tmp_path / "llama") / "model.safetensors"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1234\nsize 13476839424\n")
    assert_says(refused(target, file.parent), file, "cut short or no safetensors file")


def test_a_type_of_tensors_that_we_do_not_know(tmp_path, target):
    state = llama_weights()
    state["model.norm.weight"] = np.ones(32, np.uint8)
    source = save(tmp_path / "llama", LLAMA, state)
    assert_says(refused(target, source), "model.safetensors", "model.norm.weight is of type U8", "F32, F16, BF16")


def test_missing_shards_are_named(tmp_path, target):
    source = save(tmp_path / "llama", LLAMA, llama_weights(), shards=3)
    (source / "model-00002-of-00003.safetensors").unlink()
    words = "lacks model-00002-of-00003.safetensors", "1 of 3 shards", "model.safetensors.index.json"
    assert_says(refused(target, source), source, *words)


def test_a_shard_cut_short_is_named(tmp_path, target):
    source = save(tmp_path / "llama", LLAMA, llama_weights(), shards=3)
    file = source / "model-00003-of-00003.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    assert_says(refused(target, source), file, "cut short")


@pytest.mark.parametrize(
    "text",
    ['{"weight_map": ', "", "{}", "[]", "5", '{"weight_map": 5}', '{"weight_map": {"a": 5}}', '{"weight_map": {}}'],
)
def test_an_index_that_is_none(tmp_path, target, text):
    source = save(tmp_path / "llama", LLAMA, llama_weights(), shards=2)
    (source / "model.safetensors.index.json").write_text(text)
    assert_says(refused(target, source), source / "model.safetensors.index.json", "not an index of shards")


def test_a_folder_without_weights(tmp_path, target):
    source = llama(tmp_path / "llama")
    (source / "model.safetensors").unlink()
    assert_says(refused(target, source), source, "holds no weights", "model.safetensors", "pytorch_model.bin")


def test_a_source_that_does_not_exist(tmp_path, target):
    assert_says(refused(target, tmp_path / "nothing"), tmp_path / "nothing", "does not exist")


# ------------------------------------------------------------------ torch files


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


def bin_folder(folder: Path, state, **options) -> Path:
    """LLAMA's config.json and pytorch_model.bin; returns the latter."""
    torch = pytest.importorskip("torch")
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA))
    torch.save(state, folder / "pytorch_model.bin", **options)
    return folder / "pytorch_model.bin"


def torch_weights() -> dict:
    torch = pytest.importorskip("torch")
    return {name: torch.from_numpy(value) for name, value in llama_weights().items()}


@pytest.mark.parametrize("how", ["zip", "legacy", "bare"])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_pickle_that_holds_code_is_refused_and_not_run(tmp_path, target, how):
    payload = Payload(tmp_path / "was_run")
    state = torch_weights() | {"model.norm.weight": payload}
    file = bin_folder(tmp_path / "llama", state, _use_new_zipfile_serialization=how == "zip")
    if how == "bare":
        file.write_bytes(pickle.dumps(payload))
    message = refused(target, file.parent)
    assert_says(message, file, "holds more than tensors and is refused")
    assert not payload.file.exists(), "the code was run"
    pickle.loads(pickle.dumps(payload))
    assert payload.file.exists(), "the code does nothing, so this test shows nothing"


def test_the_refusal_of_code_does_not_tell_how_to_run_it(tmp_path, target):
    file = bin_folder(tmp_path / "llama", {"x": Payload(tmp_path / "was_run")})
    assert not re.search("weights_only.{1,4} (set )?to .?False", refused(target, file.parent))


@pytest.mark.parametrize("kind", ["nested", "list", "numbers", "numbered"])
def test_a_torch_file_that_is_no_state_dict(tmp_path, target, kind):
    state = torch_weights()
    values = {
        "nested": {"model": state},
        "list": list(state.values()),
        "numbers": {"model.norm.weight": 1.0},
        "numbered": dict(enumerate(state.values())),
    }
    file = bin_folder(tmp_path / "llama", values[kind])
    assert_says(refused(target, file.parent), file, "no state dict of names and tensors")


@pytest.mark.parametrize("kept", [0, 5, 100, 0.5, -10])
@pytest.mark.parametrize("how", ["zip", "legacy"])
def test_a_torch_file_cut_short(tmp_path, target, how, kept):
    file = bin_folder(tmp_path / "llama", torch_weights(), _use_new_zipfile_serialization=how == "zip")
    data = file.read_bytes()
    file.write_bytes(data[: int(kept * len(data)) if isinstance(kept, float) else kept])
    assert_says(refused(target, file.parent), file, "cannot be read")


def test_a_zip_of_something_else(tmp_path, target):
    file = bin_folder(tmp_path / "llama", {})
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("letter.txt", "hello")
    assert_says(refused(target, file.parent), file, "cannot be read")


def test_a_torch_file_with_a_type_of_tensors_that_we_do_not_know(tmp_path, target):
    torch = pytest.importorskip("torch")
    state = torch_weights()
    state["model.norm.weight"] = state["model.norm.weight"].to(torch.float8_e4m3fn)
    file = bin_folder(tmp_path / "llama", state)
    assert_says(refused(target, file.parent), file, "model.norm.weight")


def test_a_torch_file_without_torch(tmp_path, target):
    source = llama(tmp_path / "llama")
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    program = """
import sys
sys.modules["torch"] = None
from deltallava_jax import cli
from deltallava_jax.__main__ import parse
options = parse(sys.argv[1:])
cli.run(lambda: options.main(options))
"""
    target.parent.mkdir()
    command = [sys.executable, "-c", program, "convert", source, target]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    (line,) = done.stderr.splitlines()
    assert_says(line, "error: ", source / "pytorch_model.bin", "needs torch: pip install torch")
    assert done.returncode == 2 and not list(target.parent.iterdir())


# ------------------------------------------------------------------ config.json


@pytest.mark.parametrize(
    "state", [llama_weights(), random({"backbone.embeddings.weight": (8, 4), "lm_head.weight": (8, 4)}, 0)]
)
def test_an_unknown_architecture_is_named_and_the_known_ones_listed(tmp_path, target, state):
    source = save(tmp_path / "mamba", {"model_type": "mamba", "architectures": ["MambaForCausalLM"]}, state)
    assert_says(refused(target, source), source, "'mamba'", "known: llama, qwen2", "llava")


@pytest.mark.parametrize("state", [llama_weights(), clip_weights()])
def test_config_json_is_missing(tmp_path, target, state):
    source = save(tmp_path / "source", None, state)
    assert_says(refused(target, source), source, "config.json")


@pytest.mark.parametrize("text", ["", '{"model_type": ', "[]", "null", '"llama"'])
def test_config_json_is_broken(tmp_path, target, text):
    source = llama(tmp_path / "llama")
    (source / "config.json").write_text(text)
    assert_says(refused(target, source), source / "config.json")


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
    assert_says(refused(target, source), f"{option}={value!r}", expected)


def test_sliding_windows_of_qwen2_are_refused_by_name(tmp_path, target):
    source = llama(tmp_path / "qwen2", model_type="qwen2", use_sliding_window=True)
    assert_says(refused(target, source), "qwen2 option use_sliding_window=True", "expected False")


@pytest.mark.parametrize("option", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("key", ["rope_type", "type"])
@pytest.mark.parametrize("kind", ["yarn", "linear"])
def test_other_ways_to_stretch_the_positions_are_refused_by_name(tmp_path, target, option, key, kind):
    source = llama(tmp_path / "llama", **{option: {key: kind, "factor": 2.0}})
    assert_says(refused(target, source), f"rope_type={kind!r}", "known: default, llama3")


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
    assert_says(message, "the weights do not fit the model", "missing     model.norm.weight  (32,)")
    assert_says(message, "unexpected  model.rotary.weight  (3, 4)")
    assert_says(message, "shape       model.layers.1.mlp.down_proj.weight  is (48, 32), expected (32, 48)")


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
    assert_says(refused(target, source, lines=None), "the weights do not fit the model", *words)


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
    assert_says(message, "missing", missing.split(".", 1)[1])


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
    assert_says(refused(target, source), source, repr(name), "give its folder with --vision")
    convert("--vision", clip(tmp_path / "clip"), source, target)  # and then it works
    assert (target / "checkpoints").is_dir()


def test_a_llava_that_names_a_folder_on_this_machine(tmp_path, target):
    """The folder is read, or asked for with --vision."""
    source = llava(tmp_path / "llava", tower="", mm_vision_tower=str(clip(tmp_path / "clip")))
    try:
        convert(source, target)
    except broken.KNOWN as error:
        assert_says(str(error), tmp_path / "clip", "--vision")


def test_a_vision_option_that_does_not_exist_is_named(tmp_path, target):
    source = llava(tmp_path / "llava", tower="")
    assert_says(refused(target, "--vision", tmp_path / "nowhere", source), tmp_path / "nowhere")


def test_a_vision_option_that_is_no_tower(tmp_path, target):
    decoder = llama(tmp_path / "llama")
    message = refused(target, "--vision", decoder, llava(tmp_path / "llava", tower=""))
    assert_says(message, decoder, "'llama'", "known:", "clip_vision_model")


def test_a_vision_option_of_another_width(tmp_path, target):
    tower = save(tmp_path / "clip", CLIP | {"hidden_size": 32, "intermediate_size": 64}, clip_weights())
    message = refused(target, "--vision", tower, llava(tmp_path / "llava", tower=""))
    assert_says(message, "projector.in_width=64", "vision.width=32")


# ------------------------------------------------------------------ composing


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> tuple:
    """Options that give a tower and a decoder."""
    folder = tmp_path_factory.mktemp("parts")
    return "--vision", clip(folder / "clip"), "--decoder", llama(folder / "llama"), "--set", "head_dim=16"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--scale-factor", "3"], ["scale_factor=3", "4x4 patch grid", "valid values: 1, 2, 4"]),
        (["--scale-factor", "2,3"], ["scale_factor=3", "valid values: 1, 2, 4"]),
        (["--scale-factor", "two"], ["scale_factor", "'two'"]),
        (["--set", "rank"], ["--set rank", "KEY=VALUE"]),
        (["--set", "rnk=3"], ["rnk", "did you mean 'rank'"]),
        (["--set", "head_dim=48"], ["head_dim=48", "64"]),
        (["--set", "out_width=16"], ["out_width=16", "decoder.width=32"]),
    ],
)
def test_settings_of_a_new_projector_that_cannot_be(parts, target, options, words):
    assert_says(refused(target, *parts, "--projector", "delta", *options), *words)


@pytest.mark.parametrize(("width", "out"), [(32, 32), (64, 16)])
def test_a_trained_projector_of_another_width(parts, tmp_path, target, width, out):
    shapes = {"0.weight": (out, width), "0.bias": (out,), "2.weight": (out, out), "2.bias": (out,)}
    file = tmp_path / "projector.safetensors"
    save_file(random(shapes, 0), file)
    message = refused(target, *parts, "--projector", file)
    assert_says(message, f"--projector {file}", "in_width=32" if width == 32 else "out_width=16", "needs")
    assert_says(message, 64 if width == 32 else 32)


def test_weights_that_are_no_projector(parts, tmp_path, target):
    file = tmp_path / "projector.safetensors"
    save_file(random({"a.weight": (3, 4), "b.weight": (3, 4)}, 0), file)
    assert_says(refused(target, *parts, "--projector", file), "projector", "a.weight, b.weight")


def test_a_projector_by_a_name_that_is_neither_a_system_nor_a_file(parts, target):
    assert_says(refused(target, *parts, "--projector", "detla"), "detla", "known systems: delta")


def test_a_folder_that_is_not_the_part_it_is_given_as(parts, target):
    _, tower, _, decoder, *_ = parts
    new = "--projector", "delta"
    assert_says(refused(target, "--vision", decoder, "--decoder", decoder, *new), f"--vision {decoder} holds no tower")
    assert_says(refused(target, "--vision", tower, "--decoder", tower, *new), f"--decoder {tower} holds no decoder")
    assert_says(
        refused(target, *parts, "--projector", decoder), f"{decoder} holds no projector", "known systems: delta"
    )


def test_composing_takes_all_three_parts_and_no_source(parts, target):
    _, tower, _, decoder, *_ = parts
    words = "--vision, --decoder and --projector"
    assert_says(refused(target, "--vision", tower, "--decoder", decoder), words)
    assert_says(refused(target, "--decoder", decoder, "--projector", "delta"), words)
    assert_says(refused(target, *parts, "--projector", "delta", decoder), words)


# ------------------------------------------------------------------ options that do not fit the model


def test_settings_of_a_projector_that_is_not_there(tmp_path, target):
    source = llama(tmp_path / "llama")
    assert_says(refused(target, "--scale-factor", "2", source), "no projector", "scale_factor")


@pytest.fixture(scope="module")
def delta(parts, tmp_path_factory) -> Path:
    """A workdir with a Delta projector of rank 16."""
    folder = tmp_path_factory.mktemp("delta") / "model"
    convert(*parts, "--projector", "delta", "--set", "initializer_range=0.1", folder)
    return folder


@pytest.mark.parametrize("settings", [["name=delta", "head_dim=16"], ["out_width=8"]])
def test_settings_that_the_weights_of_the_projector_do_not_fit(tmp_path, target, settings):
    """What is written must load again."""
    options = [word for setting in settings for word in ("--set", setting)]
    assert_says(refused(target, *options, llava_hf(tmp_path / "llava"), lines=None), "projector")


@pytest.mark.parametrize("to", ["orbax", "hf"])
def test_a_rank_that_the_weights_of_the_projector_do_not_have(delta, target, to):
    assert_says(refused(target, "--set", "rank=4", "--to", to, delta, lines=None), "projector", "(64, 16)", "(64, 4)")


def test_a_rank_that_a_trained_projector_does_not_have(delta, parts, target):
    message = refused(target, *parts, "--set", "rank=4", "--projector", delta, lines=None)
    assert_says(message, "projector", "(64, 16)", "(64, 4)")


@pytest.mark.parametrize("make", [llama, llava_hf])
def test_a_tower_for_a_model_that_names_none(tmp_path, target, make):
    """--vision is for checkpoints that only name their tower; of others it would be ignored, or no model at all."""
    message = refused(target, "--vision", clip(tmp_path / "clip"), make(tmp_path / "source"))
    assert_says(message, "--vision")


def test_a_tower_for_a_workdir(delta, tmp_path, target):
    assert_says(refused(target, "--vision", tmp_path / "nowhere", delta), "--vision")


def test_formats_that_do_not_hold_a_part_alone(tmp_path, target):
    source = llama(tmp_path / "llama")
    assert_says(refused(target, "--to", "llava", source), "--to llava", "tower, projector and decoder")
    file = tmp_path / "projector.safetensors"
    save_file(mlp_weights(), file)
    assert_says(refused(target, "--to", "hf", file), "--to hf", "only projector")


# ------------------------------------------------------------------ the destination


@pytest.mark.parametrize("to", ["orbax", "hf"])
def test_a_destination_that_exists_already_is_left_as_it_is(tmp_path, to):
    source, target = llama(tmp_path / "llama"), tmp_path / "out" / "model"
    target.mkdir(parents=True)
    (target / "precious.txt").write_text("precious")
    assert_says(refused(target, "--to", to, source), target, "exists already")
    assert (target / "precious.txt").read_text() == "precious"


def test_a_destination_that_is_a_file(tmp_path):
    source, target = llama(tmp_path / "llama"), tmp_path / "out"
    target.write_text("precious")
    assert_says(refused(target, source), target, "exists already")
    assert target.read_text() == "precious"


def test_a_destination_below_a_file(tmp_path):
    source, file = llama(tmp_path / "llama"), tmp_path / "file"
    file.write_text("precious")
    with pytest.raises(broken.KNOWN, match="file"):
        convert(source, file / "model")
    assert file.read_text() == "precious"


def test_a_destination_that_is_taken_shows_before_anything_is_read(tmp_path):
    assert_says(refused(llama(tmp_path / "llama"), tmp_path / "nothing"), "exists already")


def test_an_empty_folder_is_a_destination(tmp_path, target):
    target.mkdir(parents=True)
    convert(llama(tmp_path / "llama"), target)
    assert (target / "checkpoints").is_dir() and [path.name for path in target.parent.iterdir()] == ["model"]


def test_a_number_of_paths_that_is_not_two(tmp_path):
    source = llama(tmp_path / "llama")
    assert_says(refused(source), "a source and a destination", "1 paths")
    assert_says(refused(tmp_path / "out", source, source), "a source and a destination", "3 paths")


# ------------------------------------------------------------------ tokenizers and workdirs


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_broken_tokenizer_is_named_where_it_lies(tmp_path, target, name):
    source = llama(tmp_path / "llama")
    (source / name).write_text('{"version": ')
    message = refused(target, source)
    assert_says(message, "tokenizer", "cannot be read")
    assert_says(message, source)  # and not a copy in a folder that is gone


@pytest.fixture
def converted(tmp_path):
    convert(llama(tmp_path / "llama"), tmp_path / "converted")
    return tmp_path / "converted"


def test_a_workdir_without_its_config(converted, target):
    (converted / "config.json").unlink()
    assert_says(refused(target, converted), converted, "config.json")


def test_a_workdir_without_a_finished_checkpoint(converted, target):
    shutil.rmtree(converted / "checkpoints" / "0")
    assert_says(refused(target, converted), converted, "no finished checkpoint")


def test_a_workdir_with_a_checkpoint_cut_short(converted, target):
    for file in (converted / "checkpoints" / "0" / "params").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[:10])
    assert_says(refused(target, converted, lines=None), converted / "checkpoints" / "0", "cannot be read")


# ------------------------------------------------------------------ interrupted


@pytest.mark.parametrize("to", ["hf", "llava"])
def test_interrupted_after_the_first_tensor_nothing_is_left(tmp_path, target, monkeypatch, to):
    source, begun = llava_hf(tmp_path / "llava"), []
    original = shards._write_safetensors

    def interrupted(path, outs, value, bar):
        def one(out):
            if begun:
                assert path.is_file() and ".model-unfinished-" in str(path)
                raise KeyboardInterrupt
            begun.append(out)
            return value(out)

        original(path, outs, one, bar)

    monkeypatch.setattr(shards, "_write_safetensors", interrupted)
    target.parent.mkdir()
    with pytest.raises(KeyboardInterrupt):
        convert("--to", to, source, target)
    assert begun and not list(target.parent.iterdir())
    monkeypatch.undo()
    convert("--to", to, source, target)  # the same command again


def test_interrupted_before_the_checkpoint_is_written_nothing_is_left(tmp_path, target, monkeypatch):
    source = llama(tmp_path / "llama")

    def interrupted(self, params):
        raise KeyboardInterrupt

    monkeypatch.setattr(workdir.Checkpoints, "save_params", interrupted)
    target.parent.mkdir()
    with pytest.raises(KeyboardInterrupt):
        convert(source, target)
    assert not list(target.parent.iterdir())


# ------------------------------------------------------------------ what training frameworks leave behind


@pytest.mark.parametrize("as_projector", [False, True])
def test_shards_of_zero3_that_were_never_gathered(tmp_path, target, as_projector):
    """DeepSpeed ZeRO-3 leaves tensors without elements in the process that saves."""
    torch = pytest.importorskip("torch")
    empty = {f"model.mm_projector.{name}": torch.zeros(0) for name in ("0.weight", "0.bias", "2.weight", "2.bias")}
    source = tmp_path / "stage1"
    source.mkdir()
    torch.save(empty, source / "mm_projector.bin")
    words = "mm_projector.bin", "0.weight", "ZeRO-3", "zero_to_fp32.py"
    if as_projector:
        parts = "--vision", clip(tmp_path / "clip"), "--decoder", llama(tmp_path / "llama"), "--projector"
        assert_says(refused(target, *parts, source / "mm_projector.bin"), *words)
    else:
        assert_says(refused(target, source), *words)


def test_empty_tensors_in_safetensors(tmp_path, target):
    state = llama_weights()
    state["model.norm.weight"] = np.zeros(0, np.float32)
    assert_says(refused(target, save(tmp_path / "llama", LLAMA, state)), "model.norm.weight", "ZeRO-3")


ADAPTER = {"base_model_name_or_path": "lmsys/vicuna-7b-v1.5", "peft_type": "LORA", "r": 128}


def adapter(folder: Path, weights: str, config: bool) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(broken.LLAVA))
    if config:
        (folder / "adapter_config.json").write_text(json.dumps(ADAPTER))
    state = {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": np.ones((4, 32), np.float32)}
    if weights.endswith(".safetensors"):
        save_file(state, folder / weights)
    else:
        (folder / weights).write_bytes(b"never opened")
    return folder


@pytest.mark.parametrize("weights", ["adapter_model.safetensors", "adapter_model.bin", "non_lora_trainables.bin"])
def test_a_lora_adapter_is_named_as_one(tmp_path, target, weights):
    source = adapter(tmp_path / "lora", weights, config=True)
    words = "LoRA adapter of lmsys/vicuna-7b-v1.5", "merge", "merge_and_unload"
    assert_says(refused(target, source), source, *words)
    assert_says(refused(target, "--vision", clip(tmp_path / "clip"), "--decoder", source, "--projector", "mlp"), *words)


def test_a_lora_adapter_without_its_config(tmp_path, target):
    source = adapter(tmp_path / "lora", "adapter_model.safetensors", config=False)
    assert_says(refused(target, source), source, "LoRA adapter of a base that it does not name")
    assert_says(refused(target, source / "adapter_model.safetensors"), "LoRA adapter")


def test_merged_weights_beside_an_adapter_are_read(tmp_path):
    source = llama(tmp_path / "llama")
    (source / "adapter_config.json").write_text(json.dumps(ADAPTER))
    convert(source, tmp_path / "made")


# ------------------------------------------------------------------ what the tower cannot give


@pytest.mark.parametrize("system", ["prumerge", "prumerge_plus", "fastervlm", "evit", "dynamicvit"])
def test_a_system_that_reads_the_cls_token_is_not_composed_with_a_siglip_tower(tmp_path, target, system):
    state = {name: value for name, value in clip_weights().items() if "class_emb" not in name and "pre_lay" not in name}
    state["vision_model.embeddings.position_embedding.weight"] = np.ones((16, 64), np.float32)
    state["vision_model.embeddings.patch_embedding.bias"] = np.ones(64, np.float32)
    siglip = CLIP | dict(model_type="siglip_vision_model", hidden_act="gelu_pytorch_tanh")
    tower = save(tmp_path / "siglip", siglip, state)
    pruned = ["--set", "prune_layers=(0,)"] if system in ("evit", "dynamicvit") else []
    parts = "--vision", tower, "--decoder", llama(tmp_path / "llama"), "--projector", system, *pruned
    assert_says(refused(target, *parts), "a siglip tower has no CLS token")


@pytest.mark.parametrize(
    ("system", "settings", "words"),
    [
        ("prumerge", "select_layer=-1", "reads queries and keys of the layer after it"),
        ("evit", "prune_layers=(1,)", "the tower is read after 1 layers"),
        ("dynamicvit", "prune_layers=(5,)", "the tower is read after 1 layers"),
    ],
)
def test_layers_that_the_tower_has_not_are_refused_when_it_is_composed(tmp_path, target, system, settings, words):
    parts = "--vision", clip(tmp_path / "clip"), "--decoder", llama(tmp_path / "llama"), "--projector", system
    assert_says(refused(target, *parts, "--set", settings), words)
    convert(*parts, *(["--set", "prune_layers=(0,)"] if "vit" in system else []), tmp_path / "made")
    assert_says(refused(target, tmp_path / "made", "--set", settings), words)

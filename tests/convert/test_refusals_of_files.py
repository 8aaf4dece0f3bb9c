"""Files of weights that cannot be read: cut short, missing, of another kind, or holding code. One clear line each."""

import json
import os
import pickle
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.convert import broken
from tests.convert.broken import (
    LLAMA,
    assert_has,
    clip,
    convert,
    llama,
    llama_weights,
    refused,
    save,
)

ROOT = Path(__file__).parents[2]


# ------------------------------------------------------------------ weights on disk


@pytest.mark.parametrize("kept", [0, 4, 100, 5000, -1])
def test_a_safetensors_file_cut_short(tmp_path, target, kept):
    file = llama(tmp_path / "llama") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    assert_has(refused(target, file.parent), file, "truncated or not a safetensors file")


def test_a_pointer_that_git_lfs_left_in_place_of_the_weights(tmp_path, target):
    file = llama(tmp_path / "llama") / "model.safetensors"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1234\nsize 13476839424\n")
    assert_has(refused(target, file.parent), file, "truncated or not a safetensors file")


def test_a_type_of_tensors_that_we_do_not_know(tmp_path, target):
    state = llama_weights()
    state["model.norm.weight"] = np.ones(32, np.uint8)
    source = save(tmp_path / "llama", LLAMA, state)
    assert_has(refused(target, source), "model.safetensors", "model.norm.weight has dtype U8", "F32, F16, BF16")


def test_missing_shards_are_named(tmp_path, target):
    source = save(tmp_path / "llama", LLAMA, llama_weights(), shards=3)
    (source / "model-00002-of-00003.safetensors").unlink()
    words = "lacks model-00002-of-00003.safetensors", "1 of the 3 shards", "model.safetensors.index.json"
    assert_has(refused(target, source), source, *words)


def test_a_shard_cut_short_is_named(tmp_path, target):
    source = save(tmp_path / "llama", LLAMA, llama_weights(), shards=3)
    file = source / "model-00003-of-00003.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    assert_has(refused(target, source), file, "truncated")


@pytest.mark.parametrize(
    "text",
    ['{"weight_map": ', "", "{}", "[]", "5", '{"weight_map": 5}', '{"weight_map": {"a": 5}}', '{"weight_map": {}}'],
)
def test_an_index_that_is_none(tmp_path, target, text):
    source = save(tmp_path / "llama", LLAMA, llama_weights(), shards=2)
    (source / "model.safetensors.index.json").write_text(text)
    assert_has(refused(target, source), source / "model.safetensors.index.json", "not an index of shards")


def test_a_folder_without_weights(tmp_path, target):
    source = llama(tmp_path / "llama")
    (source / "model.safetensors").unlink()
    assert_has(refused(target, source), source, "holds no weights", "model.safetensors", "pytorch_model.bin")


def test_a_source_that_does_not_exist(tmp_path, target):
    assert_has(refused(target, tmp_path / "nothing"), tmp_path / "nothing", "does not exist")


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
    assert_has(message, file, "is refused: it holds more than tensors")
    assert not payload.file.exists(), "the code was run"
    pickle.loads(pickle.dumps(payload))
    assert payload.file.exists(), "the code does nothing, so this test shows nothing"


def test_the_refusal_of_code_does_not_explain_how_to_run_it(tmp_path, target):
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
    assert_has(refused(target, file.parent), file, "not a state dict of names and tensors")


@pytest.mark.parametrize("kept", [0, 5, 100, 0.5, -10])
@pytest.mark.parametrize("how", ["zip", "legacy"])
def test_a_torch_file_cut_short(tmp_path, target, how, kept):
    file = bin_folder(tmp_path / "llama", torch_weights(), _use_new_zipfile_serialization=how == "zip")
    data = file.read_bytes()
    file.write_bytes(data[: int(kept * len(data)) if isinstance(kept, float) else kept])
    assert_has(refused(target, file.parent), file, "cannot be read")


def test_a_zip_of_something_else(tmp_path, target):
    file = bin_folder(tmp_path / "llama", {})
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("letter.txt", "hello")
    assert_has(refused(target, file.parent), file, "cannot be read")


def test_a_torch_file_with_a_type_of_tensors_that_we_do_not_know(tmp_path, target):
    torch = pytest.importorskip("torch")
    state = torch_weights()
    state["model.norm.weight"] = state["model.norm.weight"].to(torch.float8_e4m3fn)
    file = bin_folder(tmp_path / "llama", state)
    assert_has(refused(target, file.parent), file, "model.norm.weight")


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
    assert_has(line, "error: ", source / "pytorch_model.bin", "needs torch: pip install torch")
    assert done.returncode == 2 and not list(target.parent.iterdir())


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
        assert_has(refused(target, *parts, source / "mm_projector.bin"), *words)
    else:
        assert_has(refused(target, source), *words)


def test_empty_tensors_in_safetensors(tmp_path, target):
    state = llama_weights()
    state["model.norm.weight"] = np.zeros(0, np.float32)
    assert_has(refused(target, save(tmp_path / "llama", LLAMA, state)), "model.norm.weight", "ZeRO-3")


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
    words = "LoRA adapter of", "lmsys/vicuna-7b-v1.5", "--base"
    assert_has(refused(target, source), source, *words)
    assert_has(refused(target, "--vision", clip(tmp_path / "clip"), "--decoder", source, "--projector", "mlp"), *words)


def test_a_lora_adapter_without_its_config(tmp_path, target):
    source = adapter(tmp_path / "lora", "adapter_model.safetensors", config=False)
    assert_has(refused(target, source), source, "LoRA adapter of an unnamed base model", "lacks adapter_config.json")
    assert_has(refused(target, source / "adapter_model.safetensors"), "LoRA adapter")


def test_merged_weights_beside_an_adapter_are_read(tmp_path):
    source = llama(tmp_path / "llama")
    (source / "adapter_config.json").write_text(json.dumps(ADAPTER))
    convert(source, tmp_path / "made")
    assert not list((tmp_path / "made").rglob("adapter_config.json"))  # transformers would look for the adapter

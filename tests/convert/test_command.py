"""python -m deltallava_jax: help, the conversions of its example, errors as one line; and its options, in this process.

A process costs seconds, so there are few; what only concerns the options is tried in this one."""

import dataclasses
import json
import os
import runpy
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import deltallava_jax
from deltallava_jax.__main__ import parse
from deltallava_jax.config import workdir_config
from deltallava_jax.convert import command as convert_command
from deltallava_jax.convert.workdir import open_model
from deltallava_jax.errors import ConfigError
from deltallava_jax.models import systems
from tests.convert.broken import clip, convert, llama, llava_hf, mlp_weights
from tests.xla import FAST_COMPILES

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def command():
    """Runs python -m deltallava_jax with one device."""
    environment = {**os.environ, "XLA_FLAGS": FAST_COMPILES}

    def command(*arguments) -> subprocess.CompletedProcess:
        line = [sys.executable, "-m", "deltallava_jax", *map(str, arguments)]
        return subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)

    return command


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Path]:
    """Checkpoints of other projects; nobody writes into them."""
    folder = tmp_path_factory.mktemp("sources")
    return {"llava": llava_hf(folder / "llava"), "clip": clip(folder / "clip"), "llama": llama(folder / "llama")}


@pytest.fixture(scope="module")
def composed(command, sources, tmp_path_factory):
    """A composed model: (the finished process, its workdir)."""
    folder = tmp_path_factory.mktemp("runs") / "start"
    done = command(
        "convert", "--vision", sources["clip"], "--decoder", sources["llama"], "--projector", "delta",
        "--scale-factor", "2,4", "--set", "head_dim=16", "--set", "rank=4", folder,
    )  # fmt: skip
    return done, folder


def assert_done(done: subprocess.CompletedProcess, words: str) -> None:
    """One line names the result, and nothing else is printed."""
    assert done.returncode == 0, done.stderr
    assert done.stdout == "" and [line for line in done.stderr.splitlines()] == [words]


def assert_same_weights(folder: Path, other: Path) -> None:
    ours, theirs = load_file(folder / "model.safetensors"), load_file(other / "model.safetensors")
    assert set(ours) == set(theirs)
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype
        np.testing.assert_array_equal(ours[name], value, err_msg=name)


def assert_same_params(ours, theirs) -> None:
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


# ------------------------------------------------------------------ in processes


def test_help_lists_the_commands(command):
    done = command("--help")
    assert done.returncode == 0 and done.stderr == ""
    assert "python -m deltallava_jax" in done.stdout and "convert " in done.stdout


def test_the_help_of_convert_shows_examples(command):
    done = command("convert", "--help")
    assert done.returncode == 0 and done.stderr == ""
    assert "python -m deltallava_jax convert llava-1.5-7b-hf runs/llava" in done.stdout
    assert "--projector delta --scale-factor 2 runs/start" in done.stdout
    options = "--to {orbax,hf,llava,peft}", "--base", "--merge", "--dtype", "--vision", "--decoder", "--projector"
    for option in (*options, "--set KEY=VALUE"):
        assert option in done.stdout


def test_to_a_workdir_and_to_hugging_face_again(command, sources, tmp_path):
    made = command("convert", sources["llava"], tmp_path / "runs" / "llava")
    parts = "111,520 parameters (vision, projector, decoder)"
    assert_done(made, f"{tmp_path}/runs/llava: {parts}, as orbax")
    config = workdir_config(tmp_path / "runs" / "llava")
    assert config.name == "llava" and config.model.whole and config.model.projector.name == "mlp"
    made = command("convert", tmp_path / "runs" / "llava", tmp_path / "hf", "--to", "hf")
    assert_done(made, f"{tmp_path}/hf: {parts}, as hf")
    assert_same_weights(tmp_path / "hf", sources["llava"])
    configs = [json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "hf", sources["llava"])]
    assert configs[0] == configs[1]
    assert "hf" in (tmp_path / "hf" / "README.md").read_text()


def test_a_new_model_is_composed(composed, sources):
    done, folder = composed
    model = deltallava_jax.load(folder)
    count = sum(leaf.size for leaf in jax.tree.leaves(model.params))
    assert_done(done, f"{folder}: {count:,} parameters (vision, projector, decoder), as orbax")
    projector = model.cfg.projector
    assert (projector.name, projector.scale_factor) == ("delta", (2, 4))
    assert (projector.head_dim, projector.rank, projector.grid) == (16, 4, 4)
    assert (projector.in_width, projector.out_width) == (64, 32)
    for part, name in (("vision", "clip"), ("decoder", "llama")):
        assert_same_params(model.params[part], deltallava_jax.load(sources[name]).params[part])
    assert model.tokenizer is not None


def test_an_error_is_one_line_and_exit_code_2(command, tmp_path):
    done = command("convert", tmp_path / "nothing", tmp_path / "made")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {tmp_path / 'nothing'} does not exist\n"
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------ in this process


def test_interrupting_does_not_promise_what_only_training_does(monkeypatch, capsys):
    """convert has no checkpoints to resume from: the same command begins again."""

    def interrupted(options):
        raise KeyboardInterrupt

    monkeypatch.setattr(convert_command, "main", interrupted)
    monkeypatch.setattr(sys, "argv", ["deltallava_jax", "convert", "a", "b"])
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    with pytest.raises(SystemExit) as stopped, warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the module is imported already
        runpy.run_module("deltallava_jax", run_name="__main__")
    printed = capsys.readouterr().err
    assert stopped.value.code == 130 and "interrupted" in printed and "checkpoint" not in printed


def test_options_have_defaults():
    options = parse(["convert", "a", "b"])
    assert (options.paths, options.to, options.dtype, options.seed) == (["a", "b"], "orbax", None, 0)
    assert (options.vision, options.decoder, options.projector, options.scale_factor) == (None,) * 4


@pytest.mark.parametrize(
    "arguments",
    [
        ["a", "b", "--to", "hf"],
        ["--to", "hf", "a", "b"],
        ["a", "--to", "hf", "b"],
    ],
)
def test_options_stand_before_between_and_after_the_paths(arguments):
    options = parse(["convert", *arguments])
    assert (options.paths, options.to) == (["a", "b"], "hf")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "COMMAND"),
        (["convrt", "a", "b"], "invalid choice: 'convrt'"),
        (["convert"], "DST"),
        (["convert", "a", "b", "--to", "onnx"], "invalid choice: 'onnx'"),
        (["convert", "a", "b", "--seed", "one"], "invalid int value: 'one'"),
    ],
)
def test_an_option_that_is_none_of_ours(arguments, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(arguments)
    assert stopped.value.code == 2 and words in capsys.readouterr().err


@pytest.mark.parametrize(("given", "dtype"), [("float32", "float32"), ("bf16", "bfloat16"), ("half", "float16")])
def test_dtype_is_that_of_all_parameters(sources, tmp_path, given, dtype):
    convert(sources["llama"], tmp_path / "made", "--dtype", given)
    params = open_model(tmp_path / "made").params
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(params)} == {dtype}
    params = deltallava_jax.load(tmp_path / "made", dtype=given).params
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(params)} == {dtype}


@pytest.mark.parametrize("dtype", ["int8", "float8"])
def test_a_dtype_that_parameters_cannot_have_is_refused_with_the_list(sources, tmp_path, dtype):
    words = f"dtype is '{dtype}'; known: float32 .*, bfloat16 .*, float16"
    parts = "--vision", sources["clip"], "--decoder", sources["llama"], "--projector", "mlp"
    for arguments in ((sources["llama"],), parts):
        with pytest.raises(ConfigError, match=words):
            convert(*arguments, tmp_path / "made", "--dtype", dtype)
    with pytest.raises(ConfigError, match=words):
        deltallava_jax.load(sources["llama"], dtype=dtype)


def test_the_seed_draws_a_fresh_projector(sources, tmp_path):
    parts = ["--vision", sources["clip"], "--decoder", sources["llama"], "--projector", "mlp"]
    convert(*parts, "--seed", 1, tmp_path / "made")
    model = deltallava_jax.load(tmp_path / "made")
    zero, one = (systems.init_params(model.cfg.projector, jax.random.key(seed)) for seed in (0, 1))
    assert_same_params(model.params["projector"], one)
    assert not np.array_equal(one["up"]["kernel"], zero["up"]["kernel"])


def test_a_trained_projector_is_taken_from_a_file_or_from_another_model(sources, tmp_path):
    state = mlp_weights("model.mm_projector.", seed=9)
    save_file(state, tmp_path / "mm_projector.safetensors")
    parts = ["--vision", sources["clip"], "--decoder", sources["llama"], "--projector"]
    convert(*parts, tmp_path / "mm_projector.safetensors", tmp_path / "from_file")
    convert(*parts, tmp_path / "from_file", tmp_path / "from_model")
    for name in ("from_file", "from_model"):
        kernel = deltallava_jax.load(tmp_path / name).params["projector"]["up"]["kernel"]
        np.testing.assert_array_equal(kernel, state["model.mm_projector.0.weight"].T)


def test_the_scale_factor_of_a_model_is_changed_on_the_way(composed, tmp_path):
    _, folder = composed
    convert(folder, tmp_path / "made", "--scale-factor", "1,2,4", "--set", "drop_path=0.2")
    before, after = deltallava_jax.load(folder), deltallava_jax.load(tmp_path / "made")
    changed = dataclasses.replace(before.cfg.projector, scale_factor=(1, 2, 4), drop_path=0.2)
    assert after.cfg == dataclasses.replace(before.cfg, projector=changed)
    assert_same_params(after.params, before.params)


def test_a_workdir_records_its_origin_and_the_files_beside_the_weights(sources, tmp_path):
    (tmp_path / "llama").mkdir()
    for file in sources["llama"].iterdir():
        (tmp_path / "llama" / file.name).write_bytes(file.read_bytes())
    for name in ("generation_config.json", "LICENSE.txt", "chat_template.jinja", "modeling.py", "optimizer.pt"):
        (tmp_path / "llama" / name).write_text("{}")
    convert(tmp_path / "llama", tmp_path / "made")
    names = {path.name for path in (tmp_path / "made" / "source").iterdir()}
    kept = {"config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "LICENSE.txt"}
    assert names == kept | {"chat_template.jinja", "origin.json"}
    convert(tmp_path / "made", tmp_path / "hf", "--to", "hf")
    assert {path.name for path in (tmp_path / "hf").iterdir()} == kept | {
        "chat_template.jinja", "model.safetensors", "README.md",
    }  # fmt: skip
    assert_same_weights(tmp_path / "hf", sources["llama"])

"""The two commands as a user runs them: help, one-line errors, and what importing the package brings in."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import train as training
from deltallava_jax.config import workdir_config
from deltallava_jax.errors import ConfigError

ROOT = Path(__file__).parents[1]


def command(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=120)


def train(workdir, *arguments, config="configs/easy_vqa.py"):
    return command("train.py", "--config", config, "--workdir", workdir, *arguments)


def assert_one_line_error(done: subprocess.CompletedProcess, *words):
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and "Traceback" not in line
    for word in words:
        assert word in line


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--config.optimizer.lrr=1e-3", ["optimizer.lrr", "did you mean 'lr'"]),
        ("--profile=9:3", ["--profile 9:3", "expected N:M"]),
        ("--config.model.projector.scale_factor=3", ["scale_factor=3", "8x8", "valid values: 1, 2, 4, 8"]),
    ],
)
def test_train_refuses_a_bad_setting_and_makes_nothing(tmp_path, argument, words):
    assert_one_line_error(train(tmp_path / "run", argument), *words)
    assert not (tmp_path / "run").exists()


def test_train_without_its_config_file(tmp_path):
    assert_one_line_error(train(tmp_path / "run", config=tmp_path / "none.py"), "none.py", "does not exist")


def test_eval_of_a_folder_that_train_did_not_make(tmp_path):
    assert_one_line_error(command("eval.py", "--workdir", tmp_path), str(tmp_path), "no config.json")
    assert not list(tmp_path.iterdir())


def test_libtpu_without_a_tpu_is_not_initialized(tmp_path):
    """Initialized, it would print six lines of errors because it finds none."""
    (tmp_path / "libtpu.py").write_text("def get_library_path():\n    return ''\n")
    environment = {key: value for key, value in os.environ.items() if key not in ("JAX_PLATFORMS", "TPU_NAME")}
    code = "from deltallava_jax import cli; import jax; cli.run(lambda: print(jax.config.jax_platforms))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120,
        env=environment | {"PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "cpu\n", "")


@pytest.mark.parametrize("program", ["train.py", "eval.py"])
def test_help_shows_an_example(program):
    done = command(program, "--help")
    assert done.returncode == 0 and done.stderr == ""
    assert f"python {program} --" in done.stdout and "--workdir" in done.stdout and "runs/easy_vqa" in done.stdout


# ------------------------------------------------------------------ arguments, in this process


def parse(*arguments):
    return training.parse(["--config", str(ROOT / "configs" / "easy_vqa.py"), "--workdir", "w", *arguments])


def test_overrides_are_given_with_or_without_an_equals_sign():
    cfg, options = parse(
        "--config.optimizer.lr=2e-3", "--config.model.projector.select_layer", "-2", "--config.name=a=b"
    )
    assert (cfg.optimizer.lr, cfg.model.projector.select_layer, cfg.name) == (2e-3, -2, "a=b")
    assert options.workdir == Path("w") and options.coordinator is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--lr=1"], "unknown argument '--lr'; see python train.py --help"),
        (["somewhere"], "unknown argument 'somewhere'"),
        (["--config.optimizer.lr"], "--config.optimizer.lr has no value"),
    ],
)
def test_an_argument_that_is_none_of_ours(arguments, words):
    with pytest.raises(ConfigError, match=words):
        parse(*arguments)


@pytest.mark.parametrize("content", ["", '{"name": '])
def test_eval_names_a_config_that_cannot_be_read(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match="config.json"):
        workdir_config(tmp_path)


# ------------------------------------------------------------------ imports


def test_importing_the_package_brings_in_no_other_framework():
    program = """
import sys
for module in ("deltallava_jax", "deltallava_jax.config", "deltallava_jax.models.vlm", "deltallava_jax.training.loop"):
    __import__(module)
    found = sorted({"torch", "transformers", "tensorflow"} & set(sys.modules))
    assert not found, f"{module} imports {found}"
    if module == "deltallava_jax":
        assert "jax" not in sys.modules, "import deltallava_jax imports jax"
"""
    done = command("-c", program)
    assert done.returncode == 0, done.stderr


def test_a_reader_that_leaves_ends_a_command_quietly():
    """As ``deltallava_jax config show ... | head`` does."""
    program = [sys.executable, "-m", "deltallava_jax", "config", "show", "configs/easy_vqa.py"]
    process = subprocess.Popen(program, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    err = process.stderr.read()
    assert (process.wait(), err) == (141, "")

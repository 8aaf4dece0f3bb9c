"""The wheel, as pip makes it: its dependencies, its command, and the configurations from any folder."""

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
COPIED = """
from configs.easy_vqa import base
def get_config():
    return base("mine", dict(name="mqt", queries=64, tokens=(4,)))
"""
LOADS = """
from deltallava_jax.config.values import CONFIGS, load_config
print(load_config("easy_vqa").name, load_config("llava:mqt-pretrain").name, load_config("mine.py").name)
print(load_config("configs/easy_vqa.py:m3").name, CONFIGS)
"""


def test_every_folder_of_the_package_is_packaged():
    """pip silently leaves out folders that are not listed."""
    found = {
        f"{prefix}{file.parent.relative_to(ROOT).as_posix().replace('/', '.')}"
        for folder, prefix in (("deltallava_jax", ""), ("configs", "deltallava_jax."))
        for file in (ROOT / folder).rglob("*.py")
    }
    assert found == set(PROJECT["tool"]["setuptools"]["packages"])


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The folder of an installation of the wheel, without its dependencies, and nothing else of the repository."""
    pytest.importorskip("setuptools", minversion="77")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    leave = shutil.ignore_patterns("__pycache__", "*.egg-info", "build")
    for name in ("deltallava_jax", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=leave)
    for file in (*ROOT.glob("requirements*.txt"), ROOT / "pyproject.toml", ROOT / "LICENSE"):
        shutil.copy(file, source)
    build = f"from setuptools import build_meta; print(build_meta.build_wheel({str(out)!r}))"
    done = subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (wheel,) = out.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(out)
    return out


def run(installed, folder, *arguments):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=folder, capture_output=True, text=True, timeout=120,
        env=environment | {"PYTHONPATH": str(installed)},
    )  # fmt: skip


def test_it_has_its_dependencies_its_extras_and_its_command(installed):
    (about,) = metadata.distributions(name="deltallava_jax", path=[str(installed)])
    of = lambda extra: [text.split(";")[0] for text in about.requires if f'extra == "{extra}"' in text]
    lines = lambda name: [line.split(" #")[0].replace(" ", "") for line in (ROOT / name).read_text().splitlines()
                          if line and not line.startswith("#")]  # fmt: skip
    base = [text for text in about.requires if "extra ==" not in text]
    assert sorted(base) == sorted(lines("requirements.txt")) and "jax>=0.10.2" in base
    files = dict(
        demo=["demo"], dev=["dev", "serve", "plots"], eval=["eval"], plan=["plan"], plots=["plots"], serve=["serve"]
    )
    assert set(about.metadata.get_all("Provides-Extra")) == set(files)
    for extra, names in files.items():
        assert sorted(of(extra)) == sorted(line for name in names for line in lines(f"requirements-{name}.txt"))
    (command,) = about.entry_points.select(group="console_scripts")
    assert (command.name, command.value) == ("deltallava", "deltallava_jax.__main__:main")
    assert (installed / "deltallava_jax" / "analysis" / "gpu.txtpb").is_file()


@pytest.mark.parametrize("command", ["train", "eval", "config", ""])
def test_the_command_runs_from_any_folder(installed, tmp_path, command):
    code = f"import sys; sys.argv = ['deltallava', *{[command, '--help'] if command else ['--help']}]"
    done = run(installed, tmp_path, "-c", f"{code}; from deltallava_jax.__main__ import main; main()")
    assert done.returncode == 0 and done.stderr == ""
    expected = [f"deltallava {command} "] if command else ["usage: deltallava ", "train", "eval", "convert", "plan"]
    assert all(word in done.stdout for word in expected)


def test_configurations_are_found_by_name_and_a_copied_one_runs(installed, tmp_path):
    (tmp_path / "mine.py").write_text(COPIED)
    done = run(installed, tmp_path, "-c", LOADS)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["easy_vqa", "mqt_pretrain", "mine", "m3", str(installed / "deltallava_jax/configs")]


def test_a_systems_configuration_is_found_and_shown(installed, tmp_path):
    for name in ("configs/easy_vqa.py:mqt", "easy_vqa:mqt"):
        code = f"import sys; sys.argv = ['deltallava', 'config', 'show', {name!r}]"
        done = run(installed, tmp_path, "-c", f"{code}; from deltallava_jax.__main__ import main; main()")
        assert done.returncode == 0 and done.stderr == ""
        assert "model.projector.name: str = 'mqt'\n" in done.stdout
        assert "learned queries" in done.stdout  # the comments come with the wheel


def test_a_base_beside_a_configuration_is_taken_before_ours(installed, tmp_path):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "mine.py").write_text(COPIED)
    (tmp_path / "configs" / "easy_vqa.py").write_text(
        "from deltallava_jax.config import Config\ndef base(*_): return Config(name='beside')"
    )
    code = "from deltallava_jax.config import load_config; print(load_config('configs/mine.py').name)"
    assert run(installed, tmp_path, "-c", code).stdout.split() == ["beside"]


def test_an_unknown_name_is_one_line(installed, tmp_path):
    code = "import sys; sys.argv = ['deltallava', 'train', '--config', 'easy_vqb', '--workdir', 'x']"
    done = run(installed, tmp_path, "-c", f"{code}; from deltallava_jax.__main__ import main; main()")
    assert done.returncode == 2
    assert done.stderr == "error: config file 'easy_vqb' does not exist; did you mean 'easy_vqa'?\n"

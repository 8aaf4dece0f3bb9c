"""Every command in README and docs is one that exists: its options are parsed, its configuration and settings made.

Those that need pretrained weights, other files or hardware cannot run here; what they would begin with is the same."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

from deltallava_jax import __main__ as command_line
from deltallava_jax.apps import eval as evaluation
from deltallava_jax.apps import train as training
from deltallava_jax.config import load_config, override

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "configs" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = ("python ", "deltallava ", "pip install -r ")


def commands(text: str) -> list[str]:
    """What a reader would paste: lines of code blocks and code within a line, with their continuations."""
    text = re.sub(r"\\\n *", "", text)
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, flags=re.S | re.M)
    lines = [line for block in blocks for line in block.splitlines()]
    lines += [
        " ".join(code.split())
        for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", re.sub(r"```.*?```", "", text, flags=re.S))
    ]
    found = []
    for line in lines:
        line = re.sub(r'^.* --command "(.*)"$', r"\1", line)  # of another program, which runs it
        line = re.sub(r"\s+#\s.*", "", line).removeprefix("$ ").removeprefix("srun ").strip()
        found += [part.strip() for part in line.split("&&") if part.strip().startswith(PROGRAMS)]
    return found


FOUND = sorted({command for file in DOCUMENTS for command in commands(file.read_text())})


def check(command: str) -> None:
    words = shlex.split(command)
    if words[0] == "pip":
        assert (ROOT / words[3]).is_file()
        return
    if words[0] == "deltallava":
        words = ["python", "-m", "deltallava_jax", *words[1:]]
    program, arguments = words[1], words[2:]
    if words[1:3] == ["-m", "deltallava_jax"]:
        if len(words) == 4:  # named, not run
            assert words[3] in command_line.COMMANDS
            return
        program, arguments = f"{words[3]}.py" if words[3] in command_line.PROCESSES else "", words[3:]
        if program:
            arguments = arguments[1:]
    if program == "train.py":
        arguments = ["configs/easy_vqa.py" if word == "CONFIG" else word for word in arguments if word != "--help"]
        options, changes = training.parse_arguments(["--workdir", "DIR", *arguments])
        override(load_config(options.config), changes)
    elif program == "eval.py":
        override(load_config("configs/easy_vqa.py"), evaluation.parse(arguments).overrides)
    elif program == "":
        options = command_line.parse(arguments)
        if getattr(options, "config", None):
            load_config(options.config)
    else:
        assert program == "-m" and words[2].startswith("benchmarks."), f"no program of the project: {command}"
        importlib.import_module(words[2]).parse(words[3:])


def test_the_documents_hold_commands():
    programs = {words[2] if words[1] == "-m" else words[1] for words in map(str.split, FOUND)}
    assert len(FOUND) > 50 and len(programs) > 12


@pytest.mark.parametrize("command", FOUND)
def test_a_command_of_the_documents_is_one(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    check(command)


@pytest.mark.parametrize(
    "command",
    [
        "python train.py --config configs/easy_vq.py --workdir runs/x",
        "python train.py --config configs/easy_vqa.py --workdir runs/x --config.optimizer.rate=1",
        "python eval.py --workdir runs/x --budget 4",
        "python -m deltallava_jax plan --config configs/finetune_7b.py --goal h100:8",
        "python -m benchmarks.load.soak --no-such-option",
        "python -m benchmarks.load.soak --steps many",
        "python -m benchmarks.recipes.emoji_recipe --runs delta --no-such-option=1",
        "python -m benchmarks.measure.soak",
        "python -m benchmarks.measure.sizes",
        "python benchmarks/load/soak.py",
        "pip install -r requirements-gone.txt",
    ],
)
def test_a_command_that_is_none_is_found(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises((Exception, SystemExit)):
        check(command)

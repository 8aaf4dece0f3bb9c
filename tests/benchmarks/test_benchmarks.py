"""The programs of benchmarks/: each has --help, and the commands that they and their results name can be parsed."""

import importlib
import json
import re
from pathlib import Path

import pytest

from tests.test_documents import check

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "benchmarks").rglob("*.py"))
PROGRAMS = [
    ".".join(file.relative_to(ROOT).with_suffix("").parts)
    for file in SOURCES
    if 'if __name__ == "__main__":' in file.read_text()
]


def examples(module: str) -> list[str]:
    """The commands in the description of a program."""
    text = re.sub(r"\\\n *", "", importlib.import_module(module).__doc__)
    lines = [re.sub(r"\s+#\s.*", "", line).strip() for line in text.splitlines()]
    return [part for line in lines for part in line.split(" && ") if part.startswith("python ")]


def recorded() -> list[str]:
    """The commands that results of our programs were made with."""
    found = set()
    for file in (ROOT / "benchmarks" / "results").rglob("*.json"):
        result = json.loads(file.read_text())
        if isinstance(result, dict) and "command" in result:
            found.add(re.sub(r"\s+#\s.*", "", result["command"]))
    return sorted(found)


def test_there_are_programs_in_every_group():
    assert {module.split(".")[1] for module in PROGRAMS} == {"load", "measure", "recipes", "reports"}


@pytest.mark.parametrize("module", PROGRAMS)
def test_a_program_has_help_with_an_example(module, capsys):
    program = importlib.import_module(module)
    with pytest.raises(SystemExit) as end:
        program.parse(["--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0 and text.startswith(f"usage: python -m {module} ")
    assert callable(program.main) and any(f"-m {module}" in example for example in examples(module))


@pytest.mark.parametrize("command", sorted({example for module in PROGRAMS for example in examples(module)}))
def test_an_example_is_a_command(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    check(command)


@pytest.mark.parametrize("command", recorded())
def test_the_command_of_a_result_is_one(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    check(command)


def test_files_of_benchmarks_that_are_named_are_there():
    folders = [ROOT / name for name in ("benchmarks", "configs", "deltallava_jax", "docs", "tests")]
    texts = [ROOT / "README.md", *(file for folder in folders for file in folder.rglob("*.[pm][yd]"))]  # .py and .md
    named = {name for file in texts for name in re.findall(r"(?<![\w/])benchmarks/[\w/]+\.py", file.read_text())}
    assert len(named) > 5 and [name for name in sorted(named) if not (ROOT / name).is_file()] == []


def test_a_module_has_one_name_and_the_path_stays_as_it_is():
    tops = {file.stem for file in SOURCES} | {"benchmarks"}
    for file in SOURCES:
        source = file.read_text()
        assert "sys.path" not in source, file
        for name in re.findall(r"^ *(?:from|import) (\w+)", source, flags=re.M):
            assert name == "benchmarks" or name not in tops, f"{file} imports {name} without its package"

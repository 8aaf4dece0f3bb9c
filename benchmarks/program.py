"""What the programs share: their argument parser, the head of their result files, commands that they run.

A program is known by ``__spec__.name``, the name under which others import it, also where it is the one that runs."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def argument_parser(program: str, description: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog=f"python -m {program}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def numbers(text: str) -> list[int]:
    """The type of an argument that is a list: comma-separated."""
    return [int(part) for part in text.split(",")]


def cores() -> str:
    return f"{os.cpu_count()} CPU cores"


def versions(*packages: str) -> dict[str, str]:
    """Of Python and of those packages that are installed."""
    installed = [name for name in packages if any(importlib.metadata.distributions(name=name))]
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in installed}


def origin(program: str, arguments: Iterable[str], hardware: str, packages: tuple[str, ...] = ("jax",)) -> dict:
    """Where the numbers of a result file come from: date, command, hardware and versions."""
    return {
        "date": str(date.today()),
        "command": " ".join(["python", "-m", program, *arguments]),
        "hardware": hardware,
        "versions": versions(*packages),
    }


def write_result(file: Path, result: dict) -> None:
    """Writes a result file, and its folder if there is none."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result, indent=2) + "\n")


def call(*arguments) -> None:
    """Runs Python in the repository's folder; a dict among the arguments is settings. Exits where the command fails."""
    line = [sys.executable]
    for argument in arguments:
        if isinstance(argument, dict):
            line += [f"--config.{key}={value}" for key, value in argument.items()]
        else:
            line.append(str(argument))
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(line)}\n{done.stderr[-2000:]}")

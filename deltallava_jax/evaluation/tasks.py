"""The paper's ten benchmarks in lmms-eval, and their official prompts and scorers on local copies of the data."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from deltallava_jax.errors import ConfigError

# task -> (the official yaml below lmms_eval/tasks, its split)
DATA = {
    "gqa": ("gqa/gqa.yaml", "testdev"),
    "mmbench_en_dev": ("mmbench/mmbench_en_dev_static.yaml", "dev"),
    "mme": ("mme/mme.yaml", "test"),
    "pope": ("pope/pope.yaml", "test"),
    "scienceqa_img": ("scienceqa/scienceqa_img.yaml", "test"),
    "textvqa_val": ("textvqa/textvqa_val.yaml", "validation"),
    "vqav2_val": ("vqav2/vqav2_val.yaml", "validation"),
    "vizwiz_vqa_val": ("vizwiz_vqa/vizwiz_vqa_val.yaml", "val"),
    "nocaps_val": ("nocaps/nocaps_val.yaml", "validation"),
    "flickr30k_test": ("flickr30k/flickr30k_test.yaml", "test"),
}
CAPTIONS = ("nocaps_val", "flickr30k_test")


def require_installed(tasks: Sequence[str]) -> None:
    """Raises ConfigError unless the tasks' requirements are installed; lmms-eval has more tasks than the paper's."""
    if importlib.util.find_spec("lmms_eval") is None:
        if unknown := [task for task in tasks if task not in DATA]:
            raise ConfigError(f"unknown task {unknown[0]!r}; known: easy_vqa, {', '.join(DATA)}")
        raise ConfigError(f"task {tasks[0]!r} needs lmms-eval; requirements-eval.txt explains its installation")
    if any(task in CAPTIONS for task in tasks) and shutil.which("java") is None:
        raise ConfigError("captions are scored with pycocoevalcap's tokenizer, which needs java on the PATH")


def official_name(task: str, offline: bool) -> str:
    """lmms-eval's name of the task. MMBench's default scorer has GPT interpret answers that name no option; without a
    key for it, the scorer without GPT is used."""
    if task == "mmbench_en_dev" and not offline and not os.environ.get("OPENAI_API_KEY"):
        return "mmbench_en_dev_static"
    return task


def local_copy(task: str, data: Path) -> Path:
    """The folder DATA/TASK. Raises ConfigError for a task that is not one of ours, and for a missing or wrong copy."""
    if task not in DATA:
        raise ConfigError(f"--offline: unknown task {task!r}; known: {', '.join(DATA)}")
    split, copy = DATA[task][1], (data / task).resolve()
    try:
        splits = json.loads((copy / "dataset_dict.json").read_text())["splits"]
        found = f"it has the splits {', '.join(splits)}"
    except (OSError, ValueError, KeyError, TypeError):
        splits = ()
        alone = any((folder / "dataset_info.json").is_file() for folder in (copy, copy / split))
        found = "it holds a Dataset" if alone else "nothing is saved there" if copy.exists() else "it does not exist"
    if split not in splits or not (copy / split).is_dir():
        raise ConfigError(
            f"--offline {data}: expected {copy} to be a DatasetDict with the split {split!r}, but {found}; save it as "
            f"datasets.DatasetDict({{{split!r}: data}}).save_to_disk({str(copy)!r})"
        )
    return copy


def fetch_error(error: BaseException) -> str | None:
    """One line on an error of Hugging Face's hub or of lmms-eval's retries around it; None for any other error."""
    retried = type(error).__name__ == "RetryError" and hasattr(error, "last_attempt")  # tenacity's: it hides the cause
    error = (retried and error.last_attempt.exception()) or error
    of_the_hub = any(kind.__module__.split(".")[0] in ("huggingface_hub", "datasets") for kind in type(error).__mro__)
    if not (of_the_hub or (retried and isinstance(error, OSError))):  # scoring is retried, too
        return None
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return (
        f"{type(error).__name__}: {line.rstrip('.')}. Some data sets require a login "
        "(hf auth login) and the acceptance of their terms; local copies are used with --offline"
    )


def write_offline(tasks: Sequence[str], data: Path, folder: Path) -> Path:
    """Task files for local copies: DATA/TASK is what ``datasets.DatasetDict.save_to_disk`` wrote, with the task's split
    and the official columns, and for GQA the image itself in each row (column ``image``). Returns their folder.

    Raises ConfigError as ``local_copy`` does."""
    copies = {task: local_copy(task, data) for task in tasks}
    official = Path(importlib.util.find_spec("lmms_eval").origin).parent / "tasks"
    written = folder / "tasks"
    shutil.rmtree(written, ignore_errors=True)
    written.mkdir(parents=True)
    for task, copy in copies.items():
        lines = [f"include: {official / DATA[task][0]}", f"task: {task}", f"dataset_path: {copy}"]
        lines += ["dataset_name: null", "dataset_kwargs:", "  load_from_disk: true"]
        lines += ["process_docs: null"] if task == "gqa" else []  # it would fetch the images
        (written / f"{task}.yaml").write_text("\n".join(lines) + "\n")
    return written

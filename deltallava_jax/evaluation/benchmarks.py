"""The paper's benchmarks of one checkpoint at several budgets, with the metadata needed to compare results."""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import jax

from deltallava_jax import cli
from deltallava_jax.config import Config, to_dict
from deltallava_jax.inference.model import Model
from deltallava_jax.parallel import hosts
from deltallava_jax.workdir import Workdir

PACKAGES = ("jax", "flax", "numpy", "pillow", "tokenizers", "transformers", "lmms-eval", "datasets", "torch")


def evaluate_tasks(
    model: Model,
    cfg: Config,
    tasks: Sequence[str],
    budgets: Sequence[int],
    workdir: Workdir,
    *,
    step: int,
    options: argparse.Namespace,
) -> None:
    """Writes a result for each task and budget (``Workdir.write_report``).

    Answers are saved in WORKDIR/eval/answers, from which a killed evaluation resumes. options:
    eval.py's offline, limit, batch and overrides. Raises ConfigError as evaluation/lmms.py does."""
    if options.offline:  # read when the libraries are imported
        os.environ["HF_DATASETS_OFFLINE"] = os.environ["HF_HUB_OFFLINE"] = "1"
    from deltallava_jax.evaluation import lmms

    folder = workdir.results
    for budget in budgets:
        began = time.monotonic()
        # Answers depend on the step and the settings; the question is part of each answer's key.
        state = hashlib.sha256(json.dumps([step, budget, to_dict(cfg.model)]).encode()).hexdigest()[:16]
        adapter = lmms.DeltaLlava(
            model, budget=budget, batch_size=options.batch, answers=folder / "answers" / f"{budget}-{state}"
        )
        # Every process scores all answers, in a separate folder; the first one writes the results.
        scratch = folder / "lmms" / str(jax.process_index())
        scored = lmms.evaluate(adapter, tasks, scratch, offline=options.offline, limit=options.limit)
        common = {
            "model": str(workdir),
            "system": cfg.model.system,
            "step": step,
            "budget": budget,
            "limit": options.limit,
            "offline": str(options.offline) if options.offline else None,
            "overrides": options.overrides,
            "config": to_dict(cfg),
            "versions": versions(),
            "commit": commit(),
            "seconds": round(time.monotonic() - began, 1),
        }
        for task, report in scored.items() if hosts.leads() else ():
            workdir.write_report({"task": task} | report | common)
            metrics = ", ".join(f"{name} {value:.4f}" for name, value in report["metrics"].items())
            unread = f" ({len(report['unread'])} with an image that cannot be read)" if report["unread"] else ""
            cli.log(f"{task} at {budget} tokens, {report['n']} documents{unread}: {metrics}")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that answers and scores depend on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """The commit of this code, with ``+`` where files differ from it; None outside a repository."""
    here = Path(__file__).resolve().parent

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", here, *words], capture_output=True, text=True, check=True).stdout

    try:
        return git("rev-parse", "HEAD").strip() + ("+" if git("status", "--porcelain", "-uno").strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return None

"""Evaluates a workdir's newest checkpoint: python eval.py --workdir runs/easy_vqa

Prints a table and writes one JSON a task to WORKDIR/eval/, the last evaluation of the task; each budget and the blind
control also keep a file of their own:
    python eval.py --workdir runs/easy_vqa --tasks easy_vqa --budgets 16,4 [--blind]
Settings can be overridden, for methods that need no training of their own:
    python eval.py --workdir runs/mlp --config.model.projector.name=fastervlm --budgets 16
    python eval.py --workdir runs/mlp --config.model.fastv.keep=16
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from deltallava_jax import cli
from deltallava_jax.config import ConfigError, override, workdir_config


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--workdir", required=True, type=Path, help="where train.py put its checkpoints")
    parser.add_argument("--tasks", default="", help="comma-separated; the data set that was trained on by default")
    parser.add_argument("--budgets", default="", help="visual tokens an image, comma-separated; all that were trained")
    parser.add_argument("--blind", action="store_true", help="noise instead of images: the control")
    parser.add_argument("--limit", type=int, default=0, help="only so many questions, spread evenly; 0: all")
    parser.add_argument("--config.SECTION.KEY", metavar="VALUE", help="overrides a setting; may be repeated")
    options, rest = parser.parse_known_args(arguments)
    options.overrides = cli.overrides(rest, "eval.py")
    return options


def main(options: argparse.Namespace) -> None:
    from deltallava_jax.data import tokens
    from deltallava_jax.evaluation import TASKS
    from deltallava_jax.models import projectors
    from deltallava_jax.training.checkpoints import CheckpointError, Checkpoints

    cfg = override(workdir_config(options.workdir), options.overrides)
    cfg.model.require_whole("evaluation")
    tasks = options.tasks.split(",") if options.tasks else [cfg.data.dataset]
    for task in tasks:
        if task not in TASKS:
            raise ConfigError(f"unknown task {task!r}; known: {', '.join(TASKS)}")
    budgets = list(projectors.budgets(cfg.model.projector))
    if options.budgets:
        try:
            budgets = [int(text) for text in options.budgets.split(",")]
        except ValueError:
            raise ConfigError(f"--budgets {options.budgets!r}: expected numbers, e.g. 16,4") from None
    for budget in budgets:
        projectors.check_budget(cfg.model.projector, budget)

    tokenizer = tokens.load(options.workdir / "tokenizer.json")
    checkpoints = Checkpoints(options.workdir)
    step = checkpoints.latest()
    if step is None:
        raise CheckpointError(f"{options.workdir} holds no finished checkpoint; train first")
    params = checkpoints.restore_params(step, cfg.model)

    folder = options.workdir / "eval"
    folder.mkdir(exist_ok=True)
    print(f"{'task':12} {'step':>6} {'budget':>6} {'images':8} {'accuracy':>8} {'n':>6} {'seconds':>8}  by type")
    for task in tasks:
        for budget in budgets:
            report = TASKS[task](params, cfg, tokenizer, budget=budget, blind=options.blind, limit=options.limit)
            report |= {"step": step, "overrides": options.overrides}
            text = json.dumps(report, indent=2)
            for name in (task, f"{task}_{budget}{'_blind' if options.blind else ''}"):
                (folder / f"{name}.json").write_text(text)
            by_type = ", ".join(f"{kind} {score['accuracy']:.4f}" for kind, score in report["by_type"].items())
            print(
                f"{task:12} {step:6} {budget:6} {'noise' if options.blind else 'real':8} {report['accuracy']:8.4f} "
                f"{report['n']:6} {report['seconds']:8.1f}  {by_type}"
            )
    print(f"written to {folder}", file=sys.stderr)


if __name__ == "__main__":
    cli.run(lambda: main(parse()))

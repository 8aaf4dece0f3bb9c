"""Evaluates a workdir's newest checkpoint: python eval.py --workdir runs/easy_vqa

Prints a table and writes one JSON a task to WORKDIR/eval/, the last evaluation of the task, and one for each budget.
The controls, in which each question is asked about another image's picture or about noise, have files of their own:
    python eval.py --workdir runs/easy_vqa --tasks easy_vqa --budgets 16,4 [--control shuffled|noise]
The paper's benchmarks run through lmms-eval (requirements-eval.txt), on local copies of their data with --offline, and
go on where they were stopped:
    python eval.py --workdir runs/delta --budgets 144,36,16,4,1 --tasks \\
        gqa,mmbench_en_dev,mme,pope,scienceqa_img,textvqa_val,vqav2_val,vizwiz_vqa_val,nocaps_val,flickr30k_test
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
from deltallava_jax.config import override, workdir_config
from deltallava_jax.errors import ConfigError
from deltallava_jax.parallel import hosts


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--workdir", required=True, type=Path, help="where train.py put its checkpoints")
    parser.add_argument("--tasks", default="", help="comma-separated; the data set that was trained on by default")
    parser.add_argument("--budgets", default="", help="visual tokens an image, comma-separated; all that were trained")
    parser.add_argument("--control", choices=("shuffled", "noise"), default="", help="not the image: another one")
    parser.add_argument("--blind", action="store_const", const="noise", dest="control", help="--control noise")
    parser.add_argument("--limit", type=int, default=0, help="only so many questions (easy_vqa: spread evenly); 0: all")
    parser.add_argument("--offline", type=Path, metavar="DIR", help="local copies of lmms-eval's data, DIR/TASK")
    parser.add_argument("--batch", type=int, default=16, metavar="N", help="lmms-eval's questions at a time")
    parser.add_argument("--beside", type=Path, nargs="*", default=[], help="more workdirs for lmms-eval's table")
    parser.add_argument("--config.SECTION.KEY", metavar="VALUE", help="overrides a setting; may be repeated")
    hosts.add_arguments(parser)
    options, rest = parser.parse_known_args(arguments)
    options.overrides = cli.overrides(rest, "eval.py")
    return options


def main(options: argparse.Namespace) -> None:
    hosts.connect(options)
    from deltallava_jax.data import tokens
    from deltallava_jax.errors import CheckpointError
    from deltallava_jax.evaluation import TASKS
    from deltallava_jax.evaluation.tasks import require
    from deltallava_jax.models import decoder, projectors
    from deltallava_jax.training.checkpoints import Checkpoints

    cfg = override(workdir_config(options.workdir), options.overrides)
    cfg.model.require_whole("evaluation")
    tasks = options.tasks.split(",") if options.tasks else [cfg.data.dataset]
    if official := [task for task in tasks if task not in TASKS]:
        require(official)
        if options.control:
            raise ConfigError(f"--control {options.control} is of {', '.join(TASKS)}, not of {official[0]}")
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
    params["decoder"] = decoder.unstacked(params["decoder"], cfg.model.decoder, cfg.model.dtype, donate=True)

    folder = options.workdir / "eval"
    folder.mkdir(exist_ok=True)
    if own := [task for task in tasks if task in TASKS]:
        print(f"{'task':12} {'step':>6} {'budget':>6} {'images':8} {'accuracy':>8} {'n':>6} {'seconds':>8}  by type")
    for task in own:
        for budget in budgets:
            report = TASKS[task](params, cfg, tokenizer, budget=budget, control=options.control, limit=options.limit)
            report |= {"step": step, "overrides": options.overrides}
            text = json.dumps(report, indent=2)
            names = (f"{task}_{budget}_{options.control}",) if options.control else (task, f"{task}_{budget}")
            for name in names:
                (folder / f"{name}.json").write_text(text)
            by_type = ", ".join(f"{kind} {score['accuracy']:.4f}" for kind, score in report["by_type"].items())
            print(
                f"{task:12} {step:6} {budget:6} {report['images']:8} {report['accuracy']:8.4f} "
                f"{report['n']:6} {report['seconds']:8.1f}  {by_type}"
            )
    if official:
        from deltallava_jax.evaluation.benchmarks import run
        from deltallava_jax.evaluation.table import table
        from deltallava_jax.inference.model import Model

        model = Model(cfg.model, params, tokenizer, cfg.data.template, cfg.data.aspect)
        run(model, cfg, official, budgets, folder, step=step, options=options)
        if hosts.leads():
            print(table([options.workdir, *options.beside]))
    cli.say(f"written to {folder}")


if __name__ == "__main__":
    hosts.supervise(sys.argv[1:])
    cli.run(lambda: main(parse()))

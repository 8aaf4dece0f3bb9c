"""Evaluates a workdir's newest checkpoint: python eval.py --workdir runs/easy_vqa

Prints a table and writes to WORKDIR/eval/ a JSON file for each task, with its last evaluation, and one for each budget.
Controls (--control), which ask each question about another image or about noise, and partial evaluations (--limit)
are written to separate files:
    python eval.py --workdir runs/easy_vqa --tasks easy_vqa --budgets 16,4 [--control shuffled|noise]
The paper's benchmarks run through lmms-eval (requirements-eval.txt), on local copies of their data with --offline, and
resume where they were stopped:
    python eval.py --workdir runs/delta --budgets 144,36,16,4,1 --tasks \\
        gqa,mmbench_en_dev,mme,pope,scienceqa_img,textvqa_val,vqav2_val,vizwiz_vqa_val,nocaps_val,flickr30k_test
Settings can be overridden, for methods that need no training:
    python eval.py --workdir runs/mlp --config.model.projector.name=fastervlm --budgets 16
    python eval.py --workdir runs/mlp --config.model.fastv.keep=16
"""

from __future__ import annotations

import argparse
from pathlib import Path

from deltallava_jax import cli
from deltallava_jax.config import override
from deltallava_jax.errors import ConfigError
from deltallava_jax.parallel import hosts


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=cli.invocation("eval"),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--workdir", required=True, type=Path, help="where train.py put its checkpoints")
    parser.add_argument("--tasks", default="", help="comma-separated; by default that of the training")
    parser.add_argument("--budgets", default="", help="visual tokens per image, comma-separated; default: all")
    parser.add_argument(
        "--control", choices=("shuffled", "noise"), default="", help="replaces each image: by another one, or noise"
    )
    parser.add_argument("--blind", action="store_const", const="noise", dest="control", help="--control noise")
    parser.add_argument("--limit", type=int, default=0, help="only so many questions (easy_vqa: spread evenly); 0: all")
    parser.add_argument("--offline", type=Path, metavar="DIR", help="local copies of lmms-eval's data, DIR/TASK")
    parser.add_argument("--batch", type=int, default=16, metavar="N", help="lmms-eval's questions at a time")
    parser.add_argument("--beside", type=Path, nargs="*", default=[], help="more workdirs for lmms-eval's table")
    parser.add_argument("--config.SECTION.KEY", metavar="VALUE", help="overrides a setting; may be repeated")
    hosts.add_arguments(parser)
    options, rest = parser.parse_known_args(arguments)
    options.overrides = cli.overrides(rest, cli.invocation("eval"))
    return options


def main(options: argparse.Namespace) -> None:
    hosts.connect(options)
    from deltallava_jax.data.conversation import known_template
    from deltallava_jax.evaluation import TASKS
    from deltallava_jax.evaluation.tasks import require_installed
    from deltallava_jax.models import decoder, systems
    from deltallava_jax.workdir import Workdir

    workdir = Workdir(options.workdir)
    for name, least in (("limit", 0), ("batch", 1)):
        if (value := getattr(options, name)) < least:
            raise ConfigError(f"--{name} {value}: expected {least} or more")

    def show(line: str) -> None:
        if hosts.leads():
            print(line)

    cfg = override(workdir.config, options.overrides)
    cfg.model.require_whole("evaluation")
    known_template(cfg.data.template, setting="data.template")
    tasks = options.tasks.split(",") if options.tasks else [cfg.data.dataset]
    if official := [task for task in tasks if task not in TASKS]:
        require_installed(official)
        if options.control:
            raise ConfigError(
                f"--control {options.control}: expected one of the tasks {', '.join(TASKS)}, not {official[0]}"
            )
    budgets = list(systems.budgets(cfg.model.projector))
    if options.budgets:
        try:
            budgets = [int(text) for text in options.budgets.split(",")]
        except ValueError:
            raise ConfigError(f"--budgets {options.budgets!r}: expected numbers, e.g. 16,4") from None
    for budget in budgets:
        systems.check_budget(cfg.model.projector, budget)

    tokenizer = workdir.tokenizer
    step = workdir.latest
    params = workdir.newest(cfg.model, step=step)
    params["decoder"] = decoder.unstacked(params["decoder"], cfg.model.decoder, cfg.model.dtype, donate=True)

    if own := [task for task in tasks if task in TASKS]:
        show(f"{'task':12} {'step':>6} {'budget':>6} {'images':8} {'accuracy':>8} {'n':>6} {'seconds':>8}  by type")
    for task in own:
        for budget in budgets:
            report = TASKS[task](
                params, cfg, tokenizer, budget=budget, control=options.control, limit=options.limit,
                progress=hosts.leads(),
            )  # fmt: skip
            report |= {"step": step, "limit": options.limit, "overrides": options.overrides}
            if hosts.leads():
                workdir.write_report(report, *([options.control] if options.control else []))
            by_type = ", ".join(f"{kind} {score['accuracy']:.4f}" for kind, score in report["by_type"].items())
            show(
                f"{task:12} {step:6} {budget:6} {report['images']:8} {report['accuracy']:8.4f} "
                f"{report['n']:6} {report['seconds']:8.1f}  {by_type}"
            )
    if official:
        from deltallava_jax.evaluation.benchmarks import evaluate_tasks
        from deltallava_jax.evaluation.table import format_table
        from deltallava_jax.inference.model import Model

        model = Model(cfg.model, params, tokenizer, cfg.data.template, cfg.data.aspect)
        evaluate_tasks(model, cfg, official, budgets, workdir, step=step, options=options)
        show(format_table([options.workdir, *options.beside]))
    if hosts.leads():
        cli.log(f"written to {workdir.results}")


def run(arguments: list[str]) -> None:
    """Runs the command in a supervised process."""
    hosts.supervise(arguments)
    cli.run(lambda: main(parse(arguments)))

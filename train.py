"""Trains a model: python train.py --config configs/easy_vqa.py --workdir runs/easy_vqa

The same command with the same --workdir resumes from the newest checkpoint. Any setting can be overridden:
    python train.py --config configs/easy_vqa.py --workdir runs/s4 --config.model.projector.scale_factor=4
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from pathlib import Path

from deltallava_jax import cli
from deltallava_jax.config import Config, load_config, override, to_dict
from deltallava_jax.errors import ConfigError
from deltallava_jax.parallel import hosts

FREE = ("dtype", "remat", "loss_chunk", "tower_images")  # of the model: how it is computed, not what


def parse(arguments: list[str] | None = None) -> tuple[Config, argparse.Namespace]:
    """(config, the other options) of a command line. Raises ConfigError."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", required=True, help="a Python file with get_config()")
    parser.add_argument("--workdir", required=True, type=Path, help="checkpoints, metrics and results go here")
    parser.add_argument("--config.SECTION.KEY", metavar="VALUE", help="overrides a setting; may be repeated")
    parser.add_argument("--profile", metavar="N:M", help="writes a profiler trace of steps N to M to WORKDIR/profile")
    hosts.add_arguments(parser)
    known, rest = parser.parse_known_args(arguments)
    return override(load_config(known.config), cli.overrides(rest, "train.py")), known


def main(cfg: Config, options: argparse.Namespace) -> None:
    import jax

    from deltallava_jax.analysis.flops import StepOperations
    from deltallava_jax.analysis.plan import memory_table, parameter_sums, parameter_table
    from deltallava_jax.analysis.targets import peak_flops
    from deltallava_jax.data import tokens
    from deltallava_jax.data.packing import plan_for
    from deltallava_jax.data.pipeline import Rows
    from deltallava_jax.data.sources import training_source
    from deltallava_jax.evaluation import TASKS
    from deltallava_jax.models import projectors
    from deltallava_jax.models.names import flatten
    from deltallava_jax.parallel.mesh import make_mesh
    from deltallava_jax.training.checkpoints import Checkpoints
    from deltallava_jax.training.loop import train
    from deltallava_jax.training.profile import parse_steps
    from deltallava_jax.training.step import TrainStep, batch_shapes

    began, workdir = time.monotonic(), options.workdir
    cfg.model.require_whole("training")
    profile = parse_steps(options.profile) if options.profile else None

    def say(line: str) -> None:
        if hosts.leads():
            print(line, file=sys.stderr, flush=True)

    # ---------------------------------------------------------------- processes and devices
    hosts.connect(options)
    can_evaluate = cfg.data.dataset in TASKS
    if cfg.training.keep_best and not can_evaluate:
        raise ConfigError(f"training.keep_best: no evaluation during training for data.dataset={cfg.data.dataset}")
    mesh = make_mesh(cfg)
    budgets = projectors.budgets(cfg.model.projector)
    workdir.mkdir(parents=True, exist_ok=True)

    # ---------------------------------------------------------------- data
    source = training_source(cfg.data)
    tokenizer_file, config_file = workdir / "tokenizer.json", workdir / "config.json"
    latest = Checkpoints(workdir, create=True).latest()
    if latest is not None and config_file.exists():
        now, before = flatten(to_dict(cfg)), flatten(json.loads(config_file.read_text()))
        for key in sorted(key for key in now if now[key] != before.get(key)):
            changed = f"{key.replace('/', '.')} is {now[key]!r} now; the workdir was begun with {before.get(key)!r}"
            if key.startswith("model/") and key in before and key.split("/")[1] not in FREE:
                raise ConfigError(
                    f"{workdir} holds another model: {changed}. Use its settings, or another --workdir; with "
                    f"--config.init_from={workdir} that begins with these weights, where they fit"
                )
            say(f"note: {changed}")
    elif latest is None and hosts.leads():  # the others read what it writes
        if cfg.init_from:
            if not (Path(cfg.init_from) / "checkpoints").is_dir():
                raise ConfigError(f"config.init_from={cfg.init_from} holds no checkpoints; convert makes such a folder")
            tokenizer = tokens.load(Path(cfg.init_from) / "tokenizer.json")
        else:
            tokenizer = tokens.train(source.texts(), cfg.model.decoder.vocab_size)
        tokenizer.save(tokenizer_file)
        config_file.write_text(json.dumps(to_dict(cfg), indent=2))
    hosts.wait("workdir")
    if not (hosts.leads() or tokenizer_file.exists()):
        raise ConfigError(f"this process sees no {tokenizer_file}; --workdir must be a folder that all hosts share")
    tokenizer = tokens.load(tokenizer_file)
    if tokenizer.vocab_size > cfg.model.decoder.vocab_size:
        raise ConfigError(
            f"decoder.vocab_size={cfg.model.decoder.vocab_size}, but {tokenizer_file} has {tokenizer.vocab_size} tokens"
        )
    rows = Rows(source, tokenizer, cfg.data, cfg.model.vision)
    lengths, images = rows.lengths()
    plan = plan_for(cfg.data, lengths, images, budgets[:1] if cfg.training.every_budget else budgets, cfg.seed)
    steps = cfg.training.steps or plan.steps_for(cfg.training.epochs)

    # ---------------------------------------------------------------- model
    step = TrainStep(cfg, mesh, steps)
    if hosts.leads():
        (workdir / "parameters.txt").write_text(parameter_table(step.shapes) + "\n")
    say(parameter_sums(step.shapes))
    say(
        f"{len(source):,} conversations, {len(source) / plan.steps_for(1):.1f} a step, {steps:,} steps, "
        f"budgets {budgets}, mesh {dict(mesh.shape)}"
    )
    first = plan.step(0)
    if cut := int((lengths > first.text).sum()):
        say(f"{cut:,} conversations are longer than a row's {first.text} text tokens and will be cut")
    say(memory_table(step.shapes, step.compile(batch_shapes(cfg, mesh, first.text, first.images), first.budget)))

    # ---------------------------------------------------------------- training
    def evaluate(params, metrics, number) -> float:
        accuracies = []
        for budget in budgets:
            report = TASKS[cfg.data.dataset](
                params, cfg, tokenizer, budget=budget, limit=cfg.evaluation.limit, progress=False
            )
            by_type = ", ".join(f"{kind} {score['accuracy']:.4f}" for kind, score in report["by_type"].items())
            metrics.say(f"step {number}: {report['task']} {report['accuracy']:.4f} at {budget} tokens ({by_type})")
            metrics.evaluated(number, {f"{report['task']}_{budget}": report["accuracy"]})
            accuracies.append(report["accuracy"])
        return sum(accuracies) / len(accuracies)

    finished = train(
        cfg, step, rows, plan, workdir, steps, evaluate=evaluate if can_evaluate else None, profile=profile,
        operations=StepOperations(step), peak=peak_flops(jax.devices()[0].device_kind),
    )  # fmt: skip
    if finished:
        minutes = (time.monotonic() - began) / 60
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # kilobytes
        say(
            f"done in {minutes:.1f} min, {peak:.1f} GiB at most"
            + (f"; next: python eval.py --workdir {workdir}" if can_evaluate else "")
        )


if __name__ == "__main__":
    hosts.supervise(sys.argv[1:])
    cli.run(lambda: main(*parse()), "interrupted, and nothing is lost; the same command goes on")

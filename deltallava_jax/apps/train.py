"""Trains a model: python train.py --config configs/easy_vqa.py --workdir runs/easy_vqa

The same command with the same --workdir resumes from the newest checkpoint. Any setting can be overridden:
    python train.py --config configs/easy_vqa.py --workdir runs/s4 --config.model.projector.scale_factor=4
With a --config, --help also prints all of its settings:
    python train.py --config configs/easy_vqa.py --help
"""

from __future__ import annotations

import argparse
import dataclasses
import resource
import sys
import time
from pathlib import Path

from deltallava_jax import cli
from deltallava_jax.config import Config, ModelConfig, load_config, override
from deltallava_jax.config.show import show
from deltallava_jax.parallel import hosts


def parse_arguments(arguments: list[str] | None = None) -> tuple[argparse.Namespace, dict[str, str]]:
    """(options, overrides of settings by dotted key) of a command line. Raises ConfigError."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog=cli.invocation("train"),
        description=__doc__,
        epilog=_settings(arguments),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, help="a Python file with get_config(), or FILE:SYSTEM-STAGE")
    parser.add_argument("--workdir", required=True, type=Path, help="checkpoints, metrics and results go here")
    parser.add_argument("--config.SECTION.KEY", metavar="VALUE", help="overrides a setting; may be repeated")
    parser.add_argument("--profile", metavar="N:M", help="writes a profiler trace of steps N to M to WORKDIR/profile")
    hosts.add_arguments(parser)
    options, rest = parser.parse_known_args(arguments)
    return options, cli.overrides(rest, cli.invocation("train"))


def _settings(arguments: list[str]) -> str | None:
    """The settings of the given configuration, which --help prints after the options."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("--config", nargs="?")
    options, _ = parser.parse_known_args(arguments)
    return show(options.config) if options.help and options.config else None


def parse(arguments: list[str] | None = None) -> tuple[Config, argparse.Namespace]:
    """(config, the other options) of a command line. Raises ConfigError."""
    options, changes = parse_arguments(arguments)
    cfg = load_config(options.config)
    if cfg.model == ModelConfig():  # none is given
        from deltallava_jax.workdir import Workdir

        model = Workdir(options.workdir).model_for(changes.get("init_from", cfg.init_from))
        cfg = dataclasses.replace(cfg, model=model)
    return override(cfg, changes), options


def main(cfg: Config, options: argparse.Namespace) -> None:
    import jax

    from deltallava_jax.analysis.flops import StepOperations
    from deltallava_jax.analysis.plan import format_memory, format_parameter_counts, format_parameters
    from deltallava_jax.analysis.targets import peak_flops
    from deltallava_jax.apps.tune import programs, tune
    from deltallava_jax.data.pipeline import Rows
    from deltallava_jax.data.sources import training_source
    from deltallava_jax.evaluation.validation import validation
    from deltallava_jax.models import lora, systems
    from deltallava_jax.models.names import flatten
    from deltallava_jax.parallel.mesh import make_mesh
    from deltallava_jax.training import faults, remat
    from deltallava_jax.training.loop import train
    from deltallava_jax.training.profile import parse_steps
    from deltallava_jax.training.step import TrainStep, batch_shapes
    from deltallava_jax.workdir import Workdir

    began = time.monotonic()
    workdir = Workdir(options.workdir)
    cfg.model.require_whole("training")
    cfg.data.validate_dataset_settings()
    cfg = workdir.with_choices(cfg)
    profile = parse_steps(options.profile) if options.profile else None

    def log(line: str) -> None:
        if hosts.leads():
            cli.log(line)

    # ---------------------------------------------------------------- processes and devices
    hosts.connect(options)
    mesh = make_mesh(cfg)
    budgets = systems.budgets(cfg.model.projector)

    # ---------------------------------------------------------------- data
    source = training_source(cfg.data)
    for note in workdir.begin(cfg, source.texts):
        log(note)
    tokenizer = workdir.tokenizer
    evaluate = validation(cfg, tokenizer)
    rows = Rows(source, tokenizer, cfg.data, cfg.model.vision, systems.question_length(cfg.model.projector))
    plan = rows.plan(budgets[:1] if cfg.training.every_budget else budgets, cfg.seed)
    for line in faults.validate_plan(plan, cfg.data.max_bad_fraction, workdir.path):
        log(line)
    steps = cfg.training.steps or plan.steps_for(cfg.training.epochs)

    # ---------------------------------------------------------------- model
    step = TrainStep(cfg, mesh, steps)
    if hosts.leads():
        workdir.parameters.write_text(format_parameters(step.shapes, cfg.optimizer) + "\n")
    log(format_parameter_counts(step.shapes))
    if cfg.lora and (whole := lora.trained_whole(flatten(step.shapes.trained))):
        log(f"note: {len(whole)} parameters beside adapters and projector train whole, e.g. {whole[0]}: see frozen")
    log(
        f"{len(plan.records):,} conversations, {len(plan.records) / plan.steps_for(1):.1f} a step, {steps:,} steps, "
        f"budgets {budgets}, mesh {dict(mesh.shape)}"
    )
    first = plan.step(0)
    if plan.cut:
        limit = plan.text_capacity.min()
        log(f"{plan.cut:,} conversations are longer than a row's {limit} text tokens and will be truncated")
    tune(step, programs(cfg, plan, steps), log)
    shapes = batch_shapes(cfg, mesh, first.text, first.images)
    if cfg.model.remat == "auto":
        make = lambda cfg: TrainStep(cfg, mesh, steps)
        step, line = remat.choose(cfg, make, shapes, first.budget, remat.device_capacity(jax.local_devices()[0]))
        workdir.keep_choices(step.cfg)
        log(line)
    log(format_memory(step.shapes, step.compile(shapes, first.budget)))

    # ---------------------------------------------------------------- training
    finished = train(
        step.cfg, step, rows, plan, workdir.path, steps, evaluate=evaluate, profile=profile,
        operations=StepOperations(step), peak=peak_flops(jax.devices()[0].device_kind),
    )  # fmt: skip
    if finished:
        minutes = (time.monotonic() - began) / 60
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # kilobytes
        log(
            f"done in {minutes:.1f} min, peak memory {peak:.1f} GiB"
            + (f"; next: {cli.invocation('eval')} --workdir {workdir}" if evaluate else "")
        )


def run(arguments: list[str]) -> None:
    """Runs the command in a supervised process."""
    hosts.supervise(arguments)
    cli.run(lambda: main(*parse(arguments)), "interrupted; nothing is lost, run the same command again")

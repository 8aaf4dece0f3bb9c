"""Which implementation of attention is fastest here, for the shapes of a training run on the devices at hand.

    python -m deltallava_jax tune --config configs/finetune_7b.py
    python -m deltallava_jax tune --config configs/finetune_7b.py --config.model.remat=dots --again

Training does the same before its first step. Each candidate runs forward and backward on random data, is checked
against XLA in float32, and timed; the fastest correct one is taken. The results are kept in ~/.cache/deltallava_jax
(or $DELTALLAVA_CACHE) by device, versions and shapes. model.attention and model.windowed_attention, if they are not
"auto", are taken as they are, and not measured.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from deltallava_jax import cli
from deltallava_jax.analysis.plan import CONVERSATION, TEXTS, first_batch
from deltallava_jax.config import Config, load_config, override
from deltallava_jax.data import cache
from deltallava_jax.data.packing import Plan
from deltallava_jax.kernels import devices, registry, tuning
from deltallava_jax.kernels.tuning import Result
from deltallava_jax.models import llavolta
from deltallava_jax.parallel import hosts
from deltallava_jax.parallel.mesh import make_mesh
from deltallava_jax.training.step import TrainStep, batch_shapes

MOST_PROGRAMS = 8  # of a run whose calls are measured: its most frequent ones
UNFINISHED = Result("xla", {}, {"every kernel": "did not end being measured"})
STEPS = 1000  # of the run: only constants of the learning rate's schedule depend on it


class Program(NamedTuple):
    """What distinguishes the programs of a run."""

    text: int
    images: int
    budget: int
    pooling: llavolta.Pooling | None = None


def programs(cfg: Config, plan: Plan, steps: int) -> list[Program]:
    """The most frequent programs of a run, by its first epoch."""
    first = map(plan.step, range(min(steps, plan.steps_for(1))))
    counts = Counter((step.text, step.images, step.budget) for step in first)
    phases = dict.fromkeys(llavolta.phase_at(cfg.training.llavolta, number, steps) for number in range(steps))
    return [Program(*shape, phase) for shape, _ in counts.most_common(MOST_PROGRAMS) for phase in phases]


def tune(
    step: TrainStep, found: Iterable[Program], log: Callable[[str], None], *, again: bool = False
) -> dict[str, Result]:
    """Measures the calls of a train step's programs, as far as they are not in the table, and makes this process take
    the fastest. All processes call it, the first one measures. again: measure those in the table too. Returns, in the
    first process, str(Call) -> what was measured; nothing where there is nothing to choose, as on a CPU."""
    if not tuning.has_kernels():
        return {}
    measured = _measure(step, found, log, again) if hosts.leads() else {}
    choices = json.dumps({call: result.choice for call, result in measured.items()})
    registry.use(devices.device()[1], json.loads(hosts.gather(choices)[0]))
    return measured


def _measure(step: TrainStep, found: Iterable[Program], log: Callable[[str], None], again: bool) -> dict[str, Result]:
    with registry.recording() as recorded:
        for program in found:
            batch = batch_shapes(step.cfg, step.mesh, program.text, program.images)
            step.trace(batch, program.budget, program.pooling)
    calls = {str(call): (operation, call) for call, operation in recorded.calls.items()}
    if not calls:
        return {}
    file = tuning.file(cache.folder())
    table = {}
    try:
        table = tuning.read(file)
    except ValueError as error:
        log(f"warning: the measured choices of kernels cannot be read and are measured again: {error}")
    known = table.setdefault(tuning.environment(), {})
    missing = [call for call in calls if again or call not in known]
    if missing:
        log(f"measuring {len(missing)} calls of attention on {devices.device()[1]}")
    else:
        choices = "; ".join(f"{call} -> {known[call].choice}" for call in calls)
        log(f"attention as measured before ({file}): {choices}")
    for call in calls:
        if call not in missing and known[call] == UNFINISHED:
            log(f"warning: {call}: measuring it did not end, so XLA is taken; {cli.program()} tune --again measures it")
    kept = True
    for call in missing:
        known[call] = UNFINISHED  # stays where a kernel ends the process
        kept = kept and _keep(file, table, log)
        known[call] = tuning.measure(*calls[call])
        for line in tuning.describe(call, known[call]):
            log(line)
    if missing and kept:
        _keep(file, table, log)
    return {call: known[call] for call in calls}


def _keep(file: Path, table: tuning.Table, log: Callable[[str], None]) -> bool:
    """Writes the table; logs where that is not possible, and returns whether it was."""
    try:
        with cache.writing(file) as part:
            part.write_text(tuning.text(table))
        return True
    except OSError as error:
        log(f"warning: the measured choices of kernels cannot be kept: {file}: {error.strerror}")
        return False


# ---------------------------------------------------------------- the command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, help="a Python file with get_config(), as for train.py")
    parser.add_argument("--text", type=int, default=0, metavar="N", help="approximate tokens of text per image")
    parser.add_argument("--again", action="store_true", help="measure what is in the table too")
    parser.add_argument("--config.SECTION.KEY", metavar="VALUE", help="overrides a setting; may be repeated")
    parser.set_defaults(overrides=[])


def main(options: argparse.Namespace) -> None:
    cfg = override(load_config(options.config), cli.overrides(options.overrides, f"{cli.program()} tune"))
    cfg.model.require_whole("tune")
    step = TrainStep(cfg, make_mesh(cfg), STEPS)
    budget, text, images, _ = first_batch(cfg, options.text or TEXTS.get(cfg.data.template, CONVERSATION))
    measured = tune(step, [Program(text, images, budget)], cli.log, again=options.again)
    kind = devices.device()[1]
    if not measured:
        reason = "it is forced, or no kernel takes it" if tuning.has_kernels() else f"on {kind} nothing is measured"
        print(f"nothing to choose for the attention of {cfg.name} here: {reason}")
        return
    print(f"attention of {cfg.name} on {kind}, forward and backward; kept in {tuning.file(cache.folder())}")
    for call, result in measured.items():
        print(f"\n{call}")
        for name, seconds in sorted(result.seconds.items(), key=lambda one: one[1]):
            print(f"  {name:<8} {1e3 * seconds:>9.3f} ms{'  <- taken' if name == result.choice else ''}")
        for name, reason in result.left_out.items():
            print(f"  {name:<8} left out: {reason}")

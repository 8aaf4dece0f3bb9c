"""The training loop."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

from deltallava_jax.config import Config
from deltallava_jax.data.packing import Plan
from deltallava_jax.data.pipeline import Element, Rows, elements
from deltallava_jax.errors import NonFiniteLoss
from deltallava_jax.models import llavolta
from deltallava_jax.models.layers import Params
from deltallava_jax.models.names import flatten
from deltallava_jax.parallel import hosts, rules
from deltallava_jax.parallel.mesh import held_rows, put_rows
from deltallava_jax.sequence import Batch
from deltallava_jax.training import faults
from deltallava_jax.training.checkpoints import Checkpoints, fingerprint
from deltallava_jax.training.metrics import Metrics
from deltallava_jax.training.profile import Trace
from deltallava_jax.training.step import TrainState, TrainStep, base_shapes, init_frozen, init_state, whole_params
from deltallava_jax.workdir import Workdir

CTRL_C = "Ctrl-C"


def train(
    cfg: Config,
    step: TrainStep,
    rows: Rows,
    plan: Plan,
    workdir: Path,
    steps: int,
    *,
    evaluate: Callable[[Params, Metrics, int], float] | None = None,
    profile: tuple[int, int] | None = None,
    operations: Callable[[Batch, int, llavolta.Pooling | None], float] | None = None,
    peak: float | None = None,
) -> bool:
    """Trains to step ``steps``, resuming from the workdir's newest checkpoint; without one it starts from fresh
    parameters or those of ``init_from``. Returns True when all steps are done.

    evaluate(params, metrics, step) -> accuracy is called every training.eval_every steps, on each process with whole
    parameters. profile: the first and last step to trace, into WORKDIR/profile. operations(batch, budget, pooling): the
    operations of a step. peak: operations per second of a device. On SIGTERM to any process, all processes save the
    same, current step and return False. Ctrl-C does the same, and the process that received it raises SystemExit(130).
    Raises NonFiniteLoss (nothing is saved after the last good step), TooManyFaults, CheckpointError."""
    settings = cfg.training
    checkpoints = Checkpoints(workdir, settings.keep_checkpoints, settings.keep_best, create=True, clean=True)
    latest = checkpoints.latest()
    if latest is None:
        state = init_state(cfg, step.mesh, steps, _initial_params(cfg, step, workdir))
        record = {"epoch": 0, "records": 0, "faults": 0}
    else:
        state, record = checkpoints.restore(latest, _saved_part(cfg, step.shapes))
        if cfg.lora:
            frozen = init_frozen(cfg, step.mesh, _initial_params(cfg, step, workdir))
            state = dataclasses.replace(state, frozen=frozen)
    start = int(state.step)
    count = functools.partial(faults.count_step, cfg.data.max_bad_fraction, workdir, record, plan)
    budgets = () if settings.every_budget else plan.budgets
    metrics = Metrics(workdir, start, steps, settings.log_every, on_step=count, peak=peak, budgets=budgets)
    trace = Trace(profile, Workdir(workdir).profile)
    if start:
        metrics.log(f"resuming from step {start} of {steps}")
    held = held_rows(step.mesh, plan.rows)
    data = elements(rows, plan, start, steps, workers=cfg.data.workers, held=held)
    with _stopping() as stop:
        try:
            for number, element in enumerate(data, start + 1):
                batch = put_rows(element.batch, step.mesh)
                pooling = llavolta.phase_at(settings.llavolta, number - 1, steps)
                trace.before(number)
                state, values = step(state, batch, element.budget, pooling)
                traced = trace.after(number, values)
                if traced:
                    metrics.log(traced)
                metrics.push(
                    number, values, operations(batch, element.budget, pooling) if operations else 0.0,
                    epoch=plan.epochs_at(number), budget=None if settings.every_budget else element.budget,
                )  # fmt: skip
                _report_faults(element, metrics, workdir)
                stopping = stop(number) if number < steps else None
                accuracy = None
                if evaluate and settings.eval_every and _due(number, settings.eval_every, steps) and not stopping:
                    metrics.flush()
                    accuracy = evaluate(hosts.whole(whole_params(cfg, state)), metrics, number)
                    metrics.restart_clock()
                if stopping or _due(number, settings.checkpoint_every, steps):
                    metrics.flush()  # a step that is not finite is never saved
                    checkpoints.save(number, _saved_part(cfg, state), record, accuracy)
                if stopping:
                    metrics.log(f"{stopping}: saving step {number}; the same command resumes from it")
                    if stopping == CTRL_C:
                        raise SystemExit(130)
                    return False
            return True
        except NonFiniteLoss as error:
            good = checkpoints.latest()
            kept = "no checkpoint was saved yet" if good is None else f"the checkpoint of step {good} is kept"
            batch = _describe_batch(rows, plan, error.step)
            raise NonFiniteLoss(f"{error}; {kept}. The batch: {batch}", error.step) from error
        finally:
            trace.close()
            metrics.close()
            with contextlib.suppress(AttributeError):
                data.close()
            checkpoints.wait()
            checkpoints.close()


def _due(number: int, interval: int, steps: int) -> bool:
    """Whether a step is the last or a multiple of ``interval`` (0: never)."""
    return number == steps or (interval > 0 and number % interval == 0)


def _saved_part(cfg: Config, state: TrainState) -> TrainState:
    """What a checkpoint holds: of adapters' base only the trained parts, as the rest is in ``init_from``."""
    return dataclasses.replace(state, frozen={}) if cfg.lora else state


def _initial_params(cfg: Config, step: TrainStep, workdir: Path) -> Params | None:
    """The newest parameters of ``init_from``, in the dtypes and shardings that the train state begins with; None
    without one. The base of adapters is compared with what the run began with."""
    if not cfg.init_from:
        return None
    source = Workdir(cfg.init_from)
    shapes = base_shapes(cfg, step.mesh)
    placed = lambda path, leaf: NamedSharding(step.mesh, rules.spec_for(path, leaf.shape, step.mesh))

    def place(path: str, saved: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:  # adapters in the source are merged
        return shapes.get(path) or jax.ShapeDtypeStruct(saved.shape, saved.dtype, sharding=placed(path, saved))

    params = source.newest(cfg.model, place)
    if cfg.lora:
        frozen = {path: leaf for path, leaf in flatten(params).items() if leaf.dtype == jnp.bfloat16}
        Workdir(workdir).keep_base(fingerprint(frozen))
    return params


@contextlib.contextmanager
def _stopping() -> Iterator[Callable[[int], str | None]]:
    """Yields stop(step), to be called at every step: the name of a received signal if this step is the one to save.

    A second Ctrl-C ends the process at once. Several processes agree on the next step that none of them has passed:
    jax's runtime, which handles SIGTERM since jax.distributed.initialize, synchronizes it in the background. Ctrl-C is
    therefore forwarded as SIGTERM."""
    several = jax.process_count() > 1
    received: list[int] = []

    def receive(number, _):
        received.append(number)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            if hosts.leads():
                os.write(2, f"\n{CTRL_C}: saving after this step; press it again to stop at once\n".encode())
            if several:
                signal.raise_signal(signal.SIGTERM)

    def stop(step: int) -> str | None:
        if multihost_utils.reached_preemption_sync_point(step) if several else received:
            return CTRL_C if signal.SIGINT in received else "SIGTERM"
        return None

    handled = (signal.SIGINT,) if several else (signal.SIGINT, signal.SIGTERM)
    # A shell may have its background jobs ignore Ctrl-C.
    handled = [number for number in handled if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, receive) for number in handled}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _report_faults(element: Element, metrics: Metrics, workdir: Path) -> None:
    """Appends the records left out to this process's file; a row's are reported by the first process that holds it."""
    if element.faults:
        with Workdir(workdir).faults(jax.process_index()).open("a") as file:
            file.writelines(f"{fault}\n" for fault in element.faults)
        metrics.log(f"left out {element.faults[0]}")


def _describe_batch(rows: Rows, plan: Plan, step: int) -> str:
    """The record ids of a step's batch."""
    planned = plan.step(step - 1)
    records = [index for row in planned.rows for index in row]
    return f"epoch {planned.epoch}, budget {planned.budget}, {len(records)} records: " + (
        ", ".join(map(rows.name, records[:8])) + (", ..." if len(records) > 8 else "")
    )

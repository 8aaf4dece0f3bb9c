"""The training loop."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import jax

from deltallava_jax.config import Config
from deltallava_jax.data.packing import Plan
from deltallava_jax.data.pipeline import Rows, elements
from deltallava_jax.models.layers import Params
from deltallava_jax.models.selection import llavolta
from deltallava_jax.parallel.mesh import put_rows
from deltallava_jax.training.checkpoints import CheckpointError, Checkpoints
from deltallava_jax.training.metrics import Metrics, NonFiniteLoss
from deltallava_jax.training.step import TrainStep, init_state


class TooManyFaults(RuntimeError):
    """More of the records than data.max_bad_fraction could not be used."""


def train(
    cfg: Config,
    step: TrainStep,
    rows: Rows,
    plan: Plan,
    workdir: Path,
    steps: int,
    *,
    evaluate: Callable[[Params, Metrics, int], None] | None = None,
) -> bool:
    """Trains up to ``steps`` from the workdir's newest checkpoint, or from the start: fresh parameters, or those of
    ``init_from``. True when all steps are done.

    evaluate(params, metrics, step) is called every training.eval_every steps. SIGTERM: saves the current step and
    returns False. Raises NonFiniteLoss (nothing is saved after the last good step), TooManyFaults, CheckpointError."""
    every = cfg.training
    checkpoints = Checkpoints(workdir, every.keep_checkpoints, create=True)
    latest = checkpoints.latest()
    if latest is None:
        state = init_state(cfg, step.mesh, steps, _initial_params(cfg, step))
        record = {"faults": 0, "records": 0}
    else:
        state, record = checkpoints.restore(latest, step.shapes)
    start = int(state.step)
    metrics = Metrics(workdir, start, steps, every.log_every)
    if start:
        metrics.say(f"resuming from step {start} of {steps}")
    data = elements(
        rows, plan, start, steps,
        workers=cfg.data.workers, process=jax.process_index(), processes=jax.process_count(),
    )  # fmt: skip
    try:
        with _sigterm() as stop:
            for number, element in enumerate(data, start + 1):
                batch = put_rows(element.batch, step.mesh)
                pooling = llavolta.stage_at(every.llavolta, number - 1, steps)
                state, values = step(state, batch, element.budget, pooling)
                metrics.push(number, values)
                _count_faults(cfg, record, element, metrics, workdir)
                stopping = stop.is_set() and number < steps
                if stopping or number == steps or (every.checkpoint_every and number % every.checkpoint_every == 0):
                    metrics.flush()  # a step that is not finite is never saved
                    checkpoints.save(number, state, record)
                if evaluate and every.eval_every and (number == steps or number % every.eval_every == 0):
                    metrics.flush()
                    evaluate(state.params, metrics, number)
                    metrics.restart_clock()
                if stopping:
                    metrics.say(f"SIGTERM: saving step {number}; the same command resumes from it")
                    return False
            return True
    except NonFiniteLoss as error:
        good = checkpoints.latest()
        kept = "no checkpoint was saved yet" if good is None else f"the checkpoint of step {good} is kept"
        batch = _describe(rows, plan, error.step)
        raise NonFiniteLoss(f"{error}; {kept}. The batch: {batch}", error.step) from error
    finally:
        metrics.close()
        checkpoints.wait()
        checkpoints.close()
        with contextlib.suppress(AttributeError):
            data.close()


def _initial_params(cfg: Config, step: TrainStep) -> Params | None:
    """The newest parameters of ``init_from``, in the dtypes and places of the train state; None without one."""
    if not cfg.init_from:
        return None
    source = Checkpoints(cfg.init_from)
    latest = source.latest()
    if latest is None:
        raise CheckpointError(f"config.init_from={cfg.init_from} holds no finished checkpoint")
    return source.restore_params(latest, cfg.model, like=step.shapes.params)


@contextlib.contextmanager
def _sigterm():
    """A flag that SIGTERM sets while the context is open."""
    flag = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: flag.set())
    try:
        yield flag
    finally:
        signal.signal(signal.SIGTERM, before)


def _count_faults(cfg: Config, record: dict, element, metrics: Metrics, workdir: Path) -> None:
    """Adds an element's faults to the record and to faults.txt; TooManyFaults past the allowed share."""
    record["records"] += int(element.batch.segments.max(axis=1).sum()) + len(element.faults)
    record["faults"] += len(element.faults)
    if element.faults:
        with (workdir / "faults.txt").open("a") as file:
            file.writelines(f"{fault}\n" for fault in element.faults)
        metrics.say(f"left out {element.faults[0]} ({record['faults']} of {record['records']} records so far)")
    if record["faults"] > cfg.data.max_bad_fraction * max(record["records"], 100):
        raise TooManyFaults(
            f"{record['faults']} of {record['records']} records could not be used, more than "
            f"data.max_bad_fraction={cfg.data.max_bad_fraction}; they are listed in {workdir / 'faults.txt'}"
        )


def _describe(rows: Rows, plan: Plan, step: int) -> str:
    """The record ids of a step's batch."""
    planned = plan.step(step - 1)
    ids = [rows.source[index].id for row in planned.rows for index in row]
    return f"epoch {planned.epoch}, budget {planned.budget}, {len(ids)} records: {', '.join(ids[:8])}" + (
        ", ..." if len(ids) > 8 else ""
    )

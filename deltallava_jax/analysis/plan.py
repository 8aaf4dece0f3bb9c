"""A run before its first step: its parameters, the memory of the compiled step, and the plan of the same step on
another machine, compiled by that machine's compiler."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator

import jax
import numpy as np
from jax.sharding import Mesh

from deltallava_jax import cli
from deltallava_jax.analysis import estimate, flops, hlo, probe, targets, units
from deltallava_jax.analysis.collectives import collectives, summary
from deltallava_jax.analysis.targets import Target
from deltallava_jax.config import REMAT_LADDER, Config
from deltallava_jax.data.packing import plan_for
from deltallava_jax.models import systems
from deltallava_jax.models.names import flatten
from deltallava_jax.parallel.mesh import AXES, compiler_options, make_mesh
from deltallava_jax.sequence import Batch
from deltallava_jax.training import remat
from deltallava_jax.training.step import TrainState, TrainStep, batch_shapes, device_bytes

STEPS = 1000  # of the run: only constants of the learning rate's schedule depend on it
TEXTS = {"plain": 40}  # rough tokens of text per image in LLaVA's two stages: captions, and by default
CONVERSATION = 300


def format_parameters(shapes: TrainState) -> str:
    """Parameters, dtype, shape and sharding of every array, trained and frozen, with the sums."""
    rows = []
    for kind, tree in (("trained", shapes.trained), ("frozen", shapes.frozen)):
        for path, leaf in sorted(flatten(tree).items()):
            shape = "x".join(map(str, leaf.shape))
            rows.append((path, shape, str(leaf.dtype), str(tuple(leaf.sharding.spec)), kind, f"{leaf.size:,}"))
    header = ("parameter", "shape", "dtype", "mesh axes", "", "count")
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [header, *rows]
    ]
    return "\n".join([*lines, format_parameter_counts(shapes)])


def format_parameter_counts(shapes: TrainState) -> str:
    """The number of parameters of each part of the model, trained and frozen, and in all."""
    parts: dict[str, int] = {}
    for kind, tree in (("trained", shapes.trained), ("frozen", shapes.frozen)):
        for path, leaf in sorted(flatten(tree).items()):
            part = f"{path.split('/')[0]} ({kind})"
            parts[part] = parts.get(part, 0) + leaf.size
    lines = [f"{part}: {size:,}" for part, size in parts.items()]
    return "\n".join([*lines, f"all: {sum(parts.values()):,} parameters"])


def format_memory(shapes: TrainState, program: jax.stages.Compiled) -> str:
    """Memory of one device: the state, and what the compiled step allocates in addition."""
    rows = {
        "parameters": device_bytes((shapes.trained, shapes.frozen)),
        "optimizer": device_bytes(shapes.optimizer),
    }
    analysis = program.memory_analysis()
    if analysis is not None:
        rows["gradients, activations"] = analysis.temp_size_in_bytes
    rows["total"] = sum(rows.values())
    return "memory of a device: " + ", ".join(f"{name} {units.size(count)}" for name, count in rows.items())


def measure(cfg: Config, target: Target, text: int = 0) -> dict:
    """The plan as one JSON object; with remat=auto, of the policy that train.py would choose, and of the others in
    "ladder". text: tokens of text per image (0: by the template).

    Raises ConfigError if the target's compiler is missing or the configuration does not fit the mesh."""
    return ladder(cfg, target, text) if cfg.model.remat == "auto" else one(cfg, target, text)


def ladder(cfg: Config, target: Target, text: int = 0) -> dict:
    """The plan of the policy of recomputation that training.remat chooses; plan["ladder"] has
    memory, operations and estimate of them all. One that is far too large by what it saves is not compiled."""
    rows, chosen = [], None
    for policy in REMAT_LADDER:
        other = remat.with_policy(cfg, policy)
        last = policy == REMAT_LADDER[-1]
        row = dict(remat=policy, total_bytes=None, flops_per_step=None, estimate=None, fits=False)
        least = remat.least_bytes(*step_and_batch(other, target, text))
        if last or remat.fits(least, target.capacity):
            plan = one(other, target, text)
            used = plan["per_device"]["program_bytes"]
            row |= dict(total_bytes=used, flops_per_step=plan["flops_per_step"], fits=remat.fits(used, target.capacity))
            row |= dict(estimate=plan["step_seconds"] and plan["step_seconds"]["estimate"])
            if chosen is None and policy in remat.CHOICES and (row["fits"] or last):
                chosen = plan
        rows.append(row | dict(least_bytes=least))
    return chosen | dict(ladder=rows)


def mesh_of(cfg: Config, target: Target) -> Mesh:
    with compiler_output():  # libtpu prints many lines because there is no TPU
        return make_mesh(cfg, targets.devices(target))


def step_and_batch(cfg: Config, target: Target, text: int = 0) -> tuple[TrainStep, Batch, int]:
    """(the train step, shapes of its first batch, budget)."""
    mesh = mesh_of(cfg, target)
    budget, T, I, _ = first_batch(cfg, text or default_text(cfg))
    return TrainStep(cfg, mesh, STEPS), batch_shapes(cfg, mesh, T, I), budget


def default_text(cfg: Config) -> int:
    return TEXTS.get(cfg.data.template, CONVERSATION)


def one(cfg: Config, target: Target, text: int = 0) -> dict:
    """The plan of a configuration with a fixed policy of recomputation."""
    cfg.model.require_whole("a plan")
    mesh = mesh_of(cfg, target)
    text = text or default_text(cfg)
    budget, T, I, conversations = first_batch(cfg, text)
    step = TrainStep(cfg, mesh, STEPS)
    traced = step.trace(batch_shapes(cfg, mesh, T, I), budget)
    by_part, skipped = flops.traced(traced.jaxpr), flops.skipped(traced.jaxpr)
    budgets = systems.budgets(cfg.model.projector) if cfg.training.every_budget else (budget,)
    cli.log(f"compiling {cfg.name} for {target}, remat={cfg.model.remat}; this takes minutes")
    with compiler_output() as output:
        began = time.monotonic()
        lowered = traced.lower()
        program, used = compile_or_size(lowered, compiler_options(mesh), device_bytes(step.shapes))
        seconds = time.monotonic() - began
    found, step_seconds = [], None
    if program is not None:
        parsed = hlo.parse(program.as_text())
        found = collectives(parsed, mesh.size)
        step_seconds = estimate.estimate(parsed, rates(target), mesh.size, cfg.model.decoder.layers)
    per_device = memory(step, program, used, target)
    return dict(
        target=str(target),
        devices=mesh.size,
        config=cfg.name,
        mesh=dict(zip(AXES, mesh.devices.shape, strict=True)),
        remat=cfg.model.remat,
        batch=dict(
            rows=cfg.data.rows, row_length=cfg.data.row_length, text_tokens=T, images=I, budget=budget,
            text_per_image=text, conversations=conversations, accumulation=cfg.optimizer.accumulation,
        ),
        fits=per_device["total_bytes"] <= per_device["capacity_bytes"],
        per_device=per_device,
        flops_per_step=flops.total(by_part) - skipped,
        skipped_flops_per_step=skipped,
        model_flops_per_step=flops.needed(by_part, cfg, [T + I * (each - 1) for each in budgets]),
        flops_by_part=by_part,
        compiler_flops_per_step=step_seconds and mesh.size * sum(row["operations"] for row in step_seconds["parts"]),
        collectives=summary(found) if program else None,
        largest_collective_bytes=max((one.bytes for one in found), default=0),
        step_seconds=step_seconds,
        seconds_to_compile=round(seconds, 1),
        rematerialization_warnings=len(re.findall("nvoluntary full remat", "".join(output))),
        jax=jax.__version__,
    )  # fmt: skip


def first_batch(cfg: Config, text: int) -> tuple[int, int, int, int]:
    """(budget, T, I, conversations): the largest budget's batch as the data plan makes it for conversations of one
    image and ``text`` tokens of text, more or less by up to a half."""
    lengths = np.linspace(0.5 * text, 1.5 * text, 2048).round().astype(int).clip(2)
    budget = systems.budgets(cfg.model.projector)[0]
    plan = plan_for(cfg.data, lengths, np.ones_like(lengths), (budget,), cfg.seed)
    first = plan.step(0)
    return budget, first.text, first.images, sum(map(len, first.rows))


def compile_or_size(
    lowered: jax.stages.Lowered, options: dict[str, str], arguments: int
) -> tuple[jax.stages.Compiled | None, int]:
    """(program, 0), or (None, bytes that it would need) where the TPU compiler refuses a program for its size, of which
    it names all or the temporaries. arguments: bytes of the program's arguments."""
    try:
        return lowered.compile(options), 0
    except jax.errors.JaxRuntimeError as error:
        used = re.search(r"(?:Used |HLO temporaries \()([\d.]+)([KMGT])", str(error))
        if "RESOURCE_EXHAUSTED" not in str(error) or not used:
            raise
        size = int(float(used.group(1)) * 2 ** (10 * (1 + "KMGT".index(used.group(2)))))
        return None, size + (arguments if "temporaries" in used.group() else 0)


def memory(step: TrainStep, program: jax.stages.Compiled | None, used: int, target: Target) -> dict[str, int]:
    """Bytes of one device. Gradients are computed, not measured: float32, sharded as their parameters, and twice
    with accumulation; activations are the rest of the temporaries."""
    state = step.shapes
    parameters, optimizer = device_bytes((state.trained, state.frozen)), device_bytes(state.optimizer)
    if program is None:
        temporary = max(used - parameters - optimizer, 0)
    else:
        temporary = program.memory_analysis().temp_size_in_bytes
    gradients = device_bytes(state.trained) * (2 if step.cfg.optimizer.accumulation > 1 else 1)
    return dict(
        parameters_bytes=parameters,
        optimizer_bytes=optimizer,
        temporary_bytes=temporary,
        gradient_bytes=min(gradients, temporary),
        activation_bytes=max(temporary - gradients, 0),
        total_bytes=parameters + optimizer + temporary,
        program_bytes=used if program is None else remat.program_bytes(program),
        capacity_bytes=target.capacity,
    )


@functools.cache
def rates(target: Target) -> estimate.Rates:
    """What a device of the target reaches; of this machine's CPU as measured, once in a process."""
    return estimate.rates(target, None if target.chip else probe.measure(target.count))


@contextlib.contextmanager
def compiler_output() -> Iterator[list[str]]:
    """Captures what compilers write to the process's standard error; it is in the list at the end."""
    with tempfile.TemporaryFile() as file:
        sys.stderr.flush()
        screen, written = os.dup(2), []
        os.dup2(file.fileno(), 2)
        try:
            yield written
        finally:
            sys.stderr.flush()
            os.dup2(screen, 2)
            os.close(screen)
            file.seek(0)
            written.append(file.read().decode(errors="replace"))

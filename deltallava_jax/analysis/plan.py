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
from dataclasses import replace
from unittest import mock

import jax
import numpy as np
from jax.sharding import Mesh

from deltallava_jax import cli
from deltallava_jax.analysis import estimate, flops, hlo, probe, targets, units
from deltallava_jax.analysis.collectives import collectives, summary
from deltallava_jax.analysis.targets import Target
from deltallava_jax.config import Config, MeshConfig
from deltallava_jax.data.packing import plan_for
from deltallava_jax.models import systems
from deltallava_jax.models.names import flatten
from deltallava_jax.parallel.mesh import AXES, compiler_options, make_mesh
from deltallava_jax.training.step import TrainState, TrainStep, batch_shapes, device_bytes

STEPS = 1000  # of the run: only constants of the learning rate's schedule depend on it
TEXTS = {"plain": 40}  # rough tokens of text per image in LLaVA's two stages: captions, and by default
CONVERSATION = 300
UNROLLED_WITH = ("0.10", "0.11")  # versions of jax in which ``unrolled`` replaces every scan of a step


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


def measure(cfg: Config, target: Target, text: int = 0, count: bool = True) -> dict:
    """The plan as one JSON object. text: tokens of text per image (0: by the template). count: also compile for
    the compiler's count of operations.

    Raises ConfigError if the target's compiler is missing or the configuration does not fit the mesh."""
    cfg.model.require_whole("a plan")
    with compiler_output():  # libtpu prints many lines because there is no TPU
        mesh = make_mesh(cfg, targets.devices(target))
    text = text or TEXTS.get(cfg.data.template, CONVERSATION)
    budget, T, I, conversations = first_batch(cfg, text)
    step = TrainStep(cfg, mesh, STEPS)
    traced = step.trace(batch_shapes(cfg, mesh, T, I), budget)
    by_part, skipped = flops.traced(traced.jaxpr), flops.skipped(traced.jaxpr)
    budgets = systems.budgets(cfg.model.projector) if cfg.training.every_budget else (budget,)
    cli.log(f"compiling {cfg.name} for {target}; this takes minutes")
    with compiler_output() as output:
        began = time.monotonic()
        lowered = traced.lower()
        program, used = compile_or_size(lowered, compiler_options(mesh))
        seconds = time.monotonic() - began
    counted = None
    if count and not can_unroll():
        cli.log(
            f"XLA's count is left out: it is tested with jax {' and '.join(UNROLLED_WITH)}, this is {jax.__version__}"
        )
    elif count:
        cli.log(f"compiled in {units.seconds(seconds)}; counting operations")
        with compiler_output():
            counted = compiler_flops(cfg, mesh, T, I, budget)
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
        compiler_flops_per_step=counted,
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


def compile_or_size(lowered: jax.stages.Lowered, options: dict[str, str]) -> tuple[jax.stages.Compiled | None, int]:
    """(program, 0), or (None, bytes that it would need) where the TPU compiler refuses a program for its size."""
    try:
        return lowered.compile(options), 0
    except jax.errors.JaxRuntimeError as error:
        used = re.search(r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm", str(error))
        if "RESOURCE_EXHAUSTED" not in str(error) or not used:
            raise
        return None, int(float(used.group(1)) * 2 ** (10 * (1 + "KMGT".index(used.group(2)))))


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
        capacity_bytes=target.capacity,
    )


def compiler_flops(cfg: Config, mesh: Mesh, text: int, images: int, budget: int) -> int:
    """Operations of a step as XLA counts them in its optimized program, element-wise work included.

    It counts a loop's body once, so one and two decoder layers are compiled without loops, for the rows of one device,
    and their difference stands for the others. By XLA's CPU compiler: that of GPUs gives no count without a GPU, and
    that of TPUs takes many minutes for a program without loops."""
    share = mesh.shape["data"] * mesh.shape["fsdp"]
    counts = []
    for layers in (1, 2):
        small = replace(
            cfg,
            model=replace(cfg.model, decoder=replace(cfg.model.decoder, layers=layers), fastv=None, tower_images=0),
            data=replace(cfg.data, rows=cfg.data.rows // share),
            optimizer=replace(cfg.optimizer, accumulation=1),
            training=replace(cfg.training, llavolta=()),
            mesh=MeshConfig(),
        )
        one = make_mesh(small, jax.devices("cpu")[:1])
        with unrolled():
            lowered = TrainStep(small, one, STEPS).trace(batch_shapes(small, one, text, images), budget).lower()
        counts.append(lowered.compile().cost_analysis()["flops"])
    return int(share * (counts[0] + (cfg.model.decoder.layers - 1) * (counts[1] - counts[0])))


def can_unroll() -> bool:
    """Whether ``unrolled`` is tested with this version of jax. Add a new version when its tests pass."""
    return ".".join(jax.__version__.split(".")[:2]) in UNROLLED_WITH


@contextlib.contextmanager
def unrolled() -> Iterator[None]:
    """Within it every scan is traced unrolled: jax.lax.scan is replaced, for ``can_unroll`` versions."""
    with mock.patch.object(jax.lax, "scan", functools.partial(jax.lax.scan, unroll=True)):
        yield


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

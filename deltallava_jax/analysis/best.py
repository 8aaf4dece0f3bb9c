"""The fastest setting that fits a machine, by the plan's estimate: over mesh, recomputation, accumulation, attention.

Settings are compiled in the order of a bound that is cheap: the seconds of their products. One is passed over without
compiling where its state and saved activations alone do not fit, or are no less than those of another that did not;
where its bound is no better than an estimate already found; or where it recomputes more, or splits the batch further,
than another that fits and is otherwise equal."""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from deltallava_jax import cli
from deltallava_jax.analysis import flops, plan
from deltallava_jax.analysis.plan_report import table
from deltallava_jax.analysis.targets import Target
from deltallava_jax.analysis.units import operations, seconds, size
from deltallava_jax.config import REMAT_LADDER, Config, MeshConfig
from deltallava_jax.errors import ConfigError
from deltallava_jax.training import remat
from deltallava_jax.training.step import device_bytes, state_shapes

TRIES = 12
ACCUMULATIONS = (1, 2, 4, 8)
ATTENTIONS = ("auto", "xla")  # the library's kernel for the device where it can run, and none; besides the given one
REASONS = {
    "memory": "cannot fit",
    "slower": "cannot be faster",
    "more": "recompute or split more than needed",
    "left": "left out, being beyond --tries",
}


@dataclass(frozen=True)
class Setting:
    data: int
    fsdp: int
    tensor: int
    remat: str
    accumulation: int
    attention: str = "auto"

    @property
    def overrides(self) -> str:
        """To be pasted behind a command of train.py or of plan."""
        text = " ".join(f"--config.mesh.{axis}={getattr(self, axis)}" for axis in ("data", "fsdp", "tensor"))
        text += f" --config.model.remat={self.remat} --config.optimizer.accumulation={self.accumulation}"
        return f"{text} --config.model.attention={self.attention}"

    def of(self, cfg: Config) -> Config:
        model = replace(cfg.model, remat=self.remat, attention=self.attention)
        mesh = MeshConfig(self.data, self.fsdp, self.tensor)
        return replace(cfg, model=model, mesh=mesh, optimizer=replace(cfg.optimizer, accumulation=self.accumulation))

    def needs_no_more_than(self, other: Setting) -> bool:
        """Whether it recomputes no more and splits the batch no further, and is equal otherwise."""
        return (self.data, self.fsdp) == (other.data, other.fsdp) and self.saves_no_less_than(other)

    def saves_no_less_than(self, other: Setting) -> bool:
        """Whether it recomputes no more and splits the batch no further, over as many devices a layer."""
        return (
            (self.tensor, self.attention) == (other.tensor, other.attention)
            and REMAT_LADDER.index(self.remat) <= REMAT_LADDER.index(other.remat)
            and self.accumulation <= other.accumulation
        )


def settings(cfg: Config, devices: int) -> Iterator[Setting]:
    """Those that divide the devices, the model and the batch."""
    attentions = sorted({cfg.model.attention, *ATTENTIONS}, key=(*ATTENTIONS, cfg.model.attention).index)
    divisors = [n for n in range(1, devices + 1) if devices % n == 0]
    for fsdp, tensor in itertools.product(reversed(divisors), divisors):
        if devices % (fsdp * tensor):
            continue
        data = devices // (fsdp * tensor)
        for accumulation, policy, attention in itertools.product(ACCUMULATIONS, REMAT_LADDER, attentions):
            setting = Setting(data, fsdp, tensor, policy, accumulation, attention)
            if cfg.data.rows % (data * fsdp * accumulation):
                continue
            try:
                setting.of(cfg).validate_devices(devices)
            except ConfigError:
                continue
            yield setting


@dataclass(frozen=True)
class Bound:
    """What a setting needs at least. seconds: of its products; bytes: of a device."""

    seconds: float
    bytes: int


def search(
    found: Iterable[tuple[Setting, Bound]], compile: Callable[[Setting], dict], capacity: int, tries: int
) -> tuple[list[tuple[Setting, dict]], Counter]:
    """(the settings that were compiled with their plans, fastest of those that fit first; how many were passed over,
    by reason)."""
    tried: list[tuple[Setting, dict]] = []
    too_large: list[tuple[Setting, Bound]] = []
    passed, best = Counter(), float("inf")
    order = lambda one: (one[1].seconds, one[0].accumulation, one[0].tensor, one[0].data)
    for setting, bound in sorted(found, key=order):
        fitting = [other for other, plan in tried if _fits(plan)]
        if not remat.fits(bound.bytes, capacity) or any(
            setting.saves_no_less_than(other) and bound.bytes >= least.bytes for other, least in too_large
        ):
            passed["memory"] += 1
        elif bound.seconds >= best:
            passed["slower"] += 1
        elif any(other.needs_no_more_than(setting) for other in fitting):
            passed["more"] += 1
        elif len(tried) >= tries:
            passed["left"] += 1
        else:
            plan = compile(setting)
            tried.append((setting, plan))
            if _fits(plan):
                best = min(best, plan["step_seconds"]["estimate"])
            else:
                too_large.append((setting, bound))
    key = lambda one: (not _fits(one[1]), one[1]["step_seconds"]["estimate"] if one[1]["step_seconds"] else 0)
    return sorted(tried, key=key), passed


def _fits(plan: dict) -> bool:
    memory = plan["per_device"]
    return plan["step_seconds"] is not None and remat.fits(memory["program_bytes"], memory["capacity_bytes"])


def measure(cfg: Config, target: Target, text: int = 0, tries: int = TRIES) -> dict:
    """The search as one JSON object: "best" (overrides, estimate, memory; None where nothing fits), "tried",
    "passed_over", "settings"."""
    bounds = Bounds(cfg, target, text)
    every = list(settings(cfg, target.count))
    cli.log(f"{len(every)} settings for {target}; at most {tries} are compiled")
    tried, passed = search(
        ((setting, bounds(setting)) for setting in every),
        lambda setting: plan.one(setting.of(cfg), target, text), target.capacity, tries,
    )  # fmt: skip
    rows = [
        dict(
            overrides=setting.overrides,
            fits=_fits(found),
            program_bytes=found["per_device"]["program_bytes"],
            flops_per_step=found["flops_per_step"],
            estimate=found["step_seconds"] and found["step_seconds"]["estimate"],
            collectives=found["step_seconds"] and found["step_seconds"]["collectives"],
        )
        for setting, found in tried
    ]
    return dict(
        target=str(target), config=cfg.name, settings=len(every), capacity_bytes=target.capacity,
        best=rows[0] if rows and rows[0]["fits"] else None, tried=rows, passed_over=dict(passed),
    )  # fmt: skip


class Bounds:
    """The ``Bound`` of a setting. Traced once for each policy and attention: what is computed does not depend on mesh
    and accumulation, and what is saved is that of a microbatch, divided over the devices."""

    def __init__(self, cfg: Config, target: Target, text: int):
        self._cfg, self._target, self._text = cfg, target, text
        self._needs = functools.cache(self._traced)
        self._state = functools.cache(self._state_bytes)

    def __call__(self, setting: Setting) -> Bound:
        saved, seconds = self._needs(setting.remat, setting.attention)
        state = self._state(setting.data, setting.fsdp, setting.tensor)
        return Bound(seconds, state + saved // setting.accumulation)

    def _traced(self, policy: str, attention: str) -> tuple[int, float]:
        """(bytes of a device that a step saves besides its state, seconds of its products)."""
        setting = Setting(1, self._target.count, 1, policy, 1, attention)
        step, batch, budget = plan.step_and_batch(setting.of(self._cfg), self._target, self._text)
        saved = remat.least_bytes(step, batch, budget) - device_bytes(step.shapes)
        program = step.trace(batch, budget).jaxpr
        operations = flops.total(flops.traced(program)) - flops.skipped(program)
        rates = plan.rates(self._target)
        peak = max(rates.chip.peak_flops, rates.chip.float32_flops) * rates.efficiency.products
        return saved, operations / (self._target.count * peak)

    def _state_bytes(self, data: int, fsdp: int, tensor: int) -> int:
        setting = Setting(data, fsdp, tensor, REMAT_LADDER[0], 1)
        return device_bytes(state_shapes(setting.of(self._cfg), plan.mesh_of(setting.of(self._cfg), self._target), 1))


def format_best(found: dict) -> str:
    tried = sum(found["passed_over"].values())
    lines = [
        f"{found['config']} on {found['target']}: {found['settings']} settings, {len(found['tried'])} compiled"
        + "".join(f", {count} {REASONS[name]}" for name, count in found["passed_over"].items() if tried),
        "",
    ]
    lines += table([
        (row["overrides"], size(row["program_bytes"]), operations(row["flops_per_step"]),
         seconds(row["estimate"]) if row["estimate"] else "", "" if row["fits"] else "does not fit")
        for row in found["tried"]
    ])  # fmt: skip
    best = found["best"]
    lines += ["", f"the fastest that fits, about {seconds(best['estimate'])} a step: {best['overrides']}" if best else
              "none of them fits"]  # fmt: skip
    return "\n".join(lines)

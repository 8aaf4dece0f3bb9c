"""The choice of an implementation by measuring: every candidate, forward and backward, on random data of a call's
shapes on one device of this process, checked against XLA in float32 and timed; the fastest correct one is taken."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import jax
import jax.numpy as jnp

from deltallava_jax.kernels import devices, registry
from deltallava_jax.kernels.attention.dispatch import OPERATION as ATTENTION
from deltallava_jax.kernels.registry import Call, Operation, Trial
from deltallava_jax.kernels.windowed_attention.dispatch import OPERATION as WINDOWED_ATTENTION

OPERATIONS = ATTENTION, WINDOWED_ATTENTION
# Greatest difference from XLA in float32, over the largest value of the output or of a gradient. XLA's own form, with
# the process's precision of products, may be further away (TPUs multiply float32 in bfloat16 passes by default): twice
# its difference is allowed too, up to MOST.
TOLERANCE = {"bfloat16": 2e-2, "float16": 2e-2, "float32": 1e-3}
MOST = 5e-2
ROUNDS = 5  # of a timing, which is their median
FAR = 3  # times the best time
ROUND = 0.02  # seconds, of as many calls as fit
# Packages whose versions a measurement depends on, those that are installed.
PACKAGES = (
    "jax", "jaxlib", "libtpu", "jax-cuda13-plugin", "jax-cuda12-plugin", "nvidia-cudnn-cu13", "nvidia-cudnn-cu12",
    "deltallava_jax",
)  # fmt: skip


def has_kernels() -> bool:
    """Whether there is any kernel to choose on the target platform."""
    platform = devices.device()[0]
    open_ = [operation for operation in OPERATIONS if platform not in operation.settled]
    return any(platform in modules for operation in open_ for modules in operation.kernels.values())


@dataclass(frozen=True)
class Result:
    """choice: the implementation. seconds: forward and backward, of the correct candidates. left_out: the others and
    why."""

    choice: str
    seconds: dict[str, float]
    left_out: dict[str, str] = field(default_factory=dict)


def measure(operation: Operation, call: Call) -> Result:
    """The fastest correct candidate; XLA where there is none."""
    left_out: dict[str, str] = {}

    def attempt(name: str, step: Callable, where: str = ""):
        try:
            return jax.block_until_ready(step())
        except Exception as error:  # whatever a kernel or its compiler raises
            reason = next(iter(str(error).splitlines()), "")[:200]
            left_out[name] = f"raises {type(error).__name__}{where}: {reason}"

    with jax.default_device(jax.local_devices()[0]):
        made = attempt("xla", lambda: _reference(operation, call), " in float32, so that nothing can be compared")
        if made is None:
            return Result("xla", {}, left_out)
        trial, inputs, expected = made
        allowed = TOLERANCE[call.dtype]
        seconds: dict[str, float] = {}
        for name in operation.candidates(*trial.arguments):
            run = functools.partial(_both(trial.run, name), *inputs)
            found = attempt(name, run)
            if found is None:
                continue
            worst = max(float(_difference(*pair)) for pair in zip(found, expected, strict=True))
            finite = math.isfinite(worst)
            if name == "xla":  # the contract itself
                allowed = max(allowed, min(2 * worst, MOST)) if finite else allowed
            elif not finite:
                left_out[name] = "gives NaN or infinite values"
            elif worst > allowed:
                left_out[name] = f"differs from XLA by {worst:.2g} of the largest value; {allowed:.2g} is allowed"
            if name not in left_out:
                spent = attempt(name, functools.partial(_seconds, run, min(seconds.values(), default=math.inf)))
                seconds |= {} if spent is None else {name: spent}
    return Result(min(seconds, key=seconds.get) if seconds else "xla", seconds, left_out)


def _reference(operation: Operation, call: Call) -> tuple[Trial, list[jax.Array], tuple[jax.Array, ...]]:
    """(the trial, its inputs with a gradient of the output first, what they give in XLA in float32)."""
    trial = operation.trial(call)
    output = jax.eval_shape(functools.partial(trial.run, "xla"), *trial.arrays)
    gradient = jax.random.normal(jax.random.key(9), output.shape)
    inputs = [x.astype(call.dtype) for x in (gradient, *trial.arrays)]
    with jax.default_matmul_precision("highest"):
        return trial, inputs, _both(trial.run, "xla")(*(x.astype(jnp.float32) for x in inputs))


def _both(run: Callable, implementation: str) -> Callable:
    """(the output's gradient, *arrays) -> (output, *the arrays' gradients), compiled."""

    @jax.jit
    def both(gradient, *arrays):
        out, pull = jax.vjp(functools.partial(run, implementation), *arrays)
        return out, *pull(gradient)

    return both


@jax.jit
def _difference(found: jax.Array, expected: jax.Array) -> jax.Array:
    """The greatest difference over the largest expected value; infinite where a value is not finite, which a maximum
    alone may pass over (xla_cpu_enable_fast_min_max)."""
    found = found.astype(jnp.float32)
    difference = jnp.abs(found - expected).max() / jnp.maximum(jnp.abs(expected).max(), 1e-30)
    return jnp.where(jnp.isfinite(found).all(), difference, jnp.inf)


def _seconds(run: Callable, best: float) -> float:
    """Of a call that has run before: the median of several rounds, or one alone where it is far from the best."""

    def spend(count: int) -> float:
        began = time.perf_counter()
        for _ in range(count):
            out = run()
        jax.block_until_ready(out)
        return (time.perf_counter() - began) / count

    once = spend(1)
    count = max(1, min(100, int(ROUND / max(once, 1e-9))))
    return once if once > FAR * best else statistics.median(spend(count) for _ in range(ROUNDS))


def describe(call: str, result: Result) -> list[str]:
    """What was chosen, with times, and a warning for each candidate that was left out."""
    times = ", ".join(f"{name} {1e3 * one:.3g} ms" for name, one in sorted(result.seconds.items(), key=lambda x: x[1]))
    lines = [f"warning: {call}: {name} is left out, it {reason}" for name, reason in result.left_out.items()]
    return [*lines, f"{call}: {times or 'nothing ran'} -> {result.choice}"]


# ---------------------------------------------------------------- what was measured before


def environment() -> str:
    """The kind of device and the versions for which a measurement holds."""
    versions = [devices.device()[1]]
    for name in PACKAGES:
        try:
            versions.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            pass
    if precision := jax.config.jax_default_matmul_precision:
        versions.append(f"precision {precision}")
    return ", ".join([*versions, f"kernels {_code()}"])


@functools.cache
def _code() -> str:
    """A digest of this folder's code: the version of a package under development says little."""
    folder = Path(__file__).parent
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def file(folder: Path) -> Path:
    """The file of the table in the cache folder."""
    return folder / "kernels.json"


Table = dict[str, dict[str, Result]]  # environment -> str(Call) -> what was measured


def read(file: Path) -> Table:
    """The table of a file; empty if there is none. Raises ValueError, in one line, where it cannot be read."""
    if not file.exists():
        return {}
    try:
        found = json.loads(file.read_text())
        return {place: {call: Result(**result) for call, result in calls.items()} for place, calls in found.items()}
    except (ValueError, TypeError, AttributeError, OSError) as error:
        raise ValueError(f"{file}: {str(error).splitlines()[0]}") from error


def text(table: Table) -> str:
    """The contents of the file."""
    return json.dumps(
        {place: {call: vars(result) for call, result in calls.items()} for place, calls in table.items()}, indent=2
    )


def recall(file: Path) -> None:
    """Makes this process take what was measured before, unless it has measured itself. An unreadable table is left to
    the next run that measures."""
    with contextlib.suppress(ValueError):
        if table := read(file):
            measured = table.get(environment(), {})
            registry.use(devices.device()[1], {call: one.choice for call, one in measured.items()}, first=True)

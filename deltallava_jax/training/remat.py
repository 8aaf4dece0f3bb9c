"""The choice of what the backward pass recomputes: the least that leaves a share of each device's memory free.

Found by compiling the train step with one policy after the other, from the least recomputation to the least memory
(CHOICES). A policy that is far too large by the activations that it saves is not compiled."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import replace

import jax

from deltallava_jax.config import REMAT_LADDER, Config
from deltallava_jax.parallel import hosts
from deltallava_jax.sequence import Batch
from deltallava_jax.training.step import TrainStep, device_bytes

# Not "none": it saves no product that "dots" does not, but writes and reads several times as much (docs/scale.md).
CHOICES = REMAT_LADDER[1:]
FREE = 0.08  # share of a device's memory that the choice leaves to other programs and fragmentation
SHARED = 0.8  # of the activations that tracing counts are held at least: the compiler keeps equal ones once
GIB = 2**30


def with_policy(cfg: Config, policy: str) -> Config:
    return replace(cfg, model=replace(cfg.model, remat=policy))


def choose(
    cfg: Config, make: Callable[[Config], TrainStep], batch: Batch, budget: int, capacity: int
) -> tuple[TrainStep, str]:
    """(the train step with the least recomputation that fits, compiled for ``batch``; a line about the choice).

    make: the train step of a configuration. batch: shapes with shardings. capacity: bytes of a device. Of several
    processes, all must find room. The last policy is taken whether it fits or not."""
    refused = []
    for policy in CHOICES[:-1]:
        step = make(with_policy(cfg, policy))
        least = least_bytes(step, batch, budget)
        if not _everywhere(fits(least, capacity)):
            refused.append(f"{policy} needs more than {least / GIB:.1f} GiB")
            continue
        used = compiled_bytes(step, batch, budget)
        if _everywhere(fits(used, capacity)):
            break
        refused.append(f"{policy} needs {used / GIB:.1f} GiB")
    else:
        policy = CHOICES[-1]
        step = make(with_policy(cfg, policy))
        used = program_bytes(step.compile(batch, budget))
    line = f"remat={policy}: {used / GIB:.1f} of {capacity / GIB:.1f} GiB a device"
    return step, f"{line}; {', '.join(refused)}" if refused else line


def _everywhere(fitting: bool) -> bool:
    return all(answer == "True" for answer in hosts.gather(str(fitting)))


def fits(used: float, capacity: int) -> bool:
    return used <= (1 - FREE) * capacity


def program_bytes(program: jax.stages.Compiled) -> int:
    """Bytes of one device while the program runs: what it is given, makes and needs in between."""
    memory = program.memory_analysis()
    return (
        memory.argument_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
    )


def compiled_bytes(step: TrainStep, batch: Batch, budget: int) -> float:
    """The same of a step, compiled; infinite where the compiler refuses the program for its size, as that of TPUs."""
    try:
        return program_bytes(step.compile(batch, budget))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return math.inf


def least_bytes(step: TrainStep, batch: Batch, budget: int) -> int:
    """What the same will exceed, without compiling: the train state, and what the forward pass saves for the backward
    pass, divided over all devices."""
    saved = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in step.saved(batch, budget))
    return device_bytes(step.shapes) + round(SHARED * saved) // step.mesh.size


def device_capacity(device: jax.Device) -> int:
    """Bytes that programs can use of a device; CPU devices share the machine's memory."""
    limit = (device.memory_stats() or {}).get("bytes_limit")
    return limit or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // jax.local_device_count()

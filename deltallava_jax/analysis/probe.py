"""What this machine's CPU does, measured in a second or two: products and memory, with the threads of the process."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from deltallava_jax.analysis.targets import Chip

SIDE = 1024  # of the square matrices of the products
COPIED = 2**24  # float32 numbers of the array that is read and written, 64 MiB: larger than caches
TIMES = 8  # so often in one program, in place: none of its memory is new to the process
REPEATS = 5


def measure(devices: int = 1, clock: Callable[[], float] = time.perf_counter) -> Chip:
    """The rates of one of ``devices`` CPU devices, which share the process's threads. The best of several repeats:
    other work on the machine makes one slower, nothing makes it faster."""
    fastest = functools.partial(_fastest, clock)
    cpu = jax.local_devices(backend="cpu")[0]
    with jax.default_device(cpu):
        left, right = jnp.ones((SIDE, SIDE)), jnp.ones((SIDE, SIDE))
        product = 2 * SIDE**3 / fastest(jax.jit(jnp.matmul), left, right)
        halves = 2 * SIDE**3 / fastest(jax.jit(jnp.matmul), left.astype(jnp.bfloat16), right.astype(jnp.bfloat16))
        again = jax.jit(lambda x: jax.lax.fori_loop(0, TIMES, lambda _, x: x * 1.0001 + 0.1, x))
        copied = TIMES * 2 * 4 * COPIED / fastest(again, jnp.ones(COPIED))
    return Chip("cpu", 0, "", halves / devices, product / devices, copied / devices, link=copied / devices,
                source="collectives of CPU devices are copies")  # fmt: skip


def _fastest(clock: Callable[[], float], call: Callable, *arguments) -> float:
    """Seconds of the fastest call, after one that compiles."""
    jax.block_until_ready(call(*arguments))
    seconds = []
    for _ in range(REPEATS):
        began = clock()
        jax.block_until_ready(call(*arguments))
        seconds.append(clock() - began)
    return min(seconds)

"""The derivative of windowed attention by each backend's own backward kernel."""

from __future__ import annotations

import functools
from types import ModuleType

import jax


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 4, 5))
def attend(backend: ModuleType, q, k, v, window: int, interpret=False):
    """Windowed attention by the kernels of ``backend`` (tpu or gpu), shapes as in reference.py.

    ``interpret`` runs them on a CPU for tests: pltpu.InterpretParams or plgpu.InterpretGPUParams."""
    return backend.forward(q, k, v, window, interpret)[0]


def _forward(backend, q, k, v, window, interpret):
    out, residuals = backend.forward(q, k, v, window, interpret)
    return out, (q, k, v, residuals)


def _backward(backend, window, interpret, saved, d_out):
    return backend.backward(*saved, d_out, window, interpret)


attend.defvjp(_forward, _backward)

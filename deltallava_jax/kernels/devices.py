"""The facts behind the choice of a kernel: the target device, and how a mesh divides the arrays."""

from __future__ import annotations

import functools
import logging
import math

import jax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from deltallava_jax.config import ROW_AXES

HOPPER_ON = ("H100", "H200", "H800", "H20", "GH200", "B100", "B200", "B300")  # in the names of GPUs
HEADS_AXIS = "tensor"  # the mesh axis that divides the attention heads of towers and decoders


def device() -> tuple[str, str]:
    """(platform, kind) of the target device: that of the mesh in use, else jax's first."""
    found = jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
    return found.platform, found.device_kind


def from_hopper_on() -> bool:
    """Whether the target device is an NVIDIA GPU from Hopper on."""
    return any(name in device()[1] for name in HOPPER_ON)


@functools.lru_cache(maxsize=64)
def log_once(message: str) -> None:
    """Logs a message once."""
    logging.getLogger(__name__).warning(message)


def axes() -> dict[str, int]:
    """Axes of the mesh in use that a kernel must be divided over; none on one device or within shard_map."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or AxisType.Manual in mesh.axis_types:
        return {}
    return dict(mesh.shape)


def shards() -> tuple[int, int]:
    """Over how many devices of the mesh in use a kernel's rows are divided, and its heads."""
    sizes = axes()
    return math.prod(size for name, size in sizes.items() if name in ROW_AXES), sizes.get(HEADS_AXIS, 1)


def indivisible(rows: int, *heads: int) -> str | None:
    """Why so many rows, and heads if any, do not divide over the mesh in use; None where they do."""
    over_rows, over_heads = shards()
    if rows % over_rows:
        return f"a batch of {rows} does not divide over {over_rows} devices"
    for count in heads:
        if count % over_heads:
            return f"{count} heads do not divide over {over_heads} devices"
    return None


def rows_spec(ndim: int = 1, heads_at: int | None = None) -> P:
    """The PartitionSpec of arrays [B, ...] on the mesh in use: rows divided, and heads at axis ``heads_at``, if any."""
    names = axes()
    heads = HEADS_AXIS if heads_at and names.get(HEADS_AXIS, 1) > 1 else None
    return P(tuple(n for n in names if n in ROW_AXES), *(heads if i == heads_at else None for i in range(1, ndim)))


def per_device(function, in_specs, out_specs):
    """``function`` applied to each device's shard: XLA cannot partition a custom kernel."""
    if not axes():
        return function
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)

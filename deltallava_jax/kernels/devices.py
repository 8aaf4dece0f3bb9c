"""What the choice of a kernel asks: which devices are compiled for, and how a mesh divides the arrays."""

from __future__ import annotations

import functools
import logging
import math

import jax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from deltallava_jax.config import ROW_AXES

HEADS_AXIS = "tensor"  # the mesh axis that shares the heads of the towers' and decoders' attention


def device() -> tuple[str, str]:
    """(platform, kind) of the devices that are compiled for: the mesh's in use, else jax's first."""
    found = jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
    return found.platform, found.device_kind


@functools.lru_cache(maxsize=64)
def log_once(message: str) -> None:
    """Logs a message once."""
    logging.getLogger(__name__).warning(message)


def axes() -> dict[str, int]:
    """Axes of the mesh in use that a kernel has to be divided over by hand: none on one device or within shard_map."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or AxisType.Manual in mesh.axis_types:
        return {}
    return dict(mesh.shape)


def indivisible(rows: int, *heads: int) -> str | None:
    """Why so many rows, and heads if they are shared, do not divide over the mesh in use; None where they do."""
    sizes = axes()
    shards = math.prod(size for name, size in sizes.items() if name in ROW_AXES)
    if rows % shards:
        return f"a batch of {rows} does not divide over {shards} devices"
    for count in heads:
        if count % sizes.get(HEADS_AXIS, 1):
            return f"{count} heads do not divide over {sizes[HEADS_AXIS]} devices"
    return None


def rows_spec(ndim: int = 1, heads_at: int | None = None) -> P:
    """How arrays [B, ...] lie on the mesh in use: rows divided, and heads if they are shared, at axis ``heads_at``."""
    names = axes()
    heads = HEADS_AXIS if heads_at and names.get(HEADS_AXIS, 1) > 1 else None
    return P(tuple(n for n in names if n in ROW_AXES), *(heads if i == heads_at else None for i in range(1, ndim)))


def per_device(function, in_specs, out_specs):
    """``function`` of each device's own part: XLA cannot divide a kernel that it does not know."""
    if not axes():
        return function
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)

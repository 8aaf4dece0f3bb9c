"""The device mesh: axes data and fsdp share the rows of a batch, fsdp and tensor share the parameters."""

from __future__ import annotations

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from deltallava_jax.config import ROW_AXES, Config

AXES = (*ROW_AXES, "tensor")
ROWS = P(ROW_AXES)


def make_mesh(cfg: Config, devices: list | None = None) -> Mesh:
    """The configured mesh over all devices (or the given ones); ConfigError if it does not fit."""
    devices = jax.devices() if devices is None else devices
    sizes = cfg.check_devices(len(devices))
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def put_rows(tree, mesh: Mesh):
    """Host arrays of this process's rows -> global arrays sharded over the rows."""
    sharding = NamedSharding(mesh, ROWS)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), tree)

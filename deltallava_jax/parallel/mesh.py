"""The device mesh: axes data and fsdp share the rows of a batch, fsdp and tensor share the parameters."""

from __future__ import annotations

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from deltallava_jax.config import ROW_AXES, Config
from deltallava_jax.errors import ConfigError

AXES = (*ROW_AXES, "tensor")
ROWS = P(ROW_AXES)


def make_mesh(cfg: Config, devices: list | None = None) -> Mesh:
    """The configured mesh over all devices (or the given ones); ConfigError if it does not fit."""
    devices = jax.devices() if devices is None else devices
    sizes = cfg.check_devices(len(devices))
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def compiler_options(mesh: Mesh) -> dict[str, str]:
    """What the training programs of this mesh are compiled with.

    On CPUs, whose thunks may run side by side, the processes must take the collectives in one order, each the same.
    On TPUs, where parameters are divided by fsdp alone, they are gathered before a product. By default the compiler
    would make each large product a loop over the devices' shards, whose own products on 256 chips contract 16 of
    4,096 numbers, on units of 128 x 128; and takes several times as long to compile."""
    several = len({device.process_index for device in mesh.devices.flat}) > 1
    platform = mesh.devices.flat[0].platform
    if several and platform == "cpu":
        return {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
    if platform == "tpu" and mesh.shape["tensor"] == 1:
        return {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}
    return {}


def tensor_mesh(size: int) -> Mesh:
    """The first ``size`` devices, all on the axis that divides the layers: for inference."""
    if not 1 <= size <= len(jax.devices()):
        raise ConfigError(f"tensor={size}; there are {len(jax.devices())} devices")
    return jax.make_mesh((1, 1, size), AXES, axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[:size])


def put_rows(tree, mesh: Mesh):
    """Host arrays of this process's rows -> global arrays sharded over the rows."""
    sharding = NamedSharding(mesh, ROWS)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), tree)

"""The device mesh: data and fsdp divide the rows of a batch, fsdp and tensor divide the parameters."""

from __future__ import annotations

import math

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from deltallava_jax import cli
from deltallava_jax.config import ROW_AXES, Config
from deltallava_jax.errors import ConfigError

AXES = (*ROW_AXES, "tensor")
ROWS = P(ROW_AXES)


def make_mesh(cfg: Config, devices: list | None = None) -> Mesh:
    """The configured mesh over all devices (or the given ones); ConfigError if it does not fit."""
    devices = jax.devices() if devices is None else devices
    sizes = cfg.validate_devices(len(devices))
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


# Collectives of several GPUs run beside products: scheduled so that they are hidden, those of a layer beside the layer
# before, and not in many small pieces.
OVERLAP = {
    "xla_gpu_enable_latency_hiding_scheduler": "True",
    "xla_gpu_enable_highest_priority_async_stream": "True",
    "xla_gpu_enable_pipelined_all_gather": "True",
    "xla_gpu_enable_pipelined_reduce_scatter": "True",
    "xla_gpu_enable_pipelined_all_reduce": "True",
    "xla_gpu_all_gather_combine_threshold_bytes": str(2**27),
    "xla_gpu_all_reduce_combine_threshold_bytes": str(2**27),
    "xla_gpu_reduce_scatter_combine_threshold_bytes": str(2**26),
}


def compiler_options(mesh: Mesh) -> dict[str, str]:
    """XLA options of this mesh's training programs.

    On CPUs, whose thunks may run concurrently, every process must run the collectives in the same order. On TPUs,
    parameters divided by fsdp alone are gathered before a product. By default the compiler makes each large product a
    loop over the devices' shards, which on 256 chips contracts 16 of 4,096 numbers at a time, on units of 128 x 128,
    and takes several times as long to compile."""
    several = len({device.process_index for device in mesh.devices.flat}) > 1
    platform = mesh.devices.flat[0].platform
    if platform == "gpu" and mesh.size > 1:
        return OVERLAP
    if several and platform == "cpu":
        return {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
    if platform == "tpu" and mesh.shape["tensor"] == 1:
        return {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}
    return {}


def compiled(lowered: jax.stages.Lowered, mesh: Mesh) -> jax.stages.Compiled:
    """The program with ``compiler_options``; without them where this version of the compiler no longer has one."""
    try:
        return lowered.compile(compiler_options(mesh))
    except jax.errors.JaxRuntimeError as error:
        if "No such compile option" not in str(error):
            raise
        cli.log(f"warning: the program is compiled without {', '.join(compiler_options(mesh))}: {error}")
        return lowered.compile()


def tensor_mesh(size: int) -> Mesh:
    """This process's first ``size`` devices, all on the axis ``tensor``: for inference."""
    devices = jax.local_devices()
    if not 1 <= size <= len(devices):
        raise ConfigError(f"tensor={size}; expected 1 to {len(devices)}, the number of devices")
    return jax.make_mesh((1, 1, size), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices[:size])


def held_rows(mesh: Mesh, rows: int) -> dict[int, bool]:
    """The batch rows that this process's devices hold, ascending -> whether it is the first process that holds them.

    Devices that differ on the axis ``tensor`` alone hold the same rows, across processes too; the devices of one
    process need not be neighbours in the mesh."""
    holders: dict[int, set[int]] = {row: set() for row in range(rows)}
    for device, (index,) in NamedSharding(mesh, ROWS).devices_indices_map((rows,)).items():
        for row in range(rows)[index]:
            holders[row].add(device.process_index)
    me = jax.process_index()
    return {row: me == min(found) for row, found in holders.items() if me in found}


def put_rows(tree, mesh: Mesh):
    """Host arrays of the rows that this process holds (``held_rows``) -> global arrays sharded over the rows."""
    sharding = NamedSharding(mesh, ROWS)
    shards = math.prod(mesh.shape[axis] for axis in ROW_AXES)
    place = {shard: number for number, shard in enumerate(held_rows(mesh, shards))}

    def put(x: np.ndarray) -> jax.Array:
        size = len(x) // len(place)  # rows per shard

        def rows_at(index: tuple[slice, ...]) -> np.ndarray:
            first = place[(index[0].start or 0) // size] * size
            return x[first : first + size]

        return jax.make_array_from_callback((size * shards, *x.shape[1:]), sharding, rows_at)

    return jax.tree.map(put, tree)

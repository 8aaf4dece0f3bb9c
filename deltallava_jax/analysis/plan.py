"""What a run will hold, before its first step: the parameter table and the memory of the compiled step."""

from __future__ import annotations

import math

import jax
import numpy as np

from deltallava_jax.models.names import flatten
from deltallava_jax.training.step import TrainState

MIB = 2**20


def parameter_table(shapes: TrainState) -> str:
    """Parameters, dtype, shape and sharding of every array, trained and frozen, with sums by part."""
    rows, parts = [], {}
    for kind, tree in (("trained", shapes.trained), ("frozen", shapes.frozen)):
        for path, leaf in sorted(flatten(tree).items()):
            shape = "x".join(map(str, leaf.shape))
            rows.append((path, shape, str(leaf.dtype), str(tuple(leaf.sharding.spec)), kind, f"{leaf.size:,}"))
            part = (path.split("/")[0], kind)
            parts[part] = parts.get(part, 0) + leaf.size
    header = ("parameter", "shape", "dtype", "mesh axes", "", "count")
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in [header, *rows]]
    lines += [f"{name} ({kind}): {size:,}" for (name, kind), size in parts.items()]
    return "\n".join([*lines, f"all: {sum(parts.values()):,} parameters"])


def device_bytes(tree) -> int:
    """Bytes on one device of a tree of arrays or shapes with shardings."""
    sizes = [math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)]
    return int(np.sum(sizes, dtype=np.int64))


def memory_table(shapes: TrainState, program: jax.stages.Compiled) -> str:
    """Memory of one device in MiB: what the state holds, and what the compiled step needs beside it."""
    rows = {
        "parameters": device_bytes((shapes.trained, shapes.frozen)),
        "optimizer": device_bytes(shapes.optimizer),
    }
    analysis = program.memory_analysis()
    if analysis is not None:
        rows["gradients, activations"] = analysis.temp_size_in_bytes
    rows["total"] = sum(rows.values())
    return "memory of a device: " + ", ".join(f"{name} {size / MIB:,.1f} MiB" for name, size in rows.items())

"""Writes a model's weights as safetensors files, one tensor at a time."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from deltallava_jax.convert.folder import write_json
from deltallava_jax.convert.pretrained import CheckpointLayout, Pretrained
from deltallava_jax.convert.tensors import DTYPES, Tensor
from deltallava_jax.models.names import TRANSFORMS, Entry, flatten
from deltallava_jax.progress import progress_bar

SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True)
class _Out:
    """One tensor to write, and the parameter (and layer) that it is taken from."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    entry: Entry | None = None
    layer: int | None = None

    @property
    def bytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize


def write_weights(model: Pretrained, folder: Path, layout: CheckpointLayout, shard_bytes: int = SHARD_BYTES) -> None:
    """The tensors by their names in ``layout``, in model.safetensors or in shards of at most ``shard_bytes``."""
    flat = flatten(model.params)
    table = layout.name_table(model.cfg if layout.vision is not None else dataclasses.replace(model.cfg, vision=None))
    outs = _outs(table, flat)
    if layout == model.layout:
        outs += [_Out(name, tensor.shape, tensor.dtype) for name, tensor in model.extra.items()]
    shards: list[list[_Out]] = [[]]
    for out in outs:
        if shards[-1] and sum(o.bytes for o in shards[-1]) + out.bytes > shard_bytes:
            shards.append([])
        shards[-1].append(out)
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        where = {out.name: name for name, shard in zip(names, shards, strict=True) for out in shard}
        total = {"total_size": sum(out.bytes for out in outs)}
        write_json(folder / "model.safetensors.index.json", {"metadata": total, "weight_map": where})
    value = _reader(flat)
    bar = progress_bar(what="writing", total=sum(o.bytes for o in outs), unit="B")
    for name, shard in zip(names, shards, strict=True):
        _write_safetensors(folder / name, shard, lambda o: value(o) if o.entry else model.extra[o.name].read(), bar)
    bar.close()


def write_stacks(path: Path, table: list[Entry], flat: Mapping[str, jax.Array]) -> None:
    """The arrays of a table, by its names, in one safetensors file."""
    with progress_bar(unit="B", shown=False) as bar:
        _write_safetensors(path, _outs(table, flat), _reader(flat), bar)


def _outs(table: list[Entry], flat: Mapping[str, jax.Array]) -> list[_Out]:
    outs = []
    for entry in table:
        leaf = flat[entry.path]
        for layer, name in enumerate(entry.torch_names(leaf.shape)):
            shape = entry.torch_shape(leaf.shape)
            outs.append(_Out(name, shape, np.dtype(leaf.dtype), entry, layer if entry.stacked else None))
    return outs


def _reader(flat: Mapping[str, jax.Array]) -> Callable[[_Out], np.ndarray]:
    """The function from a tensor to its values; one parameter at a time is on the host."""
    on_host: dict[str, np.ndarray] = {}

    def value(out: _Out) -> np.ndarray:
        if out.entry.path not in on_host:
            on_host.clear()
            on_host[out.entry.path] = np.asarray(flat[out.entry.path])
        whole = on_host[out.entry.path]
        part = whole if out.layer is None else whole[out.layer]
        return TRANSFORMS[out.entry.kind][1](part)

    return value


def _write_safetensors(path: Path, outs: list[_Out], value, bar) -> None:
    """One safetensors file, one tensor at a time; the library's writer needs all of them in memory at once."""
    kinds = {np.dtype(dtype): kind for kind, dtype in DTYPES.items()}
    header = {"__metadata__": {"format": "pt"}}
    offset = 0
    for out in outs:
        header[out.name] = {"dtype": kinds[out.dtype], "shape": out.shape, "data_offsets": [offset, offset + out.bytes]}
        offset += out.bytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for out in outs:
            file.write(np.ascontiguousarray(value(out)).reshape(-1).view(np.uint8).data)
            bar.update(out.bytes)


def write_extra(path: Path, extra: dict[str, Tensor]) -> None:
    """Tensors, unchanged, in one safetensors file."""
    outs = [_Out(name, tensor.shape, tensor.dtype) for name, tensor in extra.items()]
    with progress_bar(unit="B", shown=False) as bar:
        _write_safetensors(path, outs, lambda out: extra[out.name].read(), bar)

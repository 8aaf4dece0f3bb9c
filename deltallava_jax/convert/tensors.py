"""Tensors of a checkpoint on disk, by name: safetensors or torch .bin files, whole or in shards, read one at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes  # noqa: F401  numpy learns the name bfloat16, which safetensors asks it for
import numpy as np

DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32"}


class ConversionError(ValueError):
    """A checkpoint that cannot be converted; the message names the file or option and what was expected."""


@dataclass(frozen=True)
class Tensor:
    """Where a tensor lies. Each read opens the file anew, so nothing but what is asked for stays in memory."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype

    def read(self, index: tuple[slice, ...] = ()) -> np.ndarray:
        """The tensor, or the part of it at ``index``. Raises ConversionError if the file cannot be read."""
        if self.file.suffix != ".safetensors":
            value = _numpy(_load_bin(self.file)[self.name])
            return value[index] if index else value
        with _safetensors(self.file) as file:
            if not index:
                return file.get_tensor(self.name)
            return file.get_slice(self.name)[index]


def find(path: Path) -> dict[str, Tensor]:
    """Every tensor of a folder's checkpoint, or of one .safetensors or .bin file.

    Of a folder: model.safetensors or pytorch_model.bin, whole or sharded with an index, or LLaVA's mm_projector.bin.
    Raises ConversionError for a missing shard, a file cut short, a pickle that holds anything but tensors."""
    tensors: dict[str, Tensor] = {}
    for file in _files(path):
        tensors.update((tensor.name, tensor) for tensor in _tensors(file))
    return tensors


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = path / f"{name}.index.json"
        if index.is_file():
            try:
                names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            except (ValueError, KeyError, AttributeError) as error:
                raise ConversionError(f"{index} is not an index of shards: {error!r}") from error
            missing = [name for name in names if not (path / name).is_file()]
            if missing:
                raise ConversionError(
                    f"{path} lacks {', '.join(missing)} ({len(missing)} of {len(names)} shards that {index.name} names)"
                )
            return [path / name for name in names]
        if (path / name).is_file():
            return [path / name]
    if (path / "mm_projector.bin").is_file():
        return [path / "mm_projector.bin"]
    raise ConversionError(
        f"{path} holds no weights; expected model.safetensors, pytorch_model.bin, their shards, or mm_projector.bin"
    )


def _tensors(file: Path) -> Iterator[Tensor]:
    if file.suffix != ".safetensors":
        for name, value in _load_bin(file).items():
            yield Tensor(file, name, tuple(value.shape), _numpy(value[..., :0] if value.ndim else value).dtype)
        return
    with _safetensors(file) as opened:
        for name in opened.keys():
            part = opened.get_slice(name)
            if part.get_dtype() not in DTYPES:
                raise ConversionError(f"{file}: {name} is of type {part.get_dtype()}; known: {', '.join(DTYPES)}")
            yield Tensor(file, name, tuple(part.get_shape()), np.dtype(DTYPES[part.get_dtype()]))


def _safetensors(file: Path):
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, "numpy")
    except (SafetensorError, OSError) as error:
        raise ConversionError(f"{file} is cut short or no safetensors file: {error}") from error


def _load_bin(file: Path) -> dict:
    """A torch file's state dict, mapped into memory; only tensors are unpickled, never code."""
    try:
        import torch
    except ImportError as error:
        raise ConversionError(f"{file} is a PyTorch file; reading it needs torch: pip install torch") from error
    import pickle
    import zipfile

    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        raise ConversionError(f"{file} holds more than tensors and is refused (weights_only): {reason}") from error
    except (RuntimeError, OSError, EOFError, ValueError) as error:
        raise ConversionError(f"{file} cannot be read: {str(error).splitlines()[0]}") from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ConversionError(f"{file} is no state dict of names and tensors")
    return state


def _numpy(value) -> np.ndarray:
    import torch

    if value.dtype == torch.bfloat16:
        return value.contiguous().view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return value.detach().numpy()

"""Tensors of a checkpoint on disk, by name: safetensors or torch .bin files, whole or in shards, read one at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes  # also teaches numpy the name bfloat16, which safetensors asks it for
import numpy as np

from deltallava_jax.errors import ConversionError

DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32"}
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "non_lora_trainables.bin")


@dataclass(frozen=True)
class Tensor:
    """Where a tensor lies; offset: its first byte in a safetensors file.

    Each read opens the file anew, so nothing but what is asked for stays in memory."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int | None = None

    @property
    def bytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize

    def read(self, index: tuple[slice, ...] = ()) -> np.ndarray:
        """The tensor, or the part of it at ``index``. Raises ConversionError if the file cannot be read."""
        cuts = [cut.indices(size)[:2] for cut, size in zip(index, self.shape, strict=False)]
        out = np.empty([stop - start for start, stop in cuts] + list(self.shape[len(cuts) :]), self.dtype)
        self.read_into(out, index)
        return out

    def read_into(self, out: np.ndarray, index: tuple[slice, ...] = ()) -> None:
        """The tensor, or the part of it at ``index``, into an array of that shape. Whole rows of a safetensors file
        go straight from the file to the array."""
        rows = out.shape[1:] == self.shape[1:] and out.dtype == self.dtype and out.flags.c_contiguous
        if self.offset is None:
            out[...] = _numpy(_load_bin(self.file)[self.name])[index]
        elif not rows:
            with _safetensors(self.file) as file:
                out[...] = file.get_slice(self.name)[index] if index else file.get_tensor(self.name)
        else:
            with self.file.open("rb", buffering=0) as file:
                first = index[0].indices(self.shape[0])[0] if index else 0
                file.seek(self.offset + first * (self.bytes // max(self.shape[0], 1) if self.shape else 0))
                view, done = memoryview(out.reshape(-1).view(np.uint8)), 0
                while done < len(view):
                    count = file.readinto(view[done:])
                    if not count:
                        raise ConversionError(f"{self.file} is cut short: {self.name} ends beyond it")
                    done += count


def find(path: Path) -> dict[str, Tensor]:
    """Every tensor of a folder's checkpoint, or of one .safetensors or .bin file.

    Of a folder: model.safetensors or pytorch_model.bin, whole or sharded with an index, or LLaVA's mm_projector.bin.
    Raises ConversionError for a missing shard, a file cut short, a pickle that holds anything but tensors, shards of
    ZeRO-3, a LoRA adapter."""
    tensors: dict[str, Tensor] = {}
    for file in _files(path):
        tensors.update((tensor.name, tensor) for tensor in _tensors(file))
    empty = next((tensor for tensor in tensors.values() if 0 in tensor.shape), None)
    if empty is not None:
        name = f"{empty.file}: {empty.name}"
        raise ConversionError(
            f"{name} is of shape {list(empty.shape)}: saved under DeepSpeed ZeRO-3 without gathering "
            "its shards; gather them with DeepSpeed's zero_to_fp32.py in the run's folder, or train again with "
            "stage3_gather_16bit_weights_on_model_save"
        )
    if any(".lora_A." in name for name in tensors):
        raise _adapter(path)
    return tensors


def equal(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same numbers; some rows of them are in memory at a time."""
    if one.shape != other.shape:
        return False
    rows = max(1, 2**24 // max(one.bytes // max(one.shape[0], 1), 1))
    cuts = (slice(start, start + rows) for start in range(0, one.shape[0], rows))
    return all(np.array_equal(one.read((cut,)), other.read((cut,))) for cut in cuts)


def _adapter(path: Path) -> ConversionError:
    config = (path if path.is_dir() else path.parent) / "adapter_config.json"
    try:
        base = json.loads(config.read_text())["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        base = None
    return ConversionError(
        f"{path} is a LoRA adapter of {base or 'a base that it does not name'}, not a whole model: merge it into its "
        "base with peft's merge_and_unload() or LLaVA's scripts/merge_lora_weights.py, and give the merged folder"
    )


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = path / f"{name}.index.json"
        if index.is_file():
            try:
                names = sorted({str(Path(name)) for name in json.loads(index.read_text())["weight_map"].values()})
                if not names:
                    raise ValueError("it names none")
            except (ValueError, KeyError, AttributeError, TypeError) as error:
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
    if any((path / name).is_file() for name in ADAPTER_FILES):
        raise _adapter(path)
    raise ConversionError(
        f"{path} holds no weights; expected model.safetensors, pytorch_model.bin, their shards, or mm_projector.bin"
    )


def _tensors(file: Path) -> Iterator[Tensor]:
    if file.suffix != ".safetensors":
        for name, value in _load_bin(file).items():
            if str(value.dtype).removeprefix("torch.") not in DTYPES.values():
                raise ConversionError(f"{file}: {name} is of type {value.dtype}; known: {', '.join(DTYPES.values())}")
            yield Tensor(file, name, tuple(value.shape), _numpy(value[..., :0] if value.ndim else value).dtype)
        return
    with _safetensors(file):  # the library checks that the header is sound and the file complete
        pass
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
    header.pop("__metadata__", None)
    for name, about in header.items():
        if about["dtype"] not in DTYPES:
            raise ConversionError(f"{file}: {name} is of type {about['dtype']}; known: {', '.join(DTYPES)}")
        dtype, offset = np.dtype(DTYPES[about["dtype"]]), 8 + length + about["data_offsets"][0]
        yield Tensor(file, name, tuple(about["shape"]), dtype, offset)


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
        if any(words in str(error) for words in ("invalid load key", "truncated", "magic number", "ran out of")):
            raise ConversionError(f"{file} cannot be read: it is cut short or no torch file") from error
        raise ConversionError(f"{file} holds more than tensors and is refused: code may hide in it") from error
    except Exception as error:  # any kind: the bytes of another file are taken for instructions
        reason = (str(error).splitlines() or ["it is cut short"])[0]
        raise ConversionError(f"{file} cannot be read: {reason}") from error
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items()
    ):
        raise ConversionError(f"{file} is no state dict of names and tensors")
    return state


def _numpy(value) -> np.ndarray:
    import torch

    if value.dtype == torch.bfloat16:
        return value.contiguous().view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return value.detach().numpy()

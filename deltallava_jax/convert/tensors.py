"""A checkpoint's tensors on disk, by name: safetensors or torch .bin files, in shards or not, read one at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes  # also registers numpy's bfloat16, which safetensors needs
import numpy as np

from deltallava_jax.errors import ConversionError

DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32"}
ADAPTER_CONFIG, NON_LORA = "adapter_config.json", "non_lora_trainables.bin"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
ADAPTER_FILES = (ADAPTER_CONFIG, *ADAPTER_WEIGHTS, NON_LORA)
WHOLE = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True)
class Tensor:
    """The location of a tensor; offset: its first byte in a safetensors file.

    Each read opens the file again, so that memory holds only the tensors in use."""

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
        """Reads the tensor, or the part of it at ``index``, into an array of that shape, whole rows of a safetensors
        file without a copy."""
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
                view = memoryview(out.reshape(-1).view(np.uint8))
                done = 0
                while done < len(view):
                    count = file.readinto(view[done:])
                    if not count:
                        raise ConversionError(f"{self.file} is truncated: {self.name} ends beyond it")
                    done += count


def find(path: Path) -> dict[str, Tensor]:
    """Every tensor of a folder's checkpoint, or of one .safetensors or .bin file.

    A folder holds model.safetensors or pytorch_model.bin, whole or sharded with an index, or LLaVA's mm_projector.bin.
    Raises ConversionError for a missing shard, a truncated file, a pickle that holds anything but tensors, shards of
    ZeRO-3, a LoRA adapter."""
    if not path.exists():
        raise ConversionError(f"{path} does not exist")
    tensors = _found(_files(path))
    if any(".lora_A." in name for name in tensors):
        raise _adapter(path)
    return tensors


def is_adapter(path: Path) -> bool:
    """Whether a folder holds a LoRA adapter in the form of peft or LLaVA, and no whole weights beside it."""
    whole = any((path / f"{name}{end}").is_file() for name in WHOLE for end in ("", ".index.json"))
    weights = any((path / name).is_file() for name in ADAPTER_WEIGHTS)
    return (path / ADAPTER_CONFIG).is_file() and weights and not whole


def find_adapter(path: Path) -> dict[str, Tensor]:
    """Every tensor of an adapter's folder, without those of non_lora_trainables.bin. Raises as ``find`` does."""
    return _found([next(path / name for name in ADAPTER_WEIGHTS if (path / name).is_file())])


def _found(files: list[Path]) -> dict[str, Tensor]:
    tensors = {tensor.name: tensor for file in files for tensor in _tensors(file)}
    empty = next((tensor for tensor in tensors.values() if 0 in tensor.shape), None)
    if empty is not None:
        name = f"{empty.file}: {empty.name}"
        raise ConversionError(
            f"{name} has shape {list(empty.shape)}: it was saved under DeepSpeed ZeRO-3 without gathering its shards; "
            "gather them with DeepSpeed's zero_to_fp32.py in the run's folder, or train again with "
            "stage3_gather_16bit_weights_on_model_save"
        )
    return tensors


def equal(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same numbers, compared some rows at a time."""
    if one.shape != other.shape:
        return False
    rows = max(1, 2**24 // max(one.bytes // max(one.shape[0], 1), 1))
    cuts = (slice(start, start + rows) for start in range(0, one.shape[0], rows))
    return all(np.array_equal(one.read((cut,)), other.read((cut,))) for cut in cuts)


def _adapter(path: Path) -> ConversionError:
    folder = path if path.is_dir() else path.parent
    try:
        base = json.loads((folder / ADAPTER_CONFIG).read_text())["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        base = None
    what = f"{path} is a LoRA adapter of {base or 'an unnamed base model'}, not a whole model"
    if is_adapter(folder):
        return ConversionError(f"{what}: convert {folder} with --base and that model's folder")
    lacks = ADAPTER_CONFIG if not (folder / ADAPTER_CONFIG).is_file() else " or ".join(ADAPTER_WEIGHTS)
    return ConversionError(
        f"{what}, and it lacks {lacks}: convert its whole folder with --base and that model's folder"
    )


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    for name in WHOLE:
        index = path / f"{name}.index.json"
        if index.is_file():
            try:
                names = sorted({str(Path(name)) for name in json.loads(index.read_text())["weight_map"].values()})
                if not names:
                    raise ValueError("it lists no shards")
            except (ValueError, KeyError, AttributeError, TypeError) as error:
                raise ConversionError(f"{index} is not an index of shards: {error!r}") from error
            missing = [name for name in names if not (path / name).is_file()]
            if missing:
                raise ConversionError(
                    f"{path} lacks {', '.join(missing)} ({len(missing)} of the {len(names)} shards in {index.name})"
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
                raise ConversionError(f"{file}: {name} has dtype {value.dtype}; known: {', '.join(DTYPES.values())}")
            yield Tensor(file, name, tuple(value.shape), _numpy(value[..., :0] if value.ndim else value).dtype)
        return
    with _safetensors(file):  # the library validates the header and the file's length
        pass
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
    header.pop("__metadata__", None)
    for name, about in header.items():
        if about["dtype"] not in DTYPES:
            raise ConversionError(f"{file}: {name} has dtype {about['dtype']}; known: {', '.join(DTYPES)}")
        offset = 8 + length + about["data_offsets"][0]
        yield Tensor(file, name, tuple(about["shape"]), np.dtype(DTYPES[about["dtype"]]), offset)


def _safetensors(file: Path):
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, "numpy")
    except (SafetensorError, OSError) as error:
        raise ConversionError(f"{file} is truncated or not a safetensors file: {error}") from error


def _load_bin(file: Path) -> dict:
    """A torch file's state dict, memory-mapped; only tensors are unpickled, never code."""
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
            raise ConversionError(f"{file} cannot be read: it is truncated or not a torch file") from error
        raise ConversionError(f"{file} is refused: it holds more than tensors, which may be code") from error
    except Exception as error:  # of any type: the bytes of another file are interpreted as opcodes
        reason = (str(error).splitlines() or ["it is truncated"])[0]
        raise ConversionError(f"{file} cannot be read: {reason}") from error
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items()
    ):
        raise ConversionError(f"{file} is not a state dict of names and tensors")
    return state


def _numpy(value) -> np.ndarray:
    import torch

    if value.dtype == torch.bfloat16:
        return value.contiguous().view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return value.detach().numpy()

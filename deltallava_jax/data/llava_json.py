"""LLaVA's conversation files, JSON or JSONL, of any size: random access by the byte offsets of each record.

The file is memory-mapped and shared by all workers; the offsets are computed once and kept in the cache folder."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import posixpath
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from etils import epath

from deltallava_jax.data import cache
from deltallava_jax.data.records import Record, texts
from deltallava_jax.errors import BadSample, ConfigError
from deltallava_jax.progress import progress_bar

CHUNK = 2**25
QUOTE, OPEN, CLOSE, BACKSLASH = b'"{}\\'


def record_spans(data: np.ndarray, progress: Callable[[int], object] = lambda _: None) -> np.ndarray:
    """[n, 2] first byte and end of each object at the top level of a JSON list, or of JSONL; data: the bytes.

    progress is called with the size of each chunk that was read. Raises ValueError if the last object is truncated."""
    spans = []
    depth = 0  # number of open braces
    inside = 0  # 1 inside a string
    for offset in range(0, len(data), CHUNK):
        chunk = data[offset : offset + CHUNK]
        where = np.flatnonzero((chunk == QUOTE) | (chunk == OPEN) | (chunk == CLOSE)) + offset
        kinds = data[where]
        quotes = np.flatnonzero(kinds == QUOTE)
        keep = np.ones(len(where), bool)
        keep[quotes[_backslashes(data, where[quotes]) % 2 == 1]] = False  # escaped
        where, kinds = where[keep], kinds[keep]
        strings = (np.cumsum(kinds == QUOTE) + inside) % 2 == 1
        inside = int(strings[-1]) if len(strings) else inside
        braces = ~strings & (kinds != QUOTE)
        where = where[braces]
        steps = np.where(kinds[braces] == OPEN, 1, -1)
        level = np.cumsum(steps) + depth
        depth = int(level[-1]) if len(level) else depth
        spans.append(where[((steps == 1) & (level == 1)) | ((steps == -1) & (level == 0))])
        progress(len(chunk))
    if depth or inside:
        raise ValueError("the last record is incomplete")
    found = np.concatenate([np.zeros(0, np.int64), *spans]).reshape(-1, 2)
    found[:, 1] += 1
    return found


def _backslashes(data: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """The number of backslashes right before each offset."""
    count = np.zeros(len(offsets), np.int64)
    active = np.arange(len(offsets))
    while len(active):
        before = offsets[active] - count[active] - 1
        active = active[(before >= 0) & (data[np.maximum(before, 0)] == BACKSLASH)]
        count[active] += 1
    return count


class LlavaJson:
    """Records {"id", "image"?, "conversations"} of a file; images below the folder ``images``.

    fingerprint: of the file's content. Raises ConfigError for a file that is missing or not a list of records."""

    def __init__(self, file: str | Path, images: str | Path):
        self.file = str(file)
        self.images = str(images)
        local = self._local()
        if local.is_dir():
            raise ConfigError(f"data.json: {file} is a folder; expected a file (data.array_record takes a folder)")
        if not local.is_file():
            raise ConfigError(f"data.json: {file} does not exist")
        stat = local.stat()
        key = f"{local.resolve()} {stat.st_size} {stat.st_mtime_ns} {cache.version()}"
        self.index = cache.folder() / "records" / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.npz"
        if not self.index.is_file():
            self._make_index()
        with np.load(self.index) as index:
            self.fingerprint = str(index["fingerprint"])
        self._open()

    def _local(self) -> Path:
        """The file, or the copy of a remote one (gs://...) in the cache folder."""
        if "://" not in self.file:
            return Path(self.file)
        source = epath.Path(self.file)
        key = hashlib.sha256(f"{self.file} {source.stat().mtime}".encode()).hexdigest()[:24]
        copy = cache.folder() / "files" / f"{key}{source.suffix}"
        if not copy.is_file():
            with cache.writing(copy) as part:
                source.copy(part)
        return copy

    def _make_index(self) -> None:
        data = np.memmap(self._local(), np.uint8, "r") if self._local().stat().st_size else np.zeros(0, np.uint8)
        begins = bytes(data[:1024]).lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
        ends = bytes(data[-1024:]).rstrip()[-1:]
        if (begins, ends) not in ((b"[", b"]"), (b"{", b"}")):
            problem = "it is truncated" if begins in (b"[", b"{") else "it begins with neither [ nor {"
            raise ConfigError(f"data.json: {self.file} is neither a JSON list of records nor JSONL: {problem}")
        with progress_bar(what=f"indexing {Path(self.file).name}", total=len(data), unit="B") as bar:
            try:
                spans = record_spans(data, bar.update)
            except ValueError as error:
                raise ConfigError(f"data.json: {self.file} is truncated: {error}") from error
        digest = hashlib.blake2b(data, digest_size=16).hexdigest()
        with cache.writing(self.index) as part:
            np.savez(part, spans=spans, fingerprint=digest)

    def _open(self) -> None:
        with np.load(self.index) as index:
            self._spans = index["spans"]
        with self._local().open("rb") as file:
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def __getstate__(self):
        return {key: value for key, value in self.__dict__.items() if not key.startswith("_")}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._open()

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: int) -> Record:
        """Raises BadSample for a malformed record, one with a video, or an image outside the root."""
        start, end = self._spans[index]
        name = f"{Path(self.file).name}#{index}"
        try:
            record = json.loads(self._data[start:end])
        except (ValueError, RecursionError) as error:
            raise BadSample(f"{name}: {error}") from error
        key = None if record.get("id") is None else str(record["id"])
        name = f"{name} (id {key!r})"
        if record.get("video") or record.get("videos"):
            raise BadSample(f"{name} has a video; videos are not supported", "video")
        if record.get("images") and not record.get("image"):
            raise BadSample(f'{name} has "images"; expected "image", a path or a list of paths')
        images = record.get("image") or []
        images = [images] if isinstance(images, str) else images
        if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
            raise BadSample(f'{name}: "image" is {images!r}; expected a path or a list of paths')
        images = tuple(self._below(image, name) for image in images)
        return Record(name, images, record.get("conversations"), key)

    def _below(self, image: str, name: str):
        """The file of a path that is relative to the root, or absolute and below it. Symbolic links inside the root
        may lead anywhere."""
        path = image.replace("\\", "/")
        try:
            within = None if "\0" in path else _within(path, self.images)
        except ValueError:  # not a valid path
            within = None
        if within is None:
            raise BadSample(f"{name}: the image {image!r} lies outside the image root", "outside")
        return epath.Path(self.images).joinpath(*within)

    def texts(self) -> Iterator[str]:
        """All turns, one after the other."""
        return texts(self)


def _within(path: str, root: str) -> list[str] | None:
    """The parts of a path relative to the root, None for a path outside it."""
    parts = _parts(path)
    if not path.startswith("/") and "://" not in path:
        return None if parts[0] == ".." else parts
    roots = [(parts, _parts(root if "://" in root else os.path.abspath(root)))]
    if path.startswith("/") and "://" not in root:  # one of the two may contain a symbolic link
        real = _parts(os.path.realpath(root))
        roots += [(parts, real), (_parts(os.path.realpath(path)), real)]
    return next((own[len(front) :] for own, front in roots if own[: len(front)] == front), None)


def _parts(path: str) -> list[str]:
    return posixpath.normpath(path).rstrip("/").split("/")

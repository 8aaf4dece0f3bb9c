"""The cache folder: what is computed once for a data set, under a key that includes the version of the code."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import secrets
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path


def folder() -> Path:
    """$DELTALLAVA_CACHE, or ~/.cache/deltallava_jax."""
    return Path(os.environ.get("DELTALLAVA_CACHE", Path.home() / ".cache" / "deltallava_jax"))


@contextlib.contextmanager
def writing(file: Path) -> Iterator[Path]:
    """A temporary path beside ``file`` that replaces it when the block succeeds: atomic, even where several processes
    or hosts write the same file at once."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{secrets.token_hex(8)}.{file.name}")
    try:
        yield part
        part.rename(file)
    finally:
        part.unlink(missing_ok=True)


@functools.cache
def version(code: Path = Path(__file__).parent) -> str:
    """A digest of the code in a folder (this one) and of the version of the tokenizers library."""
    digest = hashlib.sha256(metadata.version("tokenizers").encode())
    for file in sorted(code.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()

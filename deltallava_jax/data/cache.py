"""Where what is counted once of a data set is kept, and by which code it was counted."""

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
    """A path beside ``file`` to write, which takes its place when the block ends well: whole, whichever processes of
    whichever hosts write the same file meanwhile."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{secrets.token_hex(8)}.{file.name}")
    try:
        yield part
        part.rename(file)
    finally:
        part.unlink(missing_ok=True)


@functools.cache
def version(code: Path = Path(__file__).parent) -> str:
    """Of the code in a folder, this one, and of the tokenizers library: what other code counted is counted again."""
    digest = hashlib.sha256(metadata.version("tokenizers").encode())
    for file in sorted(code.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()

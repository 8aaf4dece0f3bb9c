"""Where what is counted once of a data set is kept, and by which code it was counted."""

from __future__ import annotations

import functools
import hashlib
import os
from importlib import metadata
from pathlib import Path


def folder() -> Path:
    """$DELTALLAVA_CACHE, or ~/.cache/deltallava_jax."""
    return Path(os.environ.get("DELTALLAVA_CACHE", Path.home() / ".cache" / "deltallava_jax"))


@functools.cache
def version(code: Path = Path(__file__).parent) -> str:
    """Of the code in a folder, this one, and of the tokenizers library: what other code counted is counted again."""
    digest = hashlib.sha256(metadata.version("tokenizers").encode())
    for file in sorted(code.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()

"""The folder that a conversion writes, and the JSON in it.

Written under a temporary name and then renamed, so that an interrupted conversion never looks complete."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from deltallava_jax.errors import ConversionError


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which becomes ``path`` when the block succeeds and is removed otherwise.

    Raises ConversionError if ``path`` exists and is not an empty folder."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConversionError(f"{path} already exists; use a new folder, or remove it first")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConversionError(f"{path} cannot be created: {error}") from error
    work = Path(tempfile.mkdtemp(prefix=f".{path.name}-unfinished-", dir=path.parent))
    try:
        yield work
        work.chmod(0o755)
        if path.exists():
            path.rmdir()
        work.rename(path)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def write_json(path: Path, value) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")

"""Token lengths and image counts of all records, which the pack plan needs: measured once, kept by content."""

from __future__ import annotations

import hashlib
import os

import numpy as np

from deltallava_jax.data.conversation import Template, read_turns, text_pieces
from deltallava_jax.data.llava_json import cache_folder
from deltallava_jax.data.records import Source
from deltallava_jax.data.tokens import Tokenizer
from deltallava_jax.errors import BadSample
from deltallava_jax.progress import progress_bar

BATCH = 2000  # records whose texts are tokenized together, on all cores


def measure(source: Source, template: Template, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """(text tokens with one placeholder an image, images) of every record; (0, 0) for a broken one.

    Kept in the cache folder for a source with a ``fingerprint``, by it, the template and the tokenizer."""
    file = None
    if hasattr(source, "fingerprint"):
        key = "\n".join([source.fingerprint, repr(template), tokenizer.fingerprint])
        file = cache_folder() / "lengths" / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.npz"
        if file.is_file():
            with np.load(file) as kept:
                return kept["tokens"], kept["images"]
    counts = np.zeros((len(source), 2), np.int32)
    bar = progress_bar(what="measuring", total=len(source), unit="records")
    for start in range(0, len(source), BATCH):
        stop = min(start + BATCH, len(source))
        counts[start:stop] = _measure(source, start, stop, template, tokenizer)
        bar.update(stop - start)
    bar.close()
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{os.getpid()}.npz")
        np.savez(part, tokens=counts[:, 0], images=counts[:, 1])
        part.rename(file)
    return counts[:, 0], counts[:, 1]


def _measure(source: Source, start: int, stop: int, template: Template, tokenizer: Tokenizer) -> np.ndarray:
    """[stop - start, 2]"""
    pieces, owners = [], []
    counts = np.zeros((stop - start, 2), np.int32)
    for index in range(start, stop):
        try:
            record = source[index]
            own = text_pieces(read_turns(record.conversation, len(record.images)), template, tokenizer)
        except BadSample:
            continue
        counts[index - start] = len(own) - 1 + (tokenizer.bos is not None), len(own) - 1
        pieces += own
        owners += [index - start] * len(own)
    np.add.at(counts[:, 0], np.array(owners, np.int64), tokenizer.lengths(pieces))
    return counts

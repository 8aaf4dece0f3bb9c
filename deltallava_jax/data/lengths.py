"""Token lengths and image counts of all records, which the pack plan needs: measured once and cached by content."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass

import numpy as np

from deltallava_jax.data import cache
from deltallava_jax.data.conversation import NOTES, Conversation, Template, read_turns, text_pieces
from deltallava_jax.data.records import Record, Source
from deltallava_jax.data.tokens import Tokenizer
from deltallava_jax.errors import BadSample
from deltallava_jax.progress import progress_bar

BATCH = 2000  # records whose texts are tokenized together, on all cores


@dataclass(frozen=True)
class Lengths:
    """tokens [records]: text tokens, with one placeholder per image; images [records]; both 0 for a broken record.

    notes: the number of repairs of each kind of ``NOTES``."""

    tokens: np.ndarray
    images: np.ndarray
    notes: Counter


def read(source: Source, index: int) -> tuple[Record, Conversation]:
    """A record and its conversation. Raises BadSample, naming the record, if training cannot use it."""
    name = f"record {index}"
    try:
        record = source[index]
        name = record.id
        conversation = read_turns(record.conversation, len(record.images))
        if all(round.answer is None for round in conversation.rounds):
            raise BadSample("no question has an answer", "unsupervised")
    except BadSample as error:
        raise BadSample(f"{name}: {error}", error.kind) from error
    return record, conversation


def measure(source: Source, template: Template, tokenizer: Tokenizer) -> Lengths:
    """The lengths of all records. Those of a source with a ``fingerprint`` are cached by it, the template, the
    tokenizer and the version of this code."""
    file = None
    if hasattr(source, "fingerprint"):
        key = "\n".join([source.fingerprint, repr(template), tokenizer.fingerprint, cache.version()])
        file = cache.folder() / "lengths" / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.npz"
        if file.is_file():
            with np.load(file) as found:
                notes = Counter(dict(zip(NOTES, found["notes"].tolist(), strict=True)))
                cached = Lengths(found["tokens"], found["images"], notes)
            # With another image root, a record that was broken may be usable.
            if all(_is_broken(source, index) for index in np.flatnonzero(cached.tokens == 0)):
                return cached
    counts = np.zeros((len(source), 2), np.int32)
    notes = Counter()
    bar = progress_bar(what="measuring", total=len(source), unit="records")
    for start in range(0, len(source), BATCH):
        stop = min(start + BATCH, len(source))
        counts[start:stop] = _measure(source, start, stop, template, tokenizer, notes)
        bar.update(stop - start)
    bar.close()
    if file is not None:
        with cache.writing(file) as part:
            np.savez(part, tokens=counts[:, 0], images=counts[:, 1], notes=[notes[kind] for kind in NOTES])
    return Lengths(counts[:, 0], counts[:, 1], notes)


def _is_broken(source: Source, index: int) -> bool:
    try:
        read(source, index)
    except BadSample:
        return True
    return False


def _measure(
    source: Source, start: int, stop: int, template: Template, tokenizer: Tokenizer, notes: Counter
) -> np.ndarray:
    """[stop - start, 2]"""
    pieces = []
    owners = []  # the row of ``counts`` that each piece belongs to
    counts = np.zeros((stop - start, 2), np.int32)
    for index in range(start, stop):
        try:
            _, conversation = read(source, index)
        except BadSample:
            continue
        notes.update(conversation.notes)
        own = text_pieces(conversation, template, tokenizer)
        counts[index - start] = len(own) - 1 + (tokenizer.bos is not None), len(own) - 1
        pieces += own
        owners += [index - start] * len(own)
    np.add.at(counts[:, 0], np.array(owners, np.int64), tokenizer.lengths(pieces))
    return counts

"""What a LLaVA data set holds and what is wrong with it, before anything is trained on it."""

from __future__ import annotations

import multiprocessing
from collections import Counter
from dataclasses import dataclass

import numpy as np

from deltallava_jax.data.conversation import NOTES, Conversation
from deltallava_jax.data.images import size_of
from deltallava_jax.data.lengths import read
from deltallava_jax.data.packing import Plan
from deltallava_jax.data.records import Record, Source
from deltallava_jax.errors import FAULTS, BadSample
from deltallava_jax.progress import progress_bar

CHUNK = 64
LOSSES = (0.25, 0.5, 0.75)  # shares of a picture's area that a square crop cuts off
EDGES = (0, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)


def examine(source: Source, index: int, decode: bool = True) -> tuple[Record, Conversation, list[tuple[int, int]]]:
    """A record, its conversation and, where they are decoded, its images' (width, height).

    Raises BadSample, naming the record, for whatever keeps it from being trained on in rows of any length."""
    record, conversation = read(source, index)
    try:
        if decode:
            return record, conversation, [size_of(image) for image in record.images]
        for image in record.images:
            if not isinstance(image, bytes) and not image.exists():
                raise BadSample(f"image {image}: there is no such file", "missing")
        return record, conversation, []
    except BadSample as error:
        raise BadSample(f"{record.id}: {error}", error.kind) from error


@dataclass(frozen=True)
class _Look:
    source: Source
    decode: bool

    def __call__(self, index: int) -> tuple[BadSample | None, str | None, int, list[float]]:
        """(what is wrong with a record, its own id, its rounds, the share of each image that a square crop cuts)."""
        try:
            record, conversation, sizes = examine(self.source, index, self.decode)
        except BadSample as error:
            return error, None, 0, []
        return None, record.key, len(conversation.rounds), [1 - min(size) / max(size) for size in sizes]


def check(source: Source, plan: Plan, workers: int, *, decode: bool = True, examples: int = 5) -> dict:
    """The report on a data set and the plan that training would make of it (``Rows.plan``): counts, a histogram of text
    tokens, each kind of fault with its first examples, what is cut at the end or at the sides, ids that several records
    share.

    decode: read every image, not just look whether it is there."""
    found = dict(plan.faults)
    seen = Counter()
    ids = Counter()
    cropped = Counter()
    with (
        multiprocessing.get_context("spawn").Pool(max(1, workers)) as pool,
        progress_bar(what="checking", total=len(plan.records), unit="records") as bar,
    ):
        looked = pool.imap(_Look(source, decode), plan.records.tolist(), chunksize=CHUNK)
        for index, (fault, key, rounds, lost) in zip(plan.records.tolist(), looked, strict=True):
            bar.update()
            if fault is not None:
                found[index] = fault
                continue
            ids[key] += key is not None
            cropped.update(loss for share in lost for loss in LOSSES if share > loss)
            seen.update(rounds=rounds, cut=bool(plan.lengths[index] > plan.text_capacity[index]))
    usable = np.setdiff1d(plan.records, list(found))
    lengths, images = plan.lengths[usable], plan.images[usable]
    counts, _ = np.histogram(lengths, [*EDGES, np.inf])
    shared = {key: count for key, count in ids.items() if count > 1}
    faults = {kind: [] for kind in FAULTS}
    for index in sorted(found):
        faults[found[index].kind].append(str(found[index]))
    return {
        "records": len(plan.lengths),
        "usable": len(usable),
        "images": int(images.sum()),
        "rounds": seen["rounds"],
        "text_only": int((images == 0).sum()),
        "text_tokens": int(lengths.sum(dtype=np.int64)),
        "cut": seen["cut"],
        "cropped": {f"{loss:.0%}": cropped[loss] for loss in LOSSES},
        "notes": {kind: plan.notes[kind] for kind in NOTES},
        "faults": {kind: len(found) for kind, found in faults.items()},
        "examples": {kind: found[:examples] for kind, found in faults.items() if found},
        "duplicate_ids": len(shared),
        "duplicate_examples": list(shared)[:examples],
        "histogram": {str(edge): int(count) for edge, count in zip(EDGES, counts, strict=True)},
    }


def format_report(report: dict) -> str:
    """The report for people."""
    lines = [
        f"{report['records']:,} records, {report['usable']:,} usable: {report['images']:,} images, "
        f"{report['rounds']:,} rounds, {report['text_only']:,} without an image, {report['text_tokens']:,} text tokens",
        f"{report['cut']:,} are longer than the limit and will be cut; {report['duplicate_ids']:,} ids are shared",
        *(f"{count:,} {NOTES[kind]}" for kind, count in report["notes"].items() if count),
    ]
    if any(report["cropped"].values()):
        counts = ", ".join(f"{count:,} more than {loss}" for loss, count in report["cropped"].items())
        lines.append(
            f"pictures of {report['images']:,} that lose a part of their area with data.aspect=square: {counts}; "
            "--config.data.aspect=pad keeps them whole"
        )
    lines += ["", "text tokens     records"]
    most = max(report["histogram"].values()) or 1
    edges = [*report["histogram"], ""]
    for (edge, count), following in zip(report["histogram"].items(), edges[1:], strict=True):
        if count:
            label = f"{edge} to {following}" if following else f"{edge} and more"
            lines.append(f"{label:14} {count:9,}  {'#' * max(1, round(40 * count / most))}")
    broken = {kind: count for kind, count in report["faults"].items() if count}
    lines += ["", "left out:" if broken else "nothing is left out"]
    for kind, count in broken.items():
        lines += [f"{count:9,}  {FAULTS[kind]}", *(f"           {why}" for why in report["examples"][kind])]
    return "\n".join(lines)

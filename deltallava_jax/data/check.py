"""What a LLaVA data set holds and what is wrong with it, before anything is trained on it."""

from __future__ import annotations

import multiprocessing
from collections import Counter
from dataclasses import dataclass

import numpy as np

from deltallava_jax.data.conversation import Template, read_turns, tokenize
from deltallava_jax.data.images import load_image
from deltallava_jax.data.records import Source
from deltallava_jax.data.tokens import Tokenizer
from deltallava_jax.errors import FAULTS, BadSample
from deltallava_jax.progress import progress_bar

CHUNK = 64
EDGES = (0, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)


@dataclass(frozen=True)
class Checker:
    """limit: text tokens that a row holds. decode: read every image, not just look whether it is there."""

    source: Source
    template: Template
    tokenizer: Tokenizer
    limit: int
    decode: bool = True

    def __call__(self, index: int) -> dict:
        """What there is to say of a record: {"id", "tokens", "images", "rounds", "fault", "why", "cut"}."""
        found = {"id": None, "tokens": 0, "images": 0, "rounds": 0, "fault": None, "why": "", "cut": False}

        def bad(fault: str, why: str) -> dict:
            return found | {"fault": fault, "why": why}

        try:
            name = f"record {index}"
            record = self.source[index]
            name, found["id"] = record.id, record.key
            conversation = read_turns(record.conversation, len(record.images))
            tokenized = tokenize(conversation, self.template, self.tokenizer)
        except BadSample as error:
            why = str(error) if name in str(error) else f"{name}: {error}"
            return bad(error.kind, why)
        tokens, images = len(tokenized.ids), len(record.images)
        found |= {"tokens": tokens, "images": images, "rounds": len(conversation.rounds), "cut": tokens > self.limit}
        if (tokenized.image_positions >= self.limit).any():
            return bad("beyond", f"{record.id}: an image lies beyond {self.limit} text tokens")
        if not tokenized.loss_mask[: self.limit].any():
            return bad("unsupervised", f"{record.id}: no supervised token in its first {self.limit} tokens")
        for image in record.images:
            if not isinstance(image, bytes) and not image.exists():
                return bad("missing", f"{record.id}: image {image} is missing")
            try:
                if self.decode:
                    load_image(image, 8)
            except BadSample as error:
                return bad("unreadable", f"{record.id}: {error}")
        return found


def check(checker: Checker, workers: int, examples: int = 5) -> dict:
    """The report: counts, a histogram of text tokens, each kind of fault with its first examples, records cut at the
    limit, ids that several records share."""
    faults, seen, ids = {kind: [] for kind in FAULTS}, Counter(), Counter()
    lengths = []
    indices = range(len(checker.source))
    with (
        multiprocessing.get_context("spawn").Pool(max(1, workers)) as pool,
        progress_bar(what="checking", total=len(indices), unit="records") as bar,
    ):
        for found in pool.imap(checker, indices, chunksize=CHUNK):
            bar.update()
            ids[found["id"]] += found["id"] is not None
            if found["fault"]:
                faults[found["fault"]].append(found["why"])
                continue
            lengths.append(found["tokens"])
            seen.update(images=found["images"], rounds=found["rounds"], text_only=not found["images"], cut=found["cut"])
    counts, _ = np.histogram(lengths, [*EDGES, np.inf])
    shared = {key: count for key, count in ids.items() if count > 1}
    return {
        "records": len(indices),
        "usable": len(lengths),
        "images": seen["images"],
        "rounds": seen["rounds"],
        "text_only": seen["text_only"],
        "text_tokens": int(np.sum(lengths, dtype=np.int64)),
        "cut": seen["cut"],
        "faults": {kind: len(found) for kind, found in faults.items()},
        "examples": {kind: found[:examples] for kind, found in faults.items() if found},
        "duplicate_ids": len(shared),
        "duplicate_examples": list(shared)[:examples],
        "histogram": {str(edge): int(count) for edge, count in zip(EDGES, counts, strict=True)},
    }


def table(report: dict) -> str:
    """The report for people."""
    lines = [
        f"{report['records']:,} records, {report['usable']:,} usable: {report['images']:,} images, "
        f"{report['rounds']:,} rounds, {report['text_only']:,} without an image, {report['text_tokens']:,} text tokens",
        f"{report['cut']:,} are longer than the limit and will be cut; {report['duplicate_ids']:,} ids are shared",
        "",
        "text tokens     records",
    ]
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

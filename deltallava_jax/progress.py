"""How far long work is: a bar on a terminal; in a file a plain line now and then, and none where it is soon done."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from datetime import timedelta

from tqdm import tqdm

EVERY = 30.0  # seconds between two lines in a file


def progress_bar(
    items: Iterable | None = None,
    what: str = "",
    *,
    unit: str,
    total: int | None = None,
    start: int = 0,
    shown: bool = True,
    keep: bool = False,
) -> tqdm | Lines:
    """Counts work in ``unit``s (bytes: "B") on stderr: iterate over it where ``items`` are given, else call ``update``.

    start: what was done before. keep: the end of the work is told too, and stays on the terminal."""
    if shown and not sys.stderr.isatty():
        return Lines(items, what, unit, total, start, keep)
    return tqdm(
        items, what, total, initial=start, unit=unit if unit == "B" else f" {unit}", unit_scale=unit == "B",
        disable=not shown, leave=keep, dynamic_ncols=True,
    )  # fmt: skip


class Lines:
    """What is used of a tqdm bar, as lines of text."""

    def __init__(self, items: Iterable | None, what: str, unit: str, total: int | None, start: int, keep: bool):
        self._items, self._what, self._unit, self._keep = items, what, unit, keep
        self._total = len(items) if total is None and hasattr(items, "__len__") else total
        self._done = self._start = start
        self._began = self._told = time.monotonic()
        self._postfix, self._pending = "", False

    def __iter__(self) -> Iterator:
        for item in self._items:
            yield item
            self.update()
        self.close()

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def update(self, count: int = 1) -> None:
        self._done, self._pending = self._done + count, True
        if time.monotonic() - self._told >= EVERY:
            self._tell()

    def set_postfix_str(self, text: str, refresh: bool = False) -> None:
        """What else each line says."""
        self._postfix = text

    def write(self, line: str, file=None) -> None:
        print(line, file=file or sys.stderr, flush=True)

    def close(self) -> None:
        if self._keep and self._pending:
            self._tell()

    def _tell(self) -> None:
        scale, unit = (1e6, "MB") if self._unit == "B" else (1, self._unit)
        line = f"{self._what}: {self._done / scale:,.0f}"
        line += f" {unit}" if self._total is None else f" of {self._total / scale:,.0f} {unit}"
        line += f", {self._postfix}" if self._postfix else ""
        self._told, self._pending = time.monotonic(), False
        if self._total is not None and self._start < self._done < self._total:
            left = (self._told - self._began) / (self._done - self._start) * (self._total - self._done)
            line += f", {timedelta(seconds=round(left))} left"
        self.write(line)

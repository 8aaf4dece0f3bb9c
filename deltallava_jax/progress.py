"""Progress of long work: a bar on a terminal; in a log file a plain line now and then, and none for short work."""

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

    start: units done before. keep: also report the end of the work, and leave it on the terminal."""
    if shown and not sys.stderr.isatty():
        return Lines(items, what, unit, total, start, keep)
    return tqdm(
        items, what, total, initial=start, unit=unit if unit == "B" else f" {unit}", unit_scale=unit == "B",
        disable=not shown, leave=keep, dynamic_ncols=True,
    )  # fmt: skip


class Lines:
    """The used part of tqdm's interface, printing lines of text."""

    def __init__(self, items: Iterable | None, what: str, unit: str, total: int | None, start: int, keep: bool):
        self._items, self._what, self._unit, self._keep = items, what, unit, keep
        self._total = len(items) if total is None and hasattr(items, "__len__") else total
        self._done = self._start = start
        self._began = self._printed = time.monotonic()
        self._postfix = ""
        self._pending = False

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
        self._done += count
        self._pending = True
        if time.monotonic() - self._printed >= EVERY:
            self._print()

    def set_postfix_str(self, text: str, refresh: bool = False) -> None:
        """Sets a text that is appended to each line."""
        self._postfix = text

    def write(self, line: str, file=None) -> None:
        print(line, file=file or sys.stderr, flush=True)

    def close(self) -> None:
        if self._keep and self._pending:
            self._print()

    def _print(self) -> None:
        scale, unit = (1e6, "MB") if self._unit == "B" else (1, self._unit)
        line = f"{self._what}: {self._done / scale:,.0f}"
        line += f" {unit}" if self._total is None else f" of {self._total / scale:,.0f} {unit}"
        line += f", {self._postfix}" if self._postfix else ""
        self._printed = time.monotonic()
        self._pending = False
        if self._total is not None and self._start < self._done < self._total:
            left = (self._printed - self._began) / (self._done - self._start) * (self._total - self._done)
            line += f", {timedelta(seconds=round(left))} left"
        self.write(line)

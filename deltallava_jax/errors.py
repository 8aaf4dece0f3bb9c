"""Errors that a user can act on, all subclasses of ``UserError``: each message names the file, record, key or shape,
what was expected, and what to do. The command line prints it as one line and exits with 2."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable


class UserError(Exception):
    """The base of all errors below."""


class ConfigError(UserError, ValueError):
    """An invalid setting, option or argument."""


class ConversionError(UserError, ValueError):
    """A checkpoint in another format that cannot be read or written."""


class TokenizerError(UserError, ValueError):
    """A tokenizer that is missing or cannot be read."""


class WeightMismatch(UserError, ValueError):
    """Weights whose names or shapes are not those of the model."""


class CheckpointError(UserError, ValueError):
    """A checkpoint of a workdir that is missing, damaged or of a different model."""


class SaveFailed(CheckpointError):
    """A checkpoint could not be written."""


class NonFiniteLoss(UserError, RuntimeError):
    """The loss or a gradient is NaN or infinite at ``step``."""

    def __init__(self, message: str, step: int):
        super().__init__(message)
        self.step = step


class TooManyFaults(UserError, RuntimeError):
    """More than data.max_bad_fraction of the records are unusable."""


# Faults of records: kind -> its description in reports.
FAULTS = {
    "malformed": "malformed records or turns",
    "video": "records with a video",
    "outside": "images outside the image root",
    "markers": "records with more or fewer <image> markers than images",
    "missing": "missing images",
    "unreadable": "images that cannot be read",
    "beyond": "records with an image beyond the length limit, or more images than a row holds",
    "unsupervised": "records without a supervised token within the length limit",
}


def count_faults(kinds: Iterable[str]) -> str:
    """The number of faults of each kind, as a sentence part."""
    return ", ".join(f"{count:,} {FAULTS[kind]}" for kind, count in Counter(kinds).items())


class BadSample(UserError, ValueError):
    """An unusable record or image, which training leaves out and counts. kind: one of ``FAULTS``."""

    def __init__(self, message: str, kind: str = "malformed"):
        super().__init__(message, kind)
        assert kind in FAULTS, kind
        self.kind = kind

    def __str__(self) -> str:
        return self.args[0]


class RequestRefused(UserError):
    """A request that the server refuses, with the HTTP status of the refusal."""

    def __init__(self, status: int, message: str):
        super().__init__(status, message)
        self.status = status

    def __str__(self) -> str:
        return self.args[1]


class Busy(RequestRefused):
    """The server's queue is full."""

    def __init__(self, message: str):
        super().__init__(429, message)

    def __reduce__(self):
        return Busy, (str(self),)

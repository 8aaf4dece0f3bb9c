"""Errors that a user can act on, all below ``UserError``: each message names the file, record, key or shape, what was
expected, and what to do. The command line prints it as one line and exits with 2."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable


class UserError(Exception):
    """What every error below is."""


class ConfigError(UserError, ValueError):
    """A setting, option or argument that cannot work."""


class ConversionError(UserError, ValueError):
    """A checkpoint in another format that cannot be read or written."""


class TokenizerError(UserError, ValueError):
    """A tokenizer that is missing or cannot be read."""


class WeightMismatch(UserError, ValueError):
    """Weights whose names or shapes are not those of the model."""


class CheckpointError(UserError, ValueError):
    """A checkpoint of a workdir that is missing, damaged or of another model."""


class SaveFailed(CheckpointError):
    """A checkpoint could not be written."""


class NonFiniteLoss(UserError, RuntimeError):
    """The loss or a gradient is NaN or infinite at ``step``."""

    def __init__(self, message: str, step: int):
        super().__init__(message)
        self.step = step


class TooManyFaults(UserError, RuntimeError):
    """More of the records than data.max_bad_fraction cannot be used."""


# What can be wrong with a record: kind -> how reports name it.
FAULTS = {
    "malformed": "records or turns of another form",
    "video": "records with a video",
    "outside": "images outside the image root",
    "markers": "records with more or fewer <image> markers than images",
    "missing": "images that are missing",
    "unreadable": "images that cannot be read",
    "beyond": "records with an image beyond the length limit, or more images than a row holds",
    "unsupervised": "records without a supervised token in the length limit",
}


def count_faults(kinds: Iterable[str]) -> str:
    """How often each kind of fault came, in words."""
    return ", ".join(f"{count:,} {FAULTS[kind]}" for kind, count in Counter(kinds).items())


class BadSample(UserError, ValueError):
    """A record or an image that cannot be used; training leaves it out and counts it. kind: one of ``FAULTS``."""

    def __init__(self, message: str, kind: str = "malformed"):
        super().__init__(message, kind)
        assert kind in FAULTS, kind
        self.kind = kind

    def __str__(self) -> str:
        return self.args[0]


class RequestRefused(UserError):
    """A request that the server does not answer, with the HTTP status that says so."""

    def __init__(self, status: int, message: str):
        super().__init__(status, message)
        self.status = status

    def __str__(self) -> str:
        return self.args[1]


class Busy(RequestRefused):
    """As many requests as the server lets wait are waiting already."""

    def __init__(self, message: str):
        super().__init__(429, message)

    def __reduce__(self):
        return Busy, (str(self),)

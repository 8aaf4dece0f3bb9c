"""The checks that validate settings."""

from __future__ import annotations

import difflib
import re

from deltallava_jax.errors import ConfigError


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def require_at_least(least: int, section: str, config, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(value >= least, f"{section}.{name}={value}; expected {least} or more")


def require_positive(section: str, config, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(value > 0, f"{section}.{name}={value}; expected more than 0")


def nearest(key: str, known) -> str:
    """The end of an error message: the known name that is closest to ``key``, or all of them."""
    match = difflib.get_close_matches(key, list(known), n=1, cutoff=0.5)
    return f"; did you mean {match[0]!r}?" if match else f"; known: {', '.join(known) or 'none'}"


def require_pattern(name: str, pattern: str) -> None:
    """Raises ConfigError unless ``pattern`` is a regular expression."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"{name}: {pattern!r} is not a regular expression: {error}") from error

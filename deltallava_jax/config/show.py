"""Prints every setting of a configuration: its type, value, default if that differs, and description.

The description is the comment at the end of the setting's line in its dataclass, read from the source."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import io
import shutil
import textwrap
import tokenize
import typing
from pathlib import Path

from deltallava_jax.config.run import Config
from deltallava_jax.config.values import dataclass_in, load_config, override, type_name

INTRODUCTION = "Settings of {}; override with --config.KEY=VALUE. Values marked with * are not the default."


def show(path: str | Path, changes: dict[str, str] | None = None) -> str:
    """The settings of a configuration file with overrides, as wide as the terminal. Raises ConfigError."""
    width = max(40, shutil.get_terminal_size().columns)
    config = override(load_config(path), changes or {})
    lines = textwrap.wrap(INTRODUCTION.format(path), width)
    return "\n".join([*lines, "", *settings(config, width)])


def settings(config: Config, width: int) -> list[str]:
    """The lines, at most ``width`` wide: a section's settings first, then its subsections."""
    return _section("", type(config), config, width)


def _section(path: str, kind: type, values, width: int) -> list[str]:
    """values: the dataclass, or None if the section is off; then its defaults are listed."""
    hints = typing.get_type_hints(kind)
    about = comments(kind)
    lines, sections = [], []
    for field in dataclasses.fields(kind):
        key = f"{path}.{field.name}" if path else field.name
        default = _default(field)
        value = default if values is None else getattr(values, field.name)
        purpose = about.get(field.name, "")
        if part := dataclass_in(hints[field.name]):
            mark = "* " if (value is None) != (default is None) else ""
            heading = f"{mark}{key} = None: {purpose}" if value is None else f"{mark}{key}: {purpose}"
            sections += ["", *textwrap.wrap(heading, width, subsequent_indent="    ")]
            sections += _section(key, part if value is None else type(value), value, width)
        else:
            lines += _setting(key, type_name(hints[field.name]), value, default, purpose, width)
    return lines + sections


def _setting(key: str, kind: str, value, default, purpose: str, width: int) -> list[str]:
    if default is dataclasses.MISSING:
        text = f"{key}: {kind}" if value is default else f"{key}: {kind} = {value!r}"
    else:
        text = f"{key}: {kind} = {value!r}" + ("" if value == default else f" (default {default!r})")
    mark = "  " if value == default else "* "
    return [
        *textwrap.wrap(text, width, initial_indent=mark, subsequent_indent="    ", break_on_hyphens=False),
        *textwrap.wrap(purpose, width, initial_indent=" " * 6, subsequent_indent=" " * 6),
    ]


def _default(field: dataclasses.Field):
    """The default of a field, MISSING if there is none."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def comments(kind: type) -> dict[str, str]:
    """{field: the comment at the end of its line} of a dataclass and its base classes.

    Classes without source, e.g. in a user's configuration file, are skipped."""
    found = {}
    for owner in reversed(kind.__mro__):
        if dataclasses.is_dataclass(owner):
            try:
                source = inspect.getsource(owner)
            except (OSError, TypeError):
                continue
            found |= _comments_in(textwrap.dedent(source))
    return found


def _comments_in(source: str) -> dict[str, str]:
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    at = {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
    (cls,) = ast.parse(source).body
    fields = [node for node in cls.body if isinstance(node, ast.AnnAssign)]
    return {node.target.id: at[node.end_lineno] for node in fields if node.end_lineno in at}

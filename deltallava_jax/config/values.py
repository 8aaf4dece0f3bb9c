"""Configs from and to dicts, command-line text and Python files."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import difflib
import importlib.util
import inspect
import json
import math
import sys
import traceback
import types
import typing
import warnings
from collections.abc import Iterator
from pathlib import Path

from deltallava_jax.config.checks import nearest, require
from deltallava_jax.config.presets import preset
from deltallava_jax.config.run import Config
from deltallava_jax.config.systems import DEFAULT, ProjectorConfig, owners, settings_of, system, validate_settings
from deltallava_jax.errors import ConfigError, UserError


def to_dict(config) -> dict:
    """Nested plain dict; tuples become lists, so that it is JSON."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(kind: type, values: dict | str, where: str = ""):
    """Builds dataclass ``kind`` from a nested dict (or a preset's name), validating every key and type.

    Raises ConfigError for an unknown key (with the nearest known one) or a value of another type. A projector's dict
    holds its system's settings; None stands for the published value."""
    if isinstance(values, str):
        return preset(kind, values)
    if kind is ProjectorConfig:
        name = values.get("name", DEFAULT)
        require(isinstance(name, str), f"config key '{where}name' expects str, got {_shown(name)}")
        validate_settings(name, values, where)
        kind = system(name).Config
        values = {key: value for key, value in values.items() if value is not None}
    hints = typing.get_type_hints(kind)
    arguments = {}
    for key, value in values.items():
        path = f"{where}{key}"
        if key not in hints:
            raise ConfigError(f"unknown config key {path!r}{nearest(key, hints)}")
        arguments[key] = _typed(hints[key], value, path)
    required = [f.name for f in dataclasses.fields(kind) if f.default is f.default_factory is dataclasses.MISSING]
    missing = [f"{where}{name}" for name in required if name not in arguments]
    require(not missing, f"config lacks {', '.join(missing)}")
    return kind(**arguments)


def override(config, assignments: dict[str, str]):
    """Copy of ``config`` with dotted paths set from command-line text, all at once, then validated.

    With another projector name, settings with the old system's published values take the new system's."""
    values = to_dict(config)
    for path in sorted(assignments, key=lambda path: not path.endswith("projector.name")):  # projector.name first
        text = assignments[path]
        node = values
        kind = type(config)
        done = ""
        *parents, leaf = path.split(".")
        for key in parents:
            hints = typing.get_type_hints(kind)
            sections = {name: section for name, hint in hints.items() if (section := dataclass_in(hint))}
            if key not in sections:
                raise ConfigError(f"unknown config section {done + key!r}{nearest(key, sections)}")
            if isinstance(node[key], str):  # a preset set earlier in the same command
                node[key] = to_dict(preset(sections[key], node[key]))
            if node[key] is None and kind.__dataclass_fields__[key].default is None:  # a part that is off by default
                node[key] = {}
            require(isinstance(node[key], dict), f"config section {done + key!r} is {node[key]!r}")
            node, kind, done = node[key], sections[key], f"{done}{key}."
        if kind is ProjectorConfig:
            if leaf == "name":
                system(text)
                values_of_new = _carried(node, text)
                node.clear()
                node.update(values_of_new)
                continue
            name = node.get("name", DEFAULT)
            validate_settings(name, {leaf: None}, done)
            kind = system(name).Config
        hints = typing.get_type_hints(kind)
        if leaf not in hints:
            raise ConfigError(f"unknown config key {path!r}{nearest(leaf, hints)}")
        node[leaf] = text if hints[leaf] is str else parse_value(text)
    return from_dict(type(config), values)


def renamed(config: ProjectorConfig, settings: dict) -> ProjectorConfig:
    """The projector with other settings; another name acts as in ``override``. Raises ConfigError."""
    values = to_dict(config)
    if "name" in settings:
        values = _carried(values, settings["name"])
    return from_dict(ProjectorConfig, values | settings, "projector.")


def _carried(values: dict, name: str) -> dict:
    """A projector's dict under another system's name: shared settings that differ from the old system's published
    values are kept."""
    old = system(values.get("name", DEFAULT)).Config
    plain = lambda value: tuple(value) if isinstance(value, list) else value
    published = old.published(values.get("grid", 0))
    sizes = ("grid", "in_width", "out_width")
    own = {key: value for key, value in values.items() if key in sizes or plain(value) != published.get(key)}
    return settings_of(name, own) | {"name": name}


def drop_foreign(values: dict, where: str) -> dict:
    """A projector's dict of an earlier version, which has the settings of every system, reduced to its own system's.

    Warns once of dropped settings that are not those systems' defaults. where: the file, for the warning."""
    name = values.get("name", DEFAULT)
    own = settings_of(name, values)
    foreign = {key: owners(key) for key in values if key not in own}
    lost = [key for key, systems in foreign.items() if systems and not _is_default(key, values[key], systems)]
    if lost:
        listed = ", ".join(f"{key}={_shown(values[key])} ({', '.join(foreign[key])})" for key in lost)
        warnings.warn(f"{where}: settings of other systems than {name} are ignored: {listed}", stacklevel=2)
    return {key: value for key, value in values.items() if not foreign.get(key)}


def _is_default(key: str, value, systems: list[str]) -> bool:
    """Whether the value is None, or one of the systems' defaults."""
    plain = tuple(value) if isinstance(value, list) else value
    return value is None or any(plain == system(name).Config.__dataclass_fields__[key].default for name in systems)


def differences(now: dict, before: dict, where: str = "") -> Iterator[tuple[str, object, object]]:
    """(dotted key, value now, value before) of each setting that differs between two configurations; names first."""
    for key in sorted({**now, **before}, key=lambda key: (key != "name", key)):
        one, other = now.get(key), before.get(key)
        if isinstance(one, dict) and isinstance(other, dict):
            yield from differences(one, other, f"{where}{key}.")
        elif one != other:
            yield f"{where}{key}", one, other


def workdir_config(workdir: Path) -> Config:
    """The config of a workdir of train.py or convert."""
    path = workdir / "config.json"
    if not path.is_file():
        raise ConfigError(f"{workdir} holds no config.json; expected a workdir of train.py or convert")
    values = read_json(path)
    model = values.get("model")
    if isinstance(model, dict) and isinstance(model.get("projector"), dict):
        model["projector"] = drop_foreign(model["projector"], str(path))
    return from_dict(Config, values)


def read_json(path: Path) -> dict:
    """The object in a JSON file. Raises ConfigError if the file is missing, cannot be read or holds something else."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    require(isinstance(value, dict), f"{path} holds a {type(value).__name__}, expected an object")
    return value


# The repository's configurations: inside an installed package, beside the package in a checkout.
_PACKAGE = Path(__file__).parents[1]
CONFIGS = folder if (folder := _PACKAGE / "configs").is_dir() else _PACKAGE.parent / "configs"


def load_config(path: str | Path) -> Config:
    """The Config that get_config() of a Python file returns, or get_config(ARGUMENT) for "FILE:ARGUMENT".

    If the file does not exist, the repository's configuration of that name: "easy_vqa", "llava:mqt-pretrain"."""
    path = Path(path)
    arguments = []
    if not path.is_file() and ":" in path.name:
        name, argument = path.name.rsplit(":", 1)
        require(argument, f"config {str(path)!r} has nothing after its colon; expected FILE or FILE:SYSTEM-STAGE")
        path = path.with_name(name)
        arguments = [argument]
    if not path.is_file():
        path = _shipped(path, arguments)
    _find_bases(path)
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    if spec is None:
        raise ConfigError(f"config file {str(path)!r} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    with _in_file(path):
        spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ConfigError(f"config file {str(path)!r} has no get_config()")
    try:
        inspect.signature(module.get_config).bind(*arguments)
    except TypeError as error:
        raise ConfigError(f"config file {str(path)!r}: get_config({', '.join(arguments)}): {error}") from error
    with _in_file(path):
        config = module.get_config(*arguments)
    require(isinstance(config, Config), f"config file {str(path)!r}: get_config() did not return a Config")
    return config


_LARGEST = 2**63 - 1


@contextlib.contextmanager
def _in_file(path: Path):
    """Turns any exception of the user's code into ConfigError with the line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        *_, last = traceback.extract_tb(error.__traceback__)
        where = f", line {last.lineno}" if last.filename == str(path) else ""
        raise ConfigError(f"config file {str(path)!r}{where}: {type(error).__name__}: {error}") from error


# Folders of version 0.1.0, with one file per system -> the file whose table replaces them.
_TABLES = {"systems": "configs/easy_vqa.py", "llava_systems": "configs/llava.py"}


def _shipped(path: Path, arguments: list[str]) -> Path:
    """The repository's configuration of that name. Raises ConfigError with the nearest name."""
    if path.parent.name in _TABLES:
        new = f"{_TABLES[path.parent.name]}:{'-'.join([path.stem, *arguments])}"
        raise ConfigError(f"config file {str(path)!r} does not exist; use {new}")
    name = path.with_suffix("").as_posix().removeprefix("configs/")
    known = {file.relative_to(CONFIGS).with_suffix("").as_posix(): file for file in sorted(CONFIGS.rglob("*.py"))}
    if name not in known or path.suffix not in ("", ".py"):
        hint = nearest(name, known) if difflib.get_close_matches(name, known, cutoff=0.5) else ""
        raise ConfigError(f"config file {str(path)!r} does not exist{hint}")
    return known[name]


def _find_bases(path: Path) -> None:
    """Lets a configuration import its bases as ``configs.NAME``: from a parent folder named ``configs``, else from the
    repository's."""
    own = [str(folder) for folder in path.resolve().parents if folder.name == "configs"]
    configs = sys.modules.setdefault("configs", types.ModuleType("configs"))
    configs.__path__ = list(dict.fromkeys([*own, *getattr(configs, "__path__", []), str(CONFIGS)]))


def dataclass_in(hint) -> type | None:
    """The dataclass in a type hint ``X`` or ``X | None``."""
    return next((option for option in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(option)), None)


def parse_value(text: str):
    """The Python literal that the text is (true and false too), else the text itself."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return text


def _typed(hint, value, path: str):
    """``value`` as type ``hint`` (a dataclass, a scalar, a tuple[X, ...] or a union of those)."""
    if dataclasses.is_dataclass(hint):
        if isinstance(value, (dict, str)):
            return from_dict(hint, value, f"{path}.")
    elif isinstance(hint, types.UnionType):
        if value is not None and dataclass_in(hint):  # X | None: raise the error of X
            return _typed(dataclass_in(hint), value, path)
        for option in typing.get_args(hint):
            try:
                return _typed(option, value, path)
            except ConfigError:
                continue
    elif typing.get_origin(hint) is tuple:
        value = list(value.items()) if isinstance(value, dict) else value  # pairs in their order
        if isinstance(value, (list, tuple)):
            return tuple(_typed(typing.get_args(hint)[0], item, path) for item in value)
        if typing.get_args(hint)[0] is str and isinstance(value, str):
            return (value,)
    elif hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        require(math.isfinite(value) if isinstance(value, float) else abs(value) <= _LARGEST, _too_large(path, value))
        return float(value)
    elif isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        require(hint is not int or abs(value) <= _LARGEST, _too_large(path, value))
        return value
    raise ConfigError(f"config key {path!r} expects {type_name(hint)}, got {_shown(value)}")


def type_name(hint) -> str:
    """The name of a type, as in source code."""
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)


def _shown(value) -> str:
    """A value for an error message, abbreviated if long."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:40]}...{text[-40:]}"


def _too_large(path: str, value: int | float) -> str:
    return f"config key {path!r} is {_shown(value)}; expected a finite number, at most {_LARGEST:.2g}"

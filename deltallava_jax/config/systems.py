"""The systems by name: everything that can stand between the tower and the decoder.

A system is one class in one file of models/systems, with its settings, and a line here. The line is text and the file
is imported when the system is first asked for: configurations stay below the models that they describe.
"""

from __future__ import annotations

import dataclasses
import importlib
from dataclasses import dataclass

from deltallava_jax.config.checks import nearest, require, require_at_least
from deltallava_jax.errors import ConfigError


@dataclass(frozen=True)
class ProjectorConfig:
    """What every system between tower and decoder has. Each adds its own settings in a subclass beside it
    (models/systems), whose defaults are the published ones; ``system_config`` makes it by the system's name."""

    name: str = ""  # of the system; with another name alone its settings are as published with it
    grid: int = 24  # patches a side of the tower's output
    in_width: int = 1024  # the tower's width
    out_width: int = 4096  # the decoder's width
    select_layer: int = -2  # the tower's hidden state that is read, from the end: -1 is the last

    def __post_init__(self):
        own = type(self).name
        require(
            self.name == own,
            f"projector.name is {self.name!r} in the settings of {own or 'no system'}; system_config makes a system's",
        )
        require_at_least(1, "projector", self, "grid", "in_width", "out_width")
        require(self.select_layer < 0, f"projector.select_layer={self.select_layer}; expected -1, the last, or below")

    @classmethod
    def published(cls, grid: int) -> dict:
        """{setting: value} as published with the system, for a grid of that many patches a side."""
        return {setting.name: setting.default for setting in dataclasses.fields(cls)}

    def validate_tower(self, layers: int) -> None:
        """ConfigError where a tower of that many layers has not what is read of it."""
        require(
            -layers <= self.select_layer <= -1,
            f"projector.select_layer={self.select_layer}; expected -{layers} to -1 for {layers} layers",
        )


HOME = "deltallava_jax.models.systems"
DEFAULT = "delta"
SYSTEMS: dict[str, str | type] = {
    "delta": "delta.Delta",
    "mlp": "mlp.Mlp",
    "token_packer": "token_packer.TokenPacker",
    "m3": "m3.M3",
    "mqt": "mqt.Mqt",
    "quecc": "quecc.Quecc",
    "resampler": "resampler.Resampler",
    "honeybee_c": "honeybee_c.HoneybeeC",
    "honeybee_d": "honeybee_d.HoneybeeD",
    "prumerge": "prumerge.PruMerge",
    "prumerge_plus": "prumerge.PruMergePlus",
    "fastervlm": "fastervlm.FasterVlm",
    "evit": "evit.Evit",
    "dynamicvit": "dynamicvit.DynamicVit",
    "average_pooling": "average_pooling.AveragePooling",
    "random": "random.Random",
}


def register(name: str, system: type) -> None:
    """Adds a system from outside of the package, e.g. from a configuration file.

    Raises ConfigError for a taken name."""
    require(SYSTEMS.get(name, system) is system, f"there is a system {name!r} already")
    SYSTEMS[name] = system


def system(name: str) -> type:
    """The class of a system (models/systems/base.py). Raises ConfigError with the nearest name for an unknown one."""
    if name not in SYSTEMS:
        raise ConfigError(f"projector.name is {name!r}{nearest(name, SYSTEMS)}")
    found = SYSTEMS[name]
    if isinstance(found, str):
        module, _, kind = found.partition(".")
        found = getattr(importlib.import_module(f"{HOME}.{module}"), kind)
    return found


def settings_of(name: str, settings: dict) -> dict:
    """Those of the settings that a system has."""
    return {key: value for key, value in settings.items() if key in system(name).Config.__dataclass_fields__}


def owners(key: str) -> list[str]:
    """The systems that have a setting, by name."""
    return [name for name in SYSTEMS if settings_of(name, {key: None})]


def validate_settings(name: str, settings: dict, where: str = "projector.") -> None:
    """ConfigError for a setting that the system does not have: who has it, or the nearest that it has."""
    known = system(name).Config.__dataclass_fields__
    for key in settings:
        if key not in known:
            others = owners(key)
            hint = f"; it is a setting of {', '.join(others)}" if others else nearest(key, known)
            raise ConfigError(f"unknown config key {where + key!r} of {name}{hint}")


def system_config(name: str = DEFAULT, **settings) -> ProjectorConfig:
    """The settings of a system: those that are not given are as published with it.

    Raises ConfigError for an unknown system, a setting that it does not have, and a value that cannot be."""
    validate_settings(name, settings)
    return system(name).Config(**settings)

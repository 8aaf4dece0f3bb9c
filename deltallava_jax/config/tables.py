"""Resolves FILE:SYSTEM and FILE:SYSTEM-STAGE to an entry of a configuration file's table of systems."""

from __future__ import annotations

from collections.abc import Collection

from deltallava_jax.config.checks import nearest
from deltallava_jax.errors import ConfigError

STAGES = ("pretrain", "finetune")


def entry(system: str, systems: dict[str, dict]) -> dict:
    """A system's entry. Raises ConfigError with the nearest name and all known names."""
    _require_known("system", system, systems)
    return systems[system]


def system_and_stage(which: str, systems: dict[str, dict]) -> tuple[str, str]:
    """(system, stage) of "SYSTEM-STAGE", of "SYSTEM" (finetune), or of "STAGE" (the table's first system).

    Raises ConfigError with the nearest name and all known names."""
    if which in STAGES:
        return next(iter(systems)), which
    system, dash, stage = which.partition("-")
    if not dash:
        stage = "finetune"
        _require_known("system or stage", system, [*systems, *STAGES])
    _require_known("system", system, systems)
    _require_known("stage", stage, STAGES)
    return system, stage


def _require_known(kind: str, name: str, known: Collection[str]) -> None:
    if name not in known:
        all_known = f"; known: {', '.join(known)}"
        hint = nearest(name, known).removesuffix(all_known)
        raise ConfigError(f"no {kind} {name!r}{hint}{all_known}")

"""The cost of a run on a machine that is not there: the step that train.py runs, compiled for the machine.

    python -m deltallava_jax plan --config configs/finetune_7b.py --target h100:8
    python -m deltallava_jax plan --config configs/finetune_7b.py --target v5e:4x4 --mesh data=2,fsdp=8 \\
        --config.data.rows=32 --json

    python -m deltallava_jax plan --config configs/finetune_7b.py --target a100:8 --memory 40 --best

Targets: cpu:8, v5e:4x4, v5p:2x2x2, v6e:4x4, h100:8, h100:2x8 (hosts x GPUs), and a100, h200, b200, l40s, rtx4090 as
h100. TPUs need libtpu (requirements-plan.txt), GPUs JAX's CUDA plugin ('jax[cuda13]'); neither needs the hardware.
Prints the memory of a device against its capacity, operations, collectives, an estimate of the step's time with its
parts and its dearest operations, and, if it does not fit, the nearest setting that does. With remat=auto: also every
policy of recomputation, and which one is chosen. --best looks for the fastest setting instead, over mesh,
recomputation, accumulation and attention.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from dataclasses import replace

from deltallava_jax import cli
from deltallava_jax.analysis.plan_report import format_plan
from deltallava_jax.analysis.targets import Target, parse_target, prepare
from deltallava_jax.config import Config, MeshConfig, load_config, override
from deltallava_jax.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, help="a Python file with get_config(), as for train.py")
    parser.add_argument("--target", required=True, help="the machine: KIND:SHAPE")
    parser.add_argument("--mesh", default="", metavar="data=1,fsdp=8", help="instead of the configuration's mesh")
    parser.add_argument("--text", type=int, default=0, metavar="N", help="approximate tokens of text per image")
    parser.add_argument("--memory", type=float, default=0, metavar="GIB", help="of a device, instead of the target's")
    parser.add_argument("--best", action="store_true", help="look for the fastest setting that fits")
    parser.add_argument("--tries", type=int, default=0, metavar="N", help="with --best: settings to compile at most")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--config.SECTION.KEY", metavar="VALUE", help="overrides a setting; may be repeated")
    parser.set_defaults(overrides=[])


def main(options: argparse.Namespace) -> None:
    target = parse_target(options.target, options.memory)
    cfg = override(load_config(options.config), cli.overrides(options.overrides, f"{cli.program()} plan"))
    if options.mesh:
        cfg = replace(cfg, mesh=parse_mesh(options.mesh))
    if options.text < 0:
        raise ConfigError(f"--text {options.text}: expected a number of tokens, 0 or more")
    if options.tries < 0 or (options.tries and not options.best):
        raise ConfigError(f"--tries {options.tries}: expected 1 or more settings to compile, with --best")
    cfg.validate_devices(target.count)
    prepare(target)
    if options.best:
        from deltallava_jax.analysis import best

        found = best.measure(cfg, target, options.text, options.tries or best.TRIES)
        print(json.dumps(found, indent=2) if options.json else best.format_best(found))
        return
    from deltallava_jax.analysis.plan import measure

    plan = measure(cfg, target, options.text)
    if not plan["fits"]:
        plan["nearest"] = nearest(cfg, target, plan, options.text)
    print(json.dumps(plan, indent=2) if options.json else format_plan(plan))


def parse_mesh(text: str) -> MeshConfig:
    """ "data=1,fsdp=8" -> MeshConfig; axes that are not named keep its defaults."""
    axes = {}
    for part in text.split(","):
        name, _, count = part.partition("=")
        if name not in ("data", "fsdp", "tensor") or not re.fullmatch(r"-?\d+", count):
            raise ConfigError(f"--mesh {text}: expected axes of data, fsdp and tensor with their sizes: data=1,fsdp=8")
        axes[name] = int(count)
    return MeshConfig(**axes)


def nearest(cfg: Config, target: Target, plan: dict, text: int) -> dict | None:
    """The first of the neighbouring settings that fits when compiled: what to change, and its memory."""
    from deltallava_jax.analysis.plan import measure

    for change, other, machine in candidates(cfg, target, plan):
        cli.log(f"does not fit; trying {change}")
        tried = measure(other, machine, text)
        if tried["fits"]:
            return dict(change=change, target=str(machine), per_device=tried["per_device"])
    return None


def candidates(cfg: Config, target: Target, plan: dict) -> Iterator[tuple[str, Config, Target]]:
    """(change, configuration, target), the least change first: recomputing, microbatches, sharding, devices."""
    sharded = replace(cfg, mesh=MeshConfig(data=1, fsdp=-1))
    fixed = plan["per_device"]["total_bytes"] - plan["per_device"]["activation_bytes"]
    if fixed < plan["per_device"]["capacity_bytes"]:  # otherwise smaller activations do not suffice
        change = ""
        cfg = replace(cfg, model=replace(cfg.model, remat=plan["remat"]))  # of "auto" what was chosen
        if plan["remat"] != "full":
            cfg = replace(cfg, model=replace(cfg.model, remat="full"))
            change = "--config.model.remat=full"
            yield change, cfg, target
        data, fsdp, _ = cfg.mesh.sizes(target.count)
        whole = cfg.data.rows // (data * fsdp)  # microbatches of a row a device
        for parts in (n for n in (2, 4, 8) if n > cfg.optimizer.accumulation and whole % n == 0):
            fewer = replace(cfg, optimizer=replace(cfg.optimizer, accumulation=parts))
            yield f"{change} --config.optimizer.accumulation={parts}".strip(), fewer, target
    if cfg.mesh.sizes(target.count) != sharded.mesh.sizes(target.count):
        yield "--mesh data=1,fsdp=-1", sharded, target
    larger = target
    for _ in range(3):
        larger = larger.larger()
        rows = -(-cfg.data.rows // larger.count) * larger.count
        other = replace(cfg, data=replace(cfg.data, rows=rows), mesh=MeshConfig(data=1, fsdp=-1))
        yield f"--target {larger} --mesh data=1,fsdp=-1 --config.data.rows={rows}", other, larger

"""The collectives of a compiled program, their counts and bytes.

A collective in a loop's body counts once for each of the loop's iterations, loops within loops multiplied. Bytes are
those of the collective's result on one device. An asynchronous pair (-start and -done) is one collective; so is one
that the TPU compiler spreads over several fusions to overlap it with other work.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from dataclasses import dataclass

from deltallava_jax.analysis.hlo import Computation, Instruction, Program, elements, parse, root, size

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
         "collective-broadcast")  # fmt: skip


@dataclass(frozen=True)
class Collective:
    """kind: of KINDS. count: how often a step runs it. bytes: of one result on one device. group: devices that take
    part together. source: the operation of the model that it belongs to."""

    kind: str
    count: int
    bytes: int
    group: int
    source: str


def collectives(program: str | Program, devices: int) -> list[Collective]:
    """The collectives of a program, those that move most bytes first.

    program: ``compiled.as_text()``, or parsed. devices: of the program, the group of a collective that states none."""
    program = parse(program) if isinstance(program, str) else program
    found, spread = [], {}
    for name, count in program.runs().items():
        computation = program.computations.get(name, {})
        for each in computation.values():
            one = collective(each, name, computation, count, devices)
            if one is None:
                continue
            key = chain(each)
            if key is None:
                found.append(one)
            # Parts of one collective: it runs as often as the part outside of the innermost loop.
            elif key not in spread or one.count < spread[key].count:
                spread[key] = one
    return sorted([*found, *spread.values()], key=lambda c: -c.count * c.bytes)


def collective(each: Instruction, name: str, computation: Computation, count: int, devices: int) -> Collective | None:
    """The collective that an instruction of a computation is or starts; None for any other instruction."""
    kind = each.opcode.removesuffix("-start")
    if kind not in KINDS:
        return None
    moved = size(_result(each))
    if kind == "all-reduce" and name.startswith("all-reduce-scatter"):  # how the TPU compiler writes a reduce-scatter
        kind, moved = "reduce-scatter", size(root(computation).shape)
    return Collective(kind, count, moved, _group(each.rest, devices), each.source)


def chain(each: Instruction) -> tuple[str, ...] | None:
    """What the parts share of a collective that the TPU compiler spreads over several fusions; None for a whole one."""
    found = re.search(r'chain_id="(\d+)"', each.rest)
    return (found.group(1), *re.findall(r"channel_id=\d+", each.rest)) if found else None


def summary(found: list[Collective]) -> list[dict]:
    """[{kind, count, bytes}] by kind, counts and bytes of a whole step on one device."""
    sums = defaultdict(lambda: [0, 0])
    for one in found:
        sums[one.kind][0] += one.count
        sums[one.kind][1] += one.count * one.bytes
    return [dict(kind=kind, count=count, bytes=size) for kind, (count, size) in sorted(sums.items())]


def received_bytes(one: Collective) -> int:
    """Bytes that a device receives for one run of a collective, by the ring algorithms."""
    n = one.group
    factor = {"all-reduce": 2 * (n - 1) / n, "reduce-scatter": n - 1, "collective-permute": 1}.get(
        one.kind, (n - 1) / n
    )
    return round(one.bytes * factor)


def _result(each: Instruction) -> str:
    """The shape of a collective's result: -start instructions return (operands, results, more), except all-reduce."""
    if not each.opcode.endswith("-start") or each.opcode == "all-reduce-start":
        return each.shape
    return elements(each.shape)[1]


def _group(rest: str, devices: int) -> int:
    """Devices in a replica group, of HLO's three ways to write it: {{0,1},{2,3}}, [2,2]<=[4], mesh[...] {axes}."""
    if mesh := re.search(r"replica_groups=@?mesh\w*\[(.*?)\] \{(.*?)\}", rest):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh.group(1))}
        # 'axis' or a part of it, 'axis':(what lies before)size
        named = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", mesh.group(2))
        return math.prod(int(part) if part else sizes[name] for name, part in named)
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", rest):
        return int(iota.group(2))
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
        return len(listed.group(1).split(","))
    return devices

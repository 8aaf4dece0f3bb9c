"""The collectives of a compiled program, their counts and bytes, parsed from its optimized HLO text.

A collective in a loop's body counts once for each of the loop's iterations, loops within loops multiplied. Bytes are
those of the collective's result on one device. An asynchronous pair (-start and -done) is one collective; so is one
that the TPU compiler spreads over several fusions to overlap it with other work.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from dataclasses import dataclass

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
         "collective-broadcast")  # fmt: skip
BITS = {"pred": 8, "bf16": 16, "s4": 4, "u4": 4, "token": 0, "opaque": 0}  # others have it in their name

COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{$")
INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.-]+) = (.*)$")
OPCODE = re.compile(r"\s*([a-z][\w-]*)\(")
ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=]*)\]")
CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|branch_computations|called_computations)=\{?((?:%[\w.-]+(?:, )?)+)"
)


@dataclass(frozen=True)
class Collective:
    """kind: of KINDS. count: how often a step runs it. bytes: of one result on one device. group: devices that take
    part together. source: the operation of the model that it belongs to."""

    kind: str
    count: int
    bytes: int
    group: int
    source: str


@dataclass(frozen=True)
class _Instruction:
    name: str
    shape: str
    opcode: str
    rest: str  # from the operands on
    root: bool


def collectives(hlo: str, devices: int) -> list[Collective]:
    """The collectives of a program, those that move most bytes first.

    hlo: ``compiled.as_text()``. devices: of the program, the group of a collective that states none."""
    computations, entry = _parse(hlo)
    times = _times(computations, entry)
    found = []
    spread = {}
    for name, instructions in computations.items():
        scatter = name.startswith("all-reduce-scatter")  # how the TPU compiler writes a reduce-scatter
        for each in instructions:
            kind = each.opcode.removesuffix("-start")
            if kind not in KINDS or not times[name]:
                continue
            size = _bytes(_result(each))
            if scatter and kind == "all-reduce":
                kind = "reduce-scatter"
                size = sum(_bytes(i.shape) for i in instructions if i.root)
            source = re.search(r'op_name="([^"]*)"', each.rest)
            one = Collective(kind, times[name], size, _group(each.rest, devices), source.group(1) if source else "")
            chain = re.search(r'chain_id="(\d+)"', each.rest)
            if not chain:
                found.append(one)
                continue
            # Parts of one collective: it runs as often as the part outside of the innermost loop.
            key = (chain.group(1), *re.findall(r"channel_id=\d+", each.rest))
            if key not in spread or one.count < spread[key].count:
                spread[key] = one
    return sorted([*found, *spread.values()], key=lambda c: -c.count * c.bytes)


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


def _parse(hlo: str) -> tuple[dict[str, list[_Instruction]], str]:
    """({computation: its instructions}, the entry computation)."""
    computations, current, entry = {}, None, ""
    for line in hlo.splitlines():
        if match := COMPUTATION.match(line):
            current = computations.setdefault(match.group(1), [])
            entry = match.group(1) if line.startswith("ENTRY") else entry
        elif current is not None and (match := INSTRUCTION.match(line)):
            root, name, text = match.groups()
            end = _shape_end(text)
            if opcode := OPCODE.match(text, end):
                current.append(_Instruction(name, text[:end], opcode.group(1), text[opcode.end() :], bool(root)))
    return computations, entry


def _shape_end(text: str) -> int:
    """Where the result's shape ends: after a closed tuple, else at the first space."""
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if letter == " " and depth == 0:
            return i
    return len(text)


def _times(computations: dict[str, list[_Instruction]], entry: str) -> dict[str, int]:
    """How often a run of the program runs each computation."""
    times = defaultdict(int)

    def visit(name: str, count: int) -> None:
        times[name] += count
        for each in computations.get(name, ()):
            if each.opcode.endswith(("-done", "-update")):  # of the computation that -start called
                continue
            trips = _trips(each, computations) if each.opcode == "while" else 1
            for called in re.findall(r"%([\w.-]+)", " ".join(CALLED.findall(each.rest))):
                visit(called, count * trips)

    visit(entry, 1)
    return times


def _trips(loop: _Instruction, computations: dict[str, list[_Instruction]]) -> int:
    """Iterations of a while loop. Raises ValueError where neither the loop nor its condition states them."""
    if known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.rest):
        return int(known.group(1))
    names = {key: re.search(rf"{key}=%?([\w.-]+)", loop.rest).group(1) for key in ("condition", "body")}
    condition, body = ({i.name: i for i in computations[name]} for name in names.values())
    # A counted loop: from 0 to the condition's only constant, in steps of what the body adds to the counter that the
    # condition compares; the TPU compiler unrolls some loops by two.
    limits = {_integer(i) for i in condition.values() if _integer(i) is not None}
    counters = {m.group(1) for i in condition.values() if (m := re.search(r"index=(\d+)", i.rest))}
    after = next(_operands(i) for i in body.values() if i.root)
    added = [body[after[int(index)]] for index in counters] if len(counters) == 1 else []
    steps = {_integer(body[o]) for i in added if i.opcode == "add" for o in _operands(i)} - {None}
    if len(limits) != 1 or len(steps) != 1:
        raise ValueError(
            f"the number of iterations of loop {loop.name} is unknown: {names['condition']} compares with {limits}, "
            f"the body adds {steps}"
        )
    return -(-limits.pop() // steps.pop())


def _integer(each: _Instruction) -> int | None:
    """The value of a constant whole number, else None."""
    known = each.opcode == "constant" and re.match(r"[su]\d+\[\]", each.shape)
    return int(each.rest.split(")")[0]) if known else None


def _operands(each: _Instruction) -> list[str]:
    return re.findall(r"%([\w.-]+)", each.rest.split(")")[0])


def _result(each: _Instruction) -> str:
    """The shape of a collective's result: -start instructions return (operands, results, more), except all-reduce."""
    if not each.opcode.endswith("-start") or each.opcode == "all-reduce-start":
        return each.shape
    return _elements(each.shape)[1]


def _elements(shape: str) -> list[str]:
    """The elements of a tuple shape."""
    elements, depth, start = [], 0, 1
    for i, letter in enumerate(shape):
        depth += (letter in "([{") - (letter in ")]}")
        if (letter == "," and depth == 1) or i == len(shape) - 1:
            elements.append(shape[start:i].strip())
            start = i + 1
    return elements


def _bytes(shape: str) -> int:
    """Bytes of a shape, a tuple's elements added up; layouts and tilings are left out."""
    total = 0
    for kind, dims in ARRAY.findall(re.sub(r"\{[^}]*\}|/\*[^*]*\*/", "", shape)):
        bits = BITS[kind] if kind in BITS else int(re.search(r"\d+", kind).group())
        total += math.prod(int(d.removeprefix("<=")) for d in dims.split(",") if d) * bits // 8
    return total


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

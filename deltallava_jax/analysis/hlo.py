"""The optimized HLO text of a compiled program: its computations, their instructions, and how often each runs."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from dataclasses import dataclass

BITS = {"pred": 8, "bf16": 16, "s4": 4, "u4": 4, "token": 0, "opaque": 0}  # others have it in their name

COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{$")
INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.-]+) = (.*)$", re.DOTALL)
OPCODE = re.compile(r"\s*([a-z][\w-]*)\(")
ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](\{[^}]*\})?")
CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|branch_computations|called_computations|true_computation|false_computation)"
    r"=\{?((?:%[\w.-]+(?:, )?)+)"
)


@dataclass(frozen=True)
class Instruction:
    """shape: of the result, as text. operands: names of instructions of the same computation. rest: the text from the
    operands on, with the attributes."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    rest: str
    root: bool

    @property
    def source(self) -> str:
        """The operation of the model that it belongs to, with its named scopes: "jit(step)/jvp(loss)/logits/dot"."""
        found = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.rest)
        return found.group(1) if found else ""

    @property
    def called(self) -> list[str]:
        """The computations that it runs, in the order of the text."""
        return re.findall(r"%([\w.-]+)", " ".join(CALLED.findall(self.rest)))


Computation = dict[str, Instruction]  # by name, in the order of the text, which is that of a scheduled program


@dataclass(frozen=True)
class Program:
    computations: dict[str, Computation]
    entry: str

    def runs(self) -> dict[str, int]:
        """How often a run of the program runs each computation; every branch of a conditional is taken to run (in
        costs.py, which counts work, one).

        Raises ValueError for a loop with an unknown number of iterations."""
        counts = defaultdict(int)

        def visit(name: str, count: int) -> None:
            counts[name] += count
            for each in self.computations.get(name, {}).values():
                if each.opcode.endswith(("-done", "-update")):  # of the computation that -start called
                    continue
                for called in each.called:
                    visit(called, count * (self.trips(each) if each.opcode == "while" else 1))

        visit(self.entry, 1)
        return counts

    def trips(self, loop: Instruction) -> int:
        """Iterations of a while loop. Raises ValueError where neither the loop nor its condition states them."""
        if known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.rest):
            return int(known.group(1))
        names = {key: re.search(rf"{key}=%?([\w.-]+)", loop.rest).group(1) for key in ("condition", "body")}
        condition, body = (self.computations[name] for name in names.values())
        # A counted loop: from 0 to the condition's only constant, in steps of what the body adds to the counter that
        # the condition compares; the TPU compiler unrolls some loops by two.
        limits = {_integer(i) for i in condition.values() if _integer(i) is not None}
        counters = {m.group(1) for i in condition.values() if (m := re.search(r"index=(\d+)", i.rest))}
        after = root(body).operands
        added = [body[after[int(index)]] for index in counters] if len(counters) == 1 else []
        steps = {_integer(body[o]) for i in added if i.opcode == "add" for o in i.operands} - {None}
        if len(limits) != 1 or len(steps) != 1:
            raise ValueError(
                f"the number of iterations of loop {loop.name} is unknown: {names['condition']} compares with "
                f"{limits}, the body adds {steps}"
            )
        return -(-limits.pop() // steps.pop())


def parse(text: str) -> Program:
    """text: ``compiled.as_text()``."""
    computations, current, entry = {}, None, ""
    for line in _whole_lines(text):
        if match := COMPUTATION.match(line):
            current = computations.setdefault(match.group(1), {})
            entry = match.group(1) if line.startswith("ENTRY") else entry
        elif current is not None and (match := INSTRUCTION.match(line)):
            is_root, name, text = match.groups()
            end = _end(text, " ")
            if opcode := OPCODE.match(text, end):
                rest = text[opcode.end() :]
                operands = tuple(re.findall(r"%([\w.-]+)", rest[: _end(rest, ")")]))
                current[name] = Instruction(name, text[:end], opcode.group(1), operands, rest, bool(is_root))
    return Program(computations, entry)


def root(computation: Computation) -> Instruction:
    return next(each for each in computation.values() if each.root)


def arrays(shape: str) -> list[tuple[str, tuple[int, ...], int]]:
    """(element type, dimensions, memory space) of a shape's arrays: one, or those of a tuple. Space 0 is the device's
    main memory; a TPU's on-chip memory is 1, the host's 5."""
    found = []
    for kind, dims, layout in ARRAY.findall(re.sub(r"/\*[^*]*\*/", "", shape)):
        space = re.search(r"S\((\d+)\)", layout)
        sizes = tuple(int(d.removeprefix("<=")) for d in dims.split(",") if d)
        found.append((kind, sizes, int(space.group(1)) if space else 0))
    return found


def size(shape: str, space: int | None = None) -> int:
    """Bytes of a shape, a tuple's elements added up, without the padding of tiled layouts. space: count only what lies
    in this memory space."""
    return sum(
        math.prod(dims) * _bits(kind) // 8 for kind, dims, where in arrays(shape) if space is None or where == space
    )


def elements(shape: str) -> list[str]:
    """The elements of a tuple's shape."""
    found, depth, start = [], 0, 1
    for i, letter in enumerate(shape):
        depth += (letter in "([{") - (letter in ")]}")
        if (letter == "," and depth == 1) or i == len(shape) - 1:
            found.append(shape[start:i].strip())
            start = i + 1
    return found


def _bits(kind: str) -> int:
    return BITS[kind] if kind in BITS else int(re.search(r"\d+", kind).group())


def _integer(each: Instruction) -> int | None:
    """The value of a constant whole number, else None."""
    known = each.opcode == "constant" and re.match(r"[su]\d+\[\]", each.shape)
    return int(each.rest.split(")")[0]) if known else None


def _whole_lines(text: str) -> list[str]:
    """Lines, those that continue an attribute of several lines joined to its first."""
    whole, inside = [], False
    for line in text.splitlines():
        starts = INSTRUCTION.match(line) or COMPUTATION.match(line)
        if inside and line != "}" and not starts:
            whole[-1] += line
        else:
            whole.append(line)
            inside = bool(starts)
    return whole


def _end(text: str, stop: str) -> int:
    """Where ``stop`` is first found outside of parentheses."""
    depth = 0
    for i, letter in enumerate(text):
        if letter == stop and depth == 0:
            return i
        depth += (letter == "(") - (letter == ")")
    return len(text)

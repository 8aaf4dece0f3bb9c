"""Operations and bytes of the instructions of an optimized program, those of loops as often as they run.

Operations are those of products: dots, convolutions (as which the TPU compiler writes dots), both also inside fusions,
and the library calls and kernels that compute them. Element-wise work counts by its bytes: what an instruction reads
and writes in the device's main memory. Of a fusion that are its operands and results, of an operand that it only
slices the slices, of a result that it updates in place the update. Nothing is known of caches: on a GPU or TPU the
arrays of a train step are far larger.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from deltallava_jax.analysis.hlo import Computation, Instruction, Program, arrays, elements, parse, root, size

# Instructions that move nothing: names, views, and those whose inner computations are counted instead.
FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "add-dependency", "opt-barrier",
    "partition-id", "replica-id", "domain", "while", "call", "conditional", "async-start",
}  # fmt: skip
FREE_CALLS = {
    "ConcatBitcast", "AllocateBuffer", "Sharding", "AssumeGatherIndicesInBound", "GatherScatterIndicesBitpacked",
    "AsyncCollectiveStart", "AsyncCollectiveDone", "annotate_device_placement",
}  # fmt: skip
RUNS_INSIDE = ("while", "call", "conditional", "async-start")
ASYNC_COPIES = ("copy-start", "slice-start", "dynamic-slice-start")
VIEWS = ("bitcast", "get-tuple-element")
READS_PART = ("dynamic-slice", "slice", "gather")
# Attention kernels -> products of the size of the scores: the forward pass, and both or parts of the backward pass.
SPLASH = {"splash_mha_fwd": 2, "splash_mha_dkv": 4, "splash_mha_dq": 3}
CUDNN_ATTENTION = "__cudnn$fmha"


@dataclass(frozen=True)
class Products:
    """operations: a multiply and an add are two. dtype: of the operands, as HLO names it. attention: of an attention
    kernel. weights: one matrix for all rows and heads, as of weights and their gradients, not a batch of products."""

    operations: int = 0
    dtype: str = ""
    attention: bool = False
    weights: bool = False


@dataclass(frozen=True)
class Cost:
    """An instruction's cost. source: the operation of the model that it belongs to, with its scopes. count: how often
    the program runs it; operations and bytes are those of one run."""

    name: str
    opcode: str
    source: str
    count: int
    products: Products
    bytes: int

    @property
    def operations(self) -> int:
        return self.products.operations


def costs(program: str | Program) -> list[Cost]:
    """Of every instruction that runs and is not free; of a conditional, the branch with most work is taken to run.

    program: ``compiled.as_text()``, or parsed."""
    counter = Counter(parse(program) if isinstance(program, str) else program)
    return [cost for cost in counter.walk(counter.program.entry, 1) if cost.operations or cost.bytes]


class Counter:
    """Counts a program's instructions. uncounted: library calls and kernels whose operations are not known."""

    def __init__(self, program: Program):
        self.program = program
        self.uncounted: set[str] = set()
        # Only TPUs have arrays in an on-chip memory; on GPUs the same space is main memory for collectives.
        tiled = any(":T(" in each.shape for each in program.computations[program.entry].values())
        self._main = (0,) if tiled else (0, 1)
        self._sources: dict[str, dict[str, str]] = {}

    def walk(self, name: str, count: int) -> Iterator[Cost]:
        """The costs of a computation and of those that it runs."""
        computation = self.program.computations[name]
        for each in computation.values():
            yield self.cost(each, name, count)
            times = self.program.trips(each) if each.opcode == "while" else 1
            for inner in self.runs_inside(each):
                yield from self.walk(inner, count * times)

    def runs_inside(self, each: Instruction) -> list[str]:
        """The computations that an instruction runs one by one; of a conditional's, the one with most work."""
        if each.opcode != "conditional":
            return each.called if each.opcode in RUNS_INSIDE else []

        def work(name: str) -> tuple[int, int]:
            costs = list(self.walk(name, 1))
            return sum(cost.count * cost.operations for cost in costs), sum(cost.count * cost.bytes for cost in costs)

        return [max(each.called, key=work)]

    def cost(self, each: Instruction, name: str, count: int) -> Cost:
        """Of one instruction of a computation."""
        computation = self.program.computations[name]
        products = self.products(each, computation)
        return Cost(
            each.name, each.opcode, self.source(each, name), count, products, self.bytes_moved(each, computation)
        )

    def source(self, each: Instruction, name: str) -> str:
        """Its operation of the model; where the compiler dropped it, that of an instruction that uses the result, or
        of one that it uses."""
        if name not in self._sources:
            self._sources[name] = self._all_sources(self.program.computations[name])
        return self._sources[name][each.name]

    def _all_sources(self, computation: Computation) -> dict[str, str]:
        found = {}
        for each in computation.values():
            inner = [self.program.computations.get(called, {}) for called in each.called if each.opcode == "fusion"]
            own = [each.source, *(i.source for c in inner for i in reversed(c.values()))]
            own = (
                [] if each.opcode == "parameter" else [source for source in own if "/" in source]
            )  # no argument's name
            found[each.name] = next(filter(_scoped, own), own[0] if own else "")
        for each in reversed(computation.values()):
            for operand in each.operands:
                if operand in found and not found[operand]:
                    found[operand] = found[each.name]
        for each in computation.values():
            if not found[each.name]:
                found[each.name] = next(filter(None, (found.get(operand) for operand in each.operands)), "")
        return found

    # -------------------------------------------------------------- operations

    def products(self, each: Instruction, computation: Computation) -> Products:
        shapes = [computation[name].shape for name in each.operands if name in computation]
        if each.opcode == "dot":
            return _dot(each.shape, shapes, each.rest, "dims")
        if each.opcode == "convolution":
            return _convolution(each, shapes)
        if each.opcode == "fusion":
            inner = [self.products(i, c) for c in self._computations(each) for i in c.values()]
            largest = max(inner, key=lambda one: one.operations, default=Products())
            return replace(largest, operations=sum(one.operations for one in inner))
        if each.opcode == "custom-call":
            return self._call(each, shapes)
        return Products()

    def _call(self, each: Instruction, shapes: list[str]) -> Products:
        target = re.search(r'custom_call_target="([^"]*)"', each.rest).group(1)
        if target in FREE_CALLS:
            return Products()
        if "gemm_backend_config" in each.rest:
            result = elements(each.shape)[0] if each.shape.startswith("(") else each.shape
            return _dot(result, shapes, each.rest, "dimensions")
        if target.startswith(CUDNN_ATTENTION):
            scores = math.prod(_numbers(each.rest.split("intermediate_tensor_shape")[1], "dimensions"))
            kind, (*_, width), _ = arrays(shapes[0])[0]
            causal = re.search(r'"mask_type":\s*"\w*CAUSAL', each.rest)
            products = 5 if target.endswith("Backward") else 2
            return Products(products * 2 * scores * width // (2 if causal else 1), kind, True)
        if stated := re.search(r'"cost_estimate":\{[^}]*"flops":"?(\d+)', each.rest):
            return Products(int(stated.group(1)), arrays(shapes[0])[0][0])
        kernel = next((name for name in SPLASH if name in each.name or name in each.source), None)
        if target == "tpu_custom_call" and kernel:
            return _splash(SPLASH[kernel], shapes)
        if "dim_labels=" in each.rest and not target.endswith(("BackwardInput", "BackwardFilter")):
            return _convolution(each, shapes)
        self.uncounted.add(target)
        return Products()

    def _computations(self, each: Instruction) -> list[Computation]:
        return [self.program.computations[name] for name in each.called if name in self.program.computations]

    # -------------------------------------------------------------- bytes

    def bytes_moved(self, each: Instruction, computation: Computation) -> int:
        """Bytes that one run reads from main memory and writes to it."""
        shapes = {name: computation[name].shape for name in each.operands if name in computation}
        held = lambda shape: sum(size(shape, space) for space in self._main)
        if each.opcode in FREE or each.opcode.endswith(("-done", "-update")):
            return 0
        if each.opcode == "fusion":
            return self._fusion(each, list(shapes.values()) if len(shapes) == len(each.operands) else [])
        result = each.shape
        if each.opcode.endswith("-start"):
            if each.opcode == "slice-start" or each.opcode == "dynamic-slice-start":
                return (
                    2 * size(elements(each.shape)[1])
                    if held(elements(each.shape)[1])
                    else held(elements(each.shape)[1]) + size(elements(each.shape)[1])
                )
            if each.opcode == "copy-start":
                return sum(held(part) for part in elements(each.shape)[:2])
            return held(each.shape)  # a collective's operands and results
        if each.opcode == "custom-call":
            target = re.search(r'custom_call_target="([^"]*)"', each.rest).group(1)
            if target in FREE_CALLS:
                return 0
            if target.startswith("__cu"):  # the last result is the library's working space
                result = f"({', '.join(elements(each.shape)[:-1])})" if each.shape.startswith("(") else each.shape
        if each.opcode in READS_PART:
            return 2 * held(each.shape)
        if each.opcode == "dynamic-update-slice":
            return 2 * held(shapes.get(each.operands[1], ""))
        if each.opcode == "scatter":
            return 3 * sum(held(shapes.get(name, "")) for name in _updates(each))
        return sum(map(held, shapes.values())) + held(result)

    def _fusion(self, each: Instruction, shapes: list[str]) -> int:
        (inner, *_) = self._computations(each)
        held = lambda shape: sum(size(shape, space) for space in self._main)
        read = sum(min(held(shape), self._read(inner, number)) for number, shape in enumerate(shapes))
        # The inner computation has the dimensions, the outer one the memory spaces.
        parts = elements(each.shape) if each.shape.startswith("(") else [each.shape]
        last = root(inner)
        written = [inner[name] for name in last.operands] if last.opcode == "tuple" else [last]
        if len(written) != len(parts):  # the root is itself a fusion of several results
            return read + held(each.shape)
        return read + sum(min(held(part), self._written(inner, one)) for part, one in zip(parts, written, strict=True))

    def _read(self, inner: Computation, number: int) -> float:
        """Bytes that a fused computation reads of a parameter, at most; infinite where it reads it whole."""
        parameter = next(i for i in inner.values() if i.opcode == "parameter" and i.rest.startswith(f"{number})"))
        return sum(self._uses(inner, parameter.name))

    def _uses(self, inner: Computation, name: str) -> Iterator[float]:
        for user in inner.values():
            if name not in user.operands:
                continue
            first = user.operands[0] == name and name not in user.operands[1:]
            if user.opcode in VIEWS:
                yield from self._uses(inner, user.name)
            elif user.opcode in READS_PART and first:
                yield size(user.shape)
            elif user.opcode == "dynamic-update-slice" and first:
                yield 0
            elif user.opcode == "scatter" and first:
                yield sum(size(inner[update].shape) for update in _updates(user))
            elif user.opcode == "fusion":
                places = [number for number, operand in enumerate(user.operands) if operand == name]
                yield sum(self._read(self._computations(user)[0], number) for number in places)
            else:
                yield math.inf

    def _written(self, inner: Computation, each: Instruction) -> float:
        while each.opcode in VIEWS and each.operands:
            each = inner[each.operands[0]]
        if each.opcode == "dynamic-update-slice" and self._is_parameter(inner, each.operands[0]):
            return size(inner[each.operands[1]].shape)
        if each.opcode == "scatter" and self._is_parameter(inner, each.operands[0]):
            return sum(size(inner[update].shape) for update in _updates(each))
        if each.opcode == "fusion":
            called = self._computations(each)[0]
            return self._written(called, root(called)) if root(called).opcode != "tuple" else math.inf
        return math.inf

    def _is_parameter(self, inner: Computation, name: str) -> bool:
        while inner[name].opcode in VIEWS:
            name = inner[name].operands[0]
        return inner[name].opcode == "parameter"


def _scoped(source: str) -> bool:
    """Whether the operation is inside of a named scope."""
    return len([word for word in source.split("/") if not word.startswith("jit(")]) > 1


def _updates(scatter: Instruction) -> tuple[str, ...]:
    return scatter.operands[(len(scatter.operands) + 1) // 2 :]


def _numbers(text: str, key: str) -> list[int]:
    """Of attributes "key={1,2}" and "key":["1","2"]."""
    found = re.search(rf'{key}"?[=:]\s*[{{\[]([^}}\]]*)[}}\]]', text)
    return [int(number) for number in re.findall(r"\d+", found.group(1))] if found else []


def _dot(result: str, operands: list[str], rest: str, ending: str) -> Products:
    (_, out, _), (kind, dims, _) = arrays(result)[0], arrays(operands[0])[0]
    contracted, batch = (_numbers(rest, f"lhs_{key}_{ending}") for key in ("contracting", "batch"))
    return Products(2 * math.prod(out) * math.prod(dims[i] for i in contracted), kind, weights=not batch)


def _splash(products: int, shapes: list[str]) -> Products:
    """Of splash attention's kernels, from [..., heads, slots, width] queries. Those of a causal order skip the later
    blocks and have arrays that say which, [heads or 1, blocks, blocks]."""
    found = [one for shape in shapes for one in arrays(shape)]
    kind, (*rows, slots, width), _ = next(one for one in found if one[0] in ("bf16", "f32") and len(one[1]) >= 3)
    blocks = next((dims[-1] for name, dims, _ in found if name == "s8" and len(dims) == 3), 0)
    share = (blocks + 1) / (2 * blocks) if blocks else 1
    return Products(round(products * 2 * math.prod(rows) * slots**2 * width * share), kind, True)


def _convolution(each: Instruction, shapes: list[str]) -> Products:
    """Positions of the window that fall on padding or into the holes of a dilation do not count: the TPU compiler
    writes the rows of a batched dot as such a dimension."""
    inputs, kernel, out = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", each.rest).groups()
    window = re.search(r"window=\{([^}]*)\}", each.rest)
    window = dict(re.findall(r"(\w+)=([\w-]+)", window.group(1))) if window else {}
    (kind, in_dims, _), (_, kernel_dims, _), (_, out_dims, _) = (arrays(s)[0] for s in (*shapes[:2], each.shape))
    batched = False
    operations = 2 * out_dims[out.index("b")] * out_dims[out.index("f")] * kernel_dims[kernel.index("i")]
    axes = sorted(set(out) - {"b", "f"})
    listed = lambda key, default: window[key].split("x") if key in window else [default] * len(axes)
    settings = zip(
        axes, listed("stride", "1"), listed("pad", "0_0"), listed("lhs_dilate", "1"), listed("rhs_dilate", "1"),
        strict=True,
    )  # fmt: skip
    for axis, stride, pad, holes, spread in settings:
        size_in, size_kernel = in_dims[inputs.index(axis)], kernel_dims[kernel.index(axis)]
        size_out = out_dims[out.index(axis)]
        if size_kernel == 1 and size_in == size_out:
            operations *= size_out
            continue
        batched = batched or size_kernel > 1
        places = np.arange(size_out)[:, None] * int(stride) + np.arange(size_kernel) * int(spread)
        places = places - int(pad.split("_")[0])
        valid = (places >= 0) & (places % int(holes) == 0) & (places < size_in * int(holes))
        operations *= int(valid.sum())
    return Products(operations, kind, weights=not batched)

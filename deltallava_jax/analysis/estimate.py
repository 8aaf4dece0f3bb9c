"""The time of a step on a machine, from the optimized program: each instruction takes what its operations or its bytes
need at the machine's rates, whichever is more, one after the other as scheduled.

Collectives, and a TPU's copies into its on-chip memory, run beside the instructions between their start and their
done; only what the program waits for counts. Not modelled: caches, kernels that run at the same time, small products
that fill a device badly, hosts that are late.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace

from deltallava_jax.analysis import units
from deltallava_jax.analysis.collectives import KINDS, Collective, chain, collective, received_bytes
from deltallava_jax.analysis.costs import ASYNC_COPIES, RUNS_INSIDE, Cost, Counter, Products
from deltallava_jax.analysis.hlo import Instruction, Program
from deltallava_jax.analysis.targets import Chip, Target

# Part of the model -> its named scopes; the first one found in an instruction's scopes decides.
PARTS = {
    "logits, loss": r"\blogits\b|\bloss\b",
    "tower": "tower",
    "projector": "projector",
    "optimizer": r"\boptimizer\b",
    "decoder: attention": r"\battention\b",
    "decoder: mlp": r"\bmlp\b",
    "decoder: other": "decoder_layers|question",
}
OTHER = "other"
PASSES = ("forward", "backward", "recompute")
SCORES = "scores"  # the scope of scores, softmax and values: attention without norm, rotation and residual
DEAREST = 10


@dataclass(frozen=True)
class Efficiency:
    """What programs reach of the stated peaks: large products, attention kernels, memory. overhead: seconds that an
    instruction takes at least; latency: that a collective takes at least."""

    products: float
    attention: float
    memory: float
    overhead: float
    latency: float
    source: str


GPU = Efficiency(
    0.70, 0.50, 0.88, 2e-6, 10e-6,
    "cuBLAS on large bfloat16 products 65 to 75 %, flash attention with its backward pass 45 to 60 % "
    "(FlashAttention-3, arxiv.org/abs/2407.08608), memory-bound kernels 85 to 90 %",
)  # fmt: skip
TPU = Efficiency(
    0.80, 0.45, 0.88, 0.0, 2e-6,
    "products as in MaxText's reports of up to 66 % of a whole step (github.com/AI-Hypercomputer/maxtext), splash "
    "attention about half of the peak",
)  # fmt: skip
# Of a CPU the probe measures what it reaches. Programs reach less: their products are smaller and of many shapes, and
# exponentials, transposes and sums over rows take longer than a copy (benchmarks/results/plan_accuracy.json).
MEASURED = Efficiency(0.90, 0.90, 0.50, 1e-6, 0.0, "measured on this machine")


@dataclass(frozen=True)
class Rates:
    """What a device reaches: operations per second of products by the operands' type and of attention kernels, bytes
    per second of its memory, seconds per instruction."""

    chip: Chip
    efficiency: Efficiency

    def seconds(self, products: Products, moved: int) -> tuple[float, float]:
        """(of the operations, of the bytes) of one instruction."""
        peak = self.chip.float32_flops if products.dtype == "f32" else self.chip.peak_flops
        share = self.efficiency.attention if products.attention else self.efficiency.products
        return products.operations / (peak * share), moved / (self.chip.bandwidth * self.efficiency.memory)

    def link_seconds(self, one: Collective) -> float:
        """Of one run of a collective, at the link's full rate."""
        chip = self.chip
        rate = chip.network if chip.per_host and one.group > chip.per_host else chip.link
        return self.efficiency.latency + received_bytes(one) / rate

    @property
    def assumption(self) -> str:
        chip, reached = self.chip, self.efficiency
        peak, half = units.operations(chip.float32_flops), units.operations(chip.peak_flops)
        text = (
            f"products at {reached.products:.0%} of {half}/s ({peak}/s in float32), memory at {reached.memory:.0%} of "
            f"{chip.bandwidth / 1e9:.4g} GB/s ({reached.source})"
        )
        if not chip.link:
            return text
        return text + (
            f"; collectives at {chip.link / 1e9:g} GB/s"
            + (f", {chip.network / 1e9:g} GB/s beyond {chip.per_host} devices" if chip.per_host else "")
            + f" ({chip.source})"
        )


def rates(target: Target, measured: Chip | None = None) -> Rates:
    """measured: of a CPU, by probe.measure()."""
    if target.chip is None:
        return Rates(measured, MEASURED)
    return Rates(target.chip, GPU if target.is_gpu else TPU)


@dataclass(frozen=True)
class Timed:
    """An instruction's cost with the seconds of one run. bound: what it waits for, "products", "memory",
    "collectives" or "overhead"."""

    cost: Cost
    seconds: float
    bound: str

    @property
    def total(self) -> float:
        return self.cost.count * self.seconds


class Timeline:
    """Runs a program's schedule. ``timed``: every instruction that takes time or moves bytes; ``link``: seconds that
    collectives take in all, hidden or not."""

    def __init__(self, program: Program, rates: Rates, devices: int):
        self.counter = Counter(program)
        self.timed: list[Timed] = []
        self.link = 0.0
        self._program, self._rates, self._devices = program, rates, devices
        self._chains = self._homes()
        self.seconds = self._run(program.entry, 1)

    def _homes(self) -> dict[tuple, str]:
        """Of every collective that is spread over several fusions: the computation in which it is waited for, the one
        that runs least often."""
        homes, runs = {}, self._program.runs()
        for name, computation in self._program.computations.items():
            for each in computation.values():
                for _, key in self._inner_collectives(each):
                    if key and (key not in homes or runs[name] < runs[homes[key]]):
                        homes[key] = name
        return homes

    def _inner_collectives(self, each: Instruction) -> list[tuple[Collective, tuple | None]]:
        """(collective, chain) of the collectives inside a fusion or an asynchronous computation."""
        if each.opcode not in ("fusion", "async-start"):
            return []
        found = []
        for name in each.called:
            computation = self._program.computations.get(name, {})
            for inner in computation.values():
                if one := collective(inner, name, computation, 1, self._devices):
                    found.append((one, chain(inner)))
                found += self._inner_collectives(inner)
        return found

    def _run(self, name: str, count: int) -> float:
        """Seconds of one run of a computation; its instructions are added to ``timed`` with their count."""
        now, free = 0.0, defaultdict(float)  # free: when the link, and the copies, are done with what they have
        begun: dict = {}  # what runs asynchronously -> (when it ends, its cost, what it waits for)
        computation = self._program.computations[name]
        last = self._last_parts(name)

        def begin(key, seconds: float, cost: Cost, bound: str) -> None:
            free[bound] = max(free[bound], now) + seconds
            begun[key] = (free[bound], cost, bound)

        def wait(key) -> None:
            nonlocal now
            if key in begun:
                end, cost, bound = begun.pop(key)
                self.timed.append(Timed(cost, max(0.0, end - now), bound))
                now = max(now, end)

        for each in computation.values():
            cost = self.counter.cost(each, name, count)
            if each.opcode.endswith("-done"):
                wait(each.operands[0] if each.operands else "")
                continue
            if each.opcode in ASYNC_COPIES:
                begin(each.name, self._rates.seconds(cost.products, cost.bytes)[1], cost, "memory")
                continue
            own = collective(each, name, computation, 1, self._devices)
            inner = self._inner_collectives(each)
            for one, key in [(own, None)] if own else inner:
                if key and self._chains[key] != name:
                    continue
                place = key or each.name
                if place not in begun:
                    seconds = self._rates.link_seconds(one)
                    self.link += count * seconds
                    moved = replace(cost, opcode=one.kind, products=Products(), bytes=cost.bytes if own else 0)
                    begin(place, seconds, moved, "collectives")
            before = now
            now += self._compute(each, replace(cost, bytes=0) if own else cost, count)
            if not own and free["memory"] > before:  # what it moves itself holds up the copies that are on their way
                delay = self._rates.seconds(cost.products, cost.bytes)[1]
                free["memory"] += delay
                begun |= {
                    key: (end + delay, copied, bound)
                    for key, (end, copied, bound) in begun.items() if bound == "memory" and end > before
                }  # fmt: skip
            asynchronous = each.opcode.endswith("-start") and '"is_sync":true' not in each.rest
            for key in [each.name] if not asynchronous else []:
                wait(key)
            for key in last.get(each.name, ()):
                wait(key)
        for key in list(begun):
            wait(key)
        return now

    def _last_parts(self, name: str) -> dict[str, list[tuple]]:
        """{instruction: the spread collectives that end with it} of a computation."""
        ends = {}
        for each in self._program.computations[name].values():
            for _, key in self._inner_collectives(each):
                if key:
                    ends[key] = each.name
        found = defaultdict(list)
        for key, where in ends.items():
            found[where].append(key)
        return found

    def _compute(self, each: Instruction, cost: Cost, count: int) -> float:
        """Seconds of one run of an instruction, and of what it runs."""
        if each.opcode in RUNS_INSIDE:
            if each.opcode == "async-start" and self._inner_collectives(each):
                return 0.0
            times = self._program.trips(each) if each.opcode == "while" else 1
            return times * sum(self._run(inner, count * times) for inner in self.counter.runs_inside(each))
        if not cost.operations and not cost.bytes:
            return 0.0
        products, memory = self._rates.seconds(cost.products, cost.bytes)
        overhead = self._rates.efficiency.overhead
        seconds = max(products, memory, overhead)
        bound = "products" if products == seconds else "memory" if memory == seconds else "overhead"
        self.timed.append(Timed(cost, seconds, bound))
        return seconds


def estimate(program: Program, rates: Rates, devices: int, layers: int) -> dict:
    """The estimate of a step with its parts, as the plan prints it. layers: of the decoder."""
    line = Timeline(program, rates, devices)
    by_bound = defaultdict(float)
    for one in line.timed:
        by_bound[one.bound] += one.total
    return dict(
        estimate=line.seconds,
        products=by_bound["products"],
        memory=by_bound["memory"],
        collectives=by_bound["collectives"],
        overhead=by_bound["overhead"],
        collectives_and_hidden=line.link,
        bytes=sum(one.cost.count * one.cost.bytes for one in line.timed),
        parts=_table(line.timed, lambda one: dict(part=part(one.cost.source))),
        dearest=_table(line.timed, _scope)[:DEAREST],
        attention_bytes_per_layer=attention_bytes(line.timed, layers),
        scores_bytes_per_layer=attention_bytes(line.timed, layers, SCORES),
        not_counted=sorted(line.counter.uncounted),
        assumption=rates.assumption,
    )


def part(source: str) -> str:
    """The part of the model by an operation's scopes; names of compiled functions, jit(loss), are none."""
    source = re.sub(r"\bjit\([^()]*\)", "", source)
    return next((name for name, pattern in PARTS.items() if re.search(pattern, source)), OTHER)


def which_pass(source: str) -> str:
    return PASSES[2] if "rematted" in source else PASSES[1] if "transpose(" in source else PASSES[0]


def attention_bytes(timed: Iterable[Timed], layers: int, scope: str = "") -> dict[str, int]:
    """Bytes that a decoder layer's attention moves in each pass, besides the products with its four matrices: those
    have no dimension that runs over rows or heads alone, which is how HLO writes the others. scope: only what is inside
    of it."""
    moved = dict.fromkeys(PASSES, 0)
    for one in timed:
        inside = part(one.cost.source) == "decoder: attention" and scope in one.cost.source.split("/attention/")[-1]
        if inside and one.bound != "collectives" and not one.cost.products.weights:
            moved[which_pass(one.cost.source)] += one.cost.count * one.cost.bytes
    return {name: count // max(layers, 1) for name, count in moved.items()}


def _scope(one: Timed) -> dict[str, str]:
    """The named scopes and the operation of an instruction, without what transformations add to them."""
    source = one.cost.source.split(";")[0]
    words = []
    for word in source.split("/"):
        inner = re.search(r"\(([^()]*)\)+$", word)
        name = inner.group(1) if inner and not word.startswith(("jit(", "vmap(")) else word
        if (
            name
            and "->" not in name
            and not re.match(r"(jit|vmap)\(|(while|body|closed_call|checkpoint|rematted_computation|shard_map)$", name)
        ):
            words.append(name)
    operation = one.cost.opcode if one.cost.opcode in KINDS else words.pop() if len(words) > 1 else one.cost.opcode
    return {"scope": "/".join(words) or "outside of the model's scopes", "operation": operation,
            "pass": which_pass(source)}  # fmt: skip


def _table(timed: Iterable[Timed], key) -> list[dict]:
    """Rows of what ``key`` names with operations, bytes and seconds of a step, the dearest first."""
    rows: dict[tuple, dict] = {}
    for one in timed:
        named = key(one)
        row = rows.setdefault(tuple(named.values()), named | dict(operations=0, bytes=0, seconds=0.0))
        row["operations"] += one.cost.count * one.cost.operations
        row["bytes"] += one.cost.count * one.cost.bytes
        row["seconds"] += one.total
    return sorted(rows.values(), key=lambda row: -row["seconds"])

"""Floating-point operations of a program's matrix products, counted in its jaxpr, before compilation.

A multiply and an add are two operations; element-wise work (about 1 % of a train step) is left out. Exact for every
system, since the program itself is counted: a scan's body as often as it runs, recomputation in the backward pass
separately, attention as the whole square of scores that dense attention computes (``skipped``: what a kernel leaves out
of it).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

import jax
import jax.extend.core
from jax.sharding import PartitionSpec as P

from deltallava_jax.config import Config, DecoderConfig
from deltallava_jax.kernels.attention import SKIPPING, TRIANGLE
from deltallava_jax.models import llavolta, systems
from deltallava_jax.sequence import Batch
from deltallava_jax.training.step import TrainStep

PASSES = ("forward", "backward", "recompute")
# Part of the model -> its named scopes; the first one found in an operation's scopes decides.
PARTS = {"logits": "logits", "tower": "tower", "projector": "projector", "decoder": "decoder_layers|question"}
# cuDNN's attention: products of the scores' size in a pass, and how many of them are recomputation.
CUDNN = {
    "dot_product_attention_fwd_wrapper": (2, 0), "dot_product_attention_bwd_wrapper": (5, 1),
    "__cudnn$fmhaSoftmax": (2, 0), "__cudnn$fmhaSoftmaxBackward": (5, 1),
    "__cudnn$fmhaScaleBiasSoftmax": (2, 0), "__cudnn$fmhaScaleBiasSoftmaxBackward": (5, 1),
}  # fmt: skip
# Splash attention's backward kernels (jax.experimental.pallas.ops.tpu) -> the recomputed share of their products: the
# scores among scores, dV, dP, dK; scores and dP among scores, dP, dQ.
RECOMPUTED = {"splash_mha_dkv": 1 / 4, "splash_mha_dq": 2 / 3}
Flops = dict[str, dict[str, int]]  # part -> pass -> operations; "other" for operations outside the parts


def traced(program) -> Flops:
    """Operations by part and pass of a program: ``jax.make_jaxpr(f)(...)`` or ``jax.jit(f).trace(...).jaxpr``.

    Raises ValueError for a loop with an unknown number of iterations."""
    counts = {part: dict.fromkeys(PASSES, 0) for part in (*PARTS, "other")}
    for scopes, operations in _products(program.jaxpr, "", 1):
        part = next((part for part, pattern in PARTS.items() if re.search(pattern, scopes)), "other")
        backward = "transpose(" in scopes
        counts[part]["recompute" if "rematted" in scopes else "backward" if backward else "forward"] += operations
    return {part: passes for part, passes in counts.items() if any(passes.values())}


def skipped(program) -> int:
    """Operations among them on scores of later tokens that attention kernels do not compute."""
    return sum(_later(scopes, operations) for scopes, operations in _products(program.jaxpr, "", 1))


def _later(scopes: str, operations: int) -> int:
    """About half of a causal kernel's operations: of its blocks of scores, those on the diagonal are computed whole."""
    blocks = _blocks(scopes)
    skipped = operations * (blocks - 1) // (2 * blocks) if blocks else operations // 2
    return skipped if SKIPPING in scopes else 0


def _square(scopes: str, operations: int) -> int:
    """The operations of the whole square, of which a program may have only the blocks up to the diagonal."""
    blocks = _blocks(scopes)
    return operations * 2 * blocks // (blocks + 1) if blocks else operations


def _blocks(scopes: str) -> int | None:
    found = re.search(rf"{TRIANGLE}(\d+)", scopes)
    return int(found[1]) if found else None


def total(flops: Flops, passes: tuple[str, ...] = PASSES) -> int:
    return sum(counts[each] for counts in flops.values() for each in passes)


def needed(flops: Flops, cfg: Config, row_lengths: list[int]) -> int:
    """Operations that a train step needs, the base of MFU: without recomputation and scores dropped by the causal mask.

    row_lengths: tokens of a row, for each of the step's budgets. What packed conversations do not attend to of each
    other is counted."""
    dropped = sum(masked(cfg.model.decoder, length) for length in row_lengths) * cfg.data.rows
    return total(flops, ("forward", "backward")) - 3 * dropped  # the backward pass has two products for each one


def masked(cfg: DecoderConfig, row_length: int) -> int:
    """Operations of a row's forward pass on scores and values of later tokens."""
    return cfg.layers * 4 * (row_length * (row_length - 1) // 2) * cfg.width


class StepOperations:
    """The ``needed`` operations of a train step on a batch, counted once for each of its programs."""

    def __init__(self, step: TrainStep):
        self._step = step
        self._counted = {}

    def __call__(self, batch: Batch, budget: int, pooling: llavolta.Pooling | None = None) -> int:
        text = batch.tokens.shape[1]
        images = batch.image_positions.shape[1]
        signature = (text, images, budget, pooling)
        if signature not in self._counted:
            cfg = self._step.cfg
            program = traced(self._step.trace(batch, budget, pooling).jaxpr)
            budgets = systems.budgets(cfg.model.projector) if cfg.training.every_budget else (budget,)
            self._counted[signature] = needed(program, cfg, [text + images * (each - 1) for each in budgets])
        return self._counted[signature]


def _products(jaxpr: jax.extend.core.Jaxpr, scopes: str, times: int) -> Iterator[tuple[str, int]]:
    """(named scopes, operations) of every matrix product and convolution, inner programs included."""
    for eqn in jaxpr.eqns:
        name = eqn.params["target_name"] if eqn.primitive.name == "ffi_call" else eqn.primitive.name
        inside = f"{scopes}/{eqn.source_info.name_stack}"
        shapes = [getattr(v.aval, "shape", ()) for v in (*eqn.invars[:2], eqn.outvars[0])] if eqn.outvars else []
        if name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            operations = times * 2 * math.prod(shapes[2]) * math.prod(shapes[0][i] for i in contracted)
            yield inside, _square(inside, operations)
        elif name == "conv_general_dilated":
            out_features = shapes[1][eqn.params["dimension_numbers"].rhs_spec[0]]
            yield inside, times * 2 * math.prod(shapes[2]) * math.prod(shapes[1]) // out_features
        elif name in CUDNN:
            products, repeated = CUDNN[name]
            (rows, queries, heads, width), keys = shapes[0], shapes[1][1]
            product = times * 2 * rows * heads * queries * keys * width
            yield inside, (products - repeated) * product
            if repeated:
                yield f"{inside}/rematted", repeated * product
        inner = [each for value in eqn.params.values() for each in _jaxprs(value)]
        if name == "cond":  # one of them runs: counted is the one with most
            inner = [max(inner, key=lambda each: sum(count for _, count in _products(each, inside, 1)))]  # noqa: B023
        runs = times * _runs(eqn)
        if name == "while" and any(True for each in inner for _ in _products(each, inside, 1)):
            raise ValueError(f"a while loop in {inside} has matrix products but an unknown number of iterations")
        recomputed = next((share for kernel, share in RECOMPUTED.items() if kernel in eqn.params.get("name", "")), 0)
        for each in inner:
            for scope, operations in _products(each, inside, runs):
                if recomputed and name == "pallas_call":
                    repeated = round(operations * recomputed)
                    yield f"{scope}/rematted", repeated
                    operations -= repeated
                yield scope, operations


def _runs(eqn: jax.extend.core.JaxprEqn) -> int:
    """How often an operation runs the programs inside it: a scan its length, a kernel its grid, on all devices."""
    if eqn.primitive.name == "pallas_call":
        return math.prod(eqn.params["grid_mapping"].grid)
    if eqn.primitive.name == "shard_map":
        specs = jax.tree.leaves(eqn.params["in_specs"], is_leaf=lambda x: isinstance(x, P))
        names = {name for spec in specs for axes in spec for name in (axes if isinstance(axes, tuple) else (axes,))}
        return math.prod(eqn.params["mesh"].shape[name] for name in names if name)
    return eqn.params.get("length", 1)


def _jaxprs(value) -> Iterator[jax.extend.core.Jaxpr]:
    for each in value if isinstance(value, (tuple, list)) else (value,):
        each = getattr(each, "jaxpr", each)
        if hasattr(each, "eqns"):
            yield each

"""Two parts of the Delta projector (release), each in the forms that could be taken: what decides for the one we have.

    python -m benchmarks.measure.projector_parts --compile-for v5e:2x2   # keys, values, local attention: one kernel?
    python -m benchmarks.measure.projector_parts                         # the grouped convolution, timed

The first compiles, for a machine that is not there, the keys and values of a batch of images from the tower's layers,
the local attention that reads them, and both in one program. "bound_seconds" is the larger of operations over a chip's
peak and bytes over its memory's speed. Beside what the compiler makes stand kernels at their best, which read their
inputs once and write their output: one for the attention alone, and one for all, which never writes keys and values.
The GPU compiler counts nothing without a GPU, so the bounds on an H100 are of the TPU's program.

The second times, on the device at hand, the block's 3x3 convolution over groups of 32 channels as XLA's grouped
convolution, as a dense one whose kernel has zeros between the groups, and as one product a group over nine shifted
copies (ours)."""

from __future__ import annotations

import argparse
import json
import os
import sys

from benchmarks.measure.timing import LIBRARIES, best, device, two_threads
from benchmarks.program import RESULTS, argument_parser, cores, origin, write_result

FOLDER = RESULTS / "projector_parts"
BANDWIDTH = {"h100": 3.35e12, "v5e": 819e9, "v5p": 2765e9}  # bytes a second, of the makers' data sheets
BUDGETS = (144, 36, 4)


def fusion(target, batch: int) -> list[dict]:
    """By budget: operations, bytes and bounds of the programs as the target's compiler makes them."""
    import jax
    from jax.sharding import AxisType, NamedSharding
    from jax.sharding import PartitionSpec as P

    from deltallava_jax.analysis import targets
    from deltallava_jax.config import system_config
    from deltallava_jax.models.layers import bind, init
    from deltallava_jax.models.systems.delta import Delta

    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,), devices=targets.devices(target)[:1])
    placed = lambda x: jax.ShapeDtypeStruct(x.shape, "bfloat16", sharding=NamedSharding(mesh, P()))
    make = lambda *shape: placed(jax.ShapeDtypeStruct(shape, "bfloat16"))
    rows = []
    for budget in BUDGETS:
        cfg = system_config(scale_factor=round((576 / budget) ** 0.5))
        params = jax.tree.map(placed, jax.eval_shape(lambda cfg=cfg: init(Delta, cfg, jax.random.key(0))))
        side, width = round(budget**0.5), cfg.width
        levels = make(batch, cfg.grid, cfg.grid, cfg.level_count * cfg.in_width)
        q, k = make(batch, side, side, width), make(batch, cfg.grid, cfg.grid, width)

        def keys_values(params, levels, cfg=cfg):
            delta = bind(Delta, cfg, params)
            return delta.k(levels), delta.v(levels)

        def attend(params, q, k, v, cfg=cfg):
            return bind(Delta, cfg, params).attention(q, k, v)

        both = lambda params, q, levels: attend(params, q, *keys_values(params, levels))  # noqa: B023
        row = {"tokens": budget}
        held = lambda *trees: sum(2 * leaf.size for leaf in jax.tree.leaves(trees))
        for name, function, inputs in (
            ("keys_values", keys_values, (levels,)),
            ("attention", attend, (q, k, k)),
            ("both", both, (q, levels)),
        ):
            with jax.set_mesh(mesh):
                program = jax.jit(function).lower(params, *inputs).compile()
            cost = program.cost_analysis()
            row[name] = bounds(cost["flops"], cost["bytes accessed"])
        attention = held(params["attention"], q, k, k, q)
        row["attention_kernel_at_best"] = bounds(row["attention"]["operations"], attention)
        operations = row["keys_values"]["operations"] + row["attention"]["operations"]
        matrices = [params[name] for name in ("k", "v", "attention")]
        row["one_kernel_at_best"] = bounds(operations, held(matrices, q, levels, q))
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def bounds(operations: float, moved: float) -> dict:
    from deltallava_jax.analysis.targets import CHIPS

    seconds = {
        name: float(f"{max(operations / CHIPS[name].peak_flops, moved / speed):.3g}")
        for name, speed in BANDWIDTH.items()
    }
    return {"operations": int(operations), "bytes": int(moved), "bound_seconds": seconds}


def convolution(rounds: int) -> list[dict]:
    """By side of the query grid: seconds of each form, forward and with its gradients."""
    import jax
    import jax.numpy as jnp

    from deltallava_jax.config import system_config
    from deltallava_jax.models.systems.delta import grouped_convolution, split_channels

    cpu = jax.devices()[0].platform == "cpu"
    batch, dtype = (8, jnp.float32) if cpu else (64, jnp.bfloat16)
    cfg = system_config()
    width, group = split_channels(cfg)[1], cfg.block_head_dim
    kernel = 0.05 * jax.random.normal(jax.random.key(0), (3, 3, group, width), dtype)
    conv = lambda x, kernel, groups: jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups
    )

    def dense(x, kernel):
        same = jnp.arange(width)[:, None] // group == jnp.arange(width) // group
        whole = jnp.where(same, jnp.tile(kernel, (1, 1, width // group, 1)), 0)
        return conv(x, whole, 1)

    forms = {
        "grouped": lambda x, kernel: conv(x, kernel, width // group),
        "block_diagonal": dense,
        "shifted": grouped_convolution,
    }
    rows = []
    for side in (24, 12, 6):
        x = jax.random.normal(jax.random.key(1), (batch, side, side, width), dtype)
        row, outputs = {"side": side, "batch": batch, "channels": width, "group": group}, {}
        for mode in ("forward", "both"):
            calls = {}
            for name, form in forms.items():
                whole = form if mode == "forward" else jax.grad(lambda *a, form=form: form(*a).sum(), argnums=(0, 1))
                run = jax.jit(whole)
                outputs[name, mode] = run(x, kernel)
                calls[name] = lambda run=run, x=x: jax.block_until_ready(run(x, kernel))
            row[mode] = {name: float(f"{value:.4g}") for name, value in best(calls, rounds).items()}
        for name in forms:
            error = jnp.abs(outputs[name, "forward"] - outputs["grouped", "forward"]).max()
            assert error < (1e-4 if cpu else 0.1), (name, error)
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argument_parser(__spec__.name, __doc__)
    parser.add_argument("--compile-for", metavar="TARGET", help="a TPU, as for the plan command, e.g. v5e:2x2")
    parser.add_argument("--batch", type=int, default=64, help="images, where compiled")
    parser.add_argument("--rounds", type=int, default=5)
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    if options.compile_for:
        from deltallava_jax.analysis.targets import parse_target, prepare

        target = parse_target(options.compile_for)
        prepare(target)
        hardware, about = f"compiled for {target}, not run", {"target": str(target), "batch": options.batch}
        name, rows = f"fusion-{target.kind}", fusion(target, options.batch)
    else:
        if os.environ.get("JAX_PLATFORMS") == "cpu":
            two_threads()
        kind = device()[1]
        hardware, about = f"{kind}, {cores()}", {"device": kind.replace(" ", "-").lower()}
        name, rows = f"convolution-{about['device']}", convolution(options.rounds)
    made = origin(__spec__.name, sys.argv[1:], hardware, LIBRARIES)
    write_result(FOLDER / f"{name}.json", {**made, **about, "rows": rows})


if __name__ == "__main__":
    main()

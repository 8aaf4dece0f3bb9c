"""The plan's estimate of a step on this machine's CPU beside the measured step.

    python -m benchmarks.measure.plan_accuracy

For each of SIZES the train step is compiled, estimated from its program and the probe of this machine, and run. The
process has one thread and counts its CPU seconds, so that other work on the machine changes little; the seconds by
the clock are written too. The shares of the probe's rates that programs reach (analysis/estimate.py, MEASURED) were
chosen with the sizes of CHOSEN_WITH; the others check them. Writes benchmarks/results/plan_accuracy.json; a size that
it has is not measured again.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time

import numpy as np

from benchmarks.program import RESULTS, argument_parser, origin, write_result

FILE = RESULTS / "plan_accuracy.json"
SIZES = (  # width, layers, rows, tokens of a row
    (128, 4, 4, 256),
    (256, 4, 4, 256),
    (512, 4, 4, 256),
    (192, 6, 2, 384),
    (384, 2, 8, 192),
)
CHOSEN_WITH = SIZES[:3]
TEXT = 40  # tokens of text an image


def config(width: int, layers: int, rows: int, row_length: int):
    from deltallava_jax import config as c

    return c.Config(
        name=f"width_{width}",
        model=c.compose(
            c.VisionConfig(image_size=64, patch_size=8, width=64, layers=2, heads=2, mlp_width=128),
            c.DecoderConfig(
                vocab_size=2048,
                width=width,
                layers=layers,
                heads=width // 64,
                kv_heads=width // 64,
                mlp_width=3 * width,
            ),
            dict(name="mlp"),
            dtype="float32",
        ),
        data=c.DataConfig(template="brief", rows=rows, row_length=row_length, workers=0),
    )


def batch_like(shapes, vocabulary: int):
    """Rows of one conversation each, images at its beginning, every token supervised."""
    import jax

    batch = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    batch.tokens[:] = np.random.default_rng(0).integers(3, vocabulary, batch.tokens.shape)
    batch.segments[:], batch.loss_mask[:] = 1, True
    batch.image_positions[:] = np.arange(batch.image_positions.shape[1])
    return batch


def run(size: tuple[int, int, int, int], rates, steps: int) -> dict:
    """rates: of this machine's CPU, as measured."""
    import jax

    from deltallava_jax.analysis import estimate, hlo, plan
    from deltallava_jax.parallel.mesh import make_mesh, put_rows
    from deltallava_jax.training.step import TrainStep, batch_shapes, init_state

    cfg = config(*size)
    mesh = make_mesh(cfg, jax.devices()[:1])
    budget, text, images, _ = plan.first_batch(cfg, TEXT)
    step, shapes = TrainStep(cfg, mesh, plan.STEPS), batch_shapes(cfg, mesh, text, images)
    program = step.compile(shapes, budget)
    found = estimate.estimate(hlo.parse(program.as_text()), rates, 1, cfg.model.decoder.layers)
    state, batch = init_state(cfg, mesh, plan.STEPS), put_rows(batch_like(shapes, cfg.model.decoder.vocab_size), mesh)
    by_clock, by_cpu = [], []
    for _ in range(steps + 1):
        jax.block_until_ready(state)
        clock, cpu = time.perf_counter(), time.process_time()
        state, metrics = program(state, batch)
        jax.block_until_ready((state, metrics))
        by_clock.append(time.perf_counter() - clock)
        by_cpu.append(time.process_time() - cpu)
    measured = statistics.median(by_cpu[1:])
    width, layers, rows, row_length = size
    return {
        "width": width, "layers": layers, "rows": rows, "row_length": row_length, "chosen_with": size in CHOSEN_WITH,
        "estimate": round(found["estimate"], 4), "measured": round(measured, 4),
        "ratio": round(found["estimate"] / measured, 3), "by_clock": round(statistics.median(by_clock[1:]), 4),
        "estimate_products": round(found["products"], 4), "estimate_memory": round(found["memory"], 4),
        "estimate_overhead": round(found["overhead"], 4), "load": round(os.getloadavg()[0], 1),
    }  # fmt: skip


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argument_parser(__spec__.name, __doc__)
    parser.add_argument("--steps", type=int, default=7)
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-1:])  # before jax counts its threads
    import jax

    jax.config.update("jax_platforms", "cpu")
    from deltallava_jax.analysis import estimate, probe
    from deltallava_jax.analysis.targets import Target

    done = json.loads(FILE.read_text())["sizes"] if FILE.exists() else []
    chip = probe.measure(1, time.process_time)
    rates = estimate.rates(Target("cpu", (1,)), chip)
    result = {
        **origin(__spec__.name, [], f"1 of {os.cpu_count()} CPU cores", ("jax", "jaxlib")),
        "seconds": "CPU seconds of a process with one thread, median of the steps",
        "reached_of_the_probe": {"products": rates.efficiency.products, "memory": rates.efficiency.memory},
        "steps": options.steps, "sizes": done,
    }  # fmt: skip
    measured = {tuple(row[key] for key in ("width", "layers", "rows", "row_length")) for row in done}
    for size in [size for size in SIZES if size not in measured]:
        row = run(size, rates, options.steps) | {
            "probe_float32_gflops": round(chip.float32_flops / 1e9, 1),
            "probe_gb_per_second": round(chip.bandwidth / 1e9, 1),
        }
        print(row, flush=True)
        result["sizes"].append(row)
        write_result(FILE, result)


if __name__ == "__main__":
    main()

"""Train steps at Vicuna-7B's size with random weights, by visual tokens: speed, memory and the ratio to 576 tokens.

    python benchmarks/train_speed.py                          # on the GPU at hand; a result file a run
    python benchmarks/train_speed.py --stages finetune --tokens 144 --layouts packed
    python benchmarks/train_speed.py --compile-for h100:8     # without a GPU: compiles each step, says what it needs

Both stages of LLaVA's recipe at the share of one of eight devices: 32 conversations a step in stage 1, 16 in stage 2.
576 tokens is LLaVA-1.5's MLP, fewer are Delta. Texts are random tokens whose lengths follow captions in stage 1 and
an instruction mixture in stage 2 (benchmarks/data_loading.py), once padded as LLaVA's batches are, once packed."""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from datetime import date
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
RESULTS = ROOT / "benchmarks" / "results" / "train_speed"
TOKENS = (576, 144, 64, 16, 4, 1)
SHARE = 8  # of the recipe's batch, as on eight devices
# The paper's Table 4, wall-clock time of an epoch on its machine, in minutes.
PAPER = {
    "pretrain": {576: 84.0, 144: 33.5, 64: 23.4, 16: 18.6, 4: 16.5, 1: 16.0},
    "finetune": {576: 274.3, 144: 201.6, 64: 197.4, 16: 194.5, 4: 192.6, 1: 171.8},
}
CAPTIONS = ((1.0, 15, 65, 1),)  # as MIXTURE: share, text tokens from and to, images


def config(stage: str, tokens: int, layout: str, devices: int):
    """The recipe of a stage for so many devices, in padded batches or in packed rows for as many conversations."""
    from configs.llava import CONVERSATIONS, MEAN_TEXT, base

    projector = dict(name="mlp") if tokens == 576 else dict(name="delta", scale_factor=round((576 / tokens) ** 0.5))
    cfg = base("train_speed", stage, projector, tokens=tokens)
    conversations = CONVERSATIONS[stage] // SHARE * devices
    if layout == "padded":
        data = dict(rows=conversations, row_length=2048 + tokens - 1, packed=False)
    else:
        slots = conversations * (MEAN_TEXT[stage] + tokens) // devices
        rows = max(1, round(slots / 3072))
        data = dict(rows=rows * devices, row_length=128 * max(round(slots / rows / 128), 2))
    optimizer = dataclasses.replace(cfg.optimizer, accumulation=4 if layout == "padded" and stage == "finetune" else 1)
    return dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, **data), optimizer=optimizer)


def plan_of(cfg, stage: str, tokens: int, records: int = 4096):
    """The batches of random conversations."""
    from data_loading import MIXTURE, draw

    from deltallava_jax.data.packing import plan_for

    return plan_for(cfg.data, *draw(CAPTIONS if stage == "pretrain" else MIXTURE, records), (tokens,), 0)


def batch_of(cfg, plan, number: int):
    """A step's batch: random tokens and pixels, images where conversations begin, their second halves supervised."""
    from deltallava_jax.sequence import Batch

    step, rng, size = plan.step(number), np.random.default_rng(number), cfg.model.vision.image_size
    B, T, I = len(step.rows), step.text, step.images
    tokens = rng.integers(3, cfg.model.decoder.vocab_size, (B, T), np.int32)
    loss_mask, segments = np.zeros((B, T), bool), np.zeros((B, T), np.int32)
    positions = np.full((B, I), T, np.int32)
    for row, records in enumerate(step.rows):
        start = placed = 0
        for segment, record in enumerate(records, 1):
            end = min(start + int(plan.lengths[record]), T)
            segments[row, start:end], loss_mask[row, (start + end) // 2 : end] = segment, True
            if plan.images[record]:
                positions[row, placed], tokens[row, start], placed = start, 0, placed + 1
            start = end
    images = rng.integers(0, 256, (B, I, size, size, 3), np.uint8)
    return Batch(tokens, loss_mask, segments, positions, images, np.zeros((B, I, 2), np.int32))


def run(stage: str, tokens: int, layout: str, steps: int) -> dict:
    """Trains ``steps`` steps after a first one, which compiles."""
    import jax

    from deltallava_jax.analysis.flops import StepOperations
    from deltallava_jax.analysis.targets import peak_flops
    from deltallava_jax.parallel.mesh import make_mesh, put_rows
    from deltallava_jax.training.step import TrainStep, init_state

    cfg = config(stage, tokens, layout, jax.device_count())
    mesh, plan = make_mesh(cfg), plan_of(cfg, stage, tokens)
    step, state = TrainStep(cfg, mesh, 1000), init_state(cfg, mesh, 1000)
    numbers = [n for n in range(plan.steps_for(1)) if plan.step(n).images][: steps + 1]
    peak = peak_flops(jax.devices()[0].device_kind)
    needed = StepOperations(step)
    seconds, operations, counted = [], 0, {"conversations": 0, "images": 0, "tokens": 0}
    for number in numbers:
        batch = put_rows(batch_of(cfg, plan, number), mesh)
        program = step.compile(batch, tokens)
        jax.block_until_ready((state, batch))
        began = time.perf_counter()
        state, values = program(state, batch)
        jax.block_until_ready(values)
        if number != numbers[0]:
            seconds.append(time.perf_counter() - began)
            operations += needed(batch, tokens)
            counted = {key: counted[key] + int(values[key]) for key in counted}
    whole = sum(seconds)
    stats = jax.local_devices()[0].memory_stats() or {}
    return {
        "stage": stage, "tokens": tokens, "layout": layout, "rows": cfg.data.rows, "row_length": cfg.data.row_length,
        "seconds_a_step": round(statistics.median(seconds), 4),
        **{f"{key}_a_second": round(value / whole, 1) for key, value in counted.items()},
        "mfu": round(operations / whole / jax.device_count() / peak, 3) if peak else None,
        "peak_memory_gib": round(stats.get("peak_bytes_in_use", 0) / 2**30, 1),
        "date": str(date.today()), "hardware": f"{jax.device_count()} {jax.devices()[0].device_kind}",
        "versions": {"jax": jax.__version__}, "steps": len(seconds), "command": "python benchmarks/train_speed.py",
    }  # fmt: skip


def compiled(stage: str, tokens: int, layout: str, target) -> dict:
    """Compiles the step for a machine that is not there."""
    from deltallava_jax.analysis import targets
    from deltallava_jax.parallel.mesh import make_mesh
    from deltallava_jax.training.step import TrainStep, batch_shapes

    cfg = config(stage, tokens, layout, target.count)
    mesh, first = make_mesh(cfg, targets.devices(target)), plan_of(cfg, stage, tokens).step(0)
    step = TrainStep(cfg, mesh, 1000)
    memory = step.compile(batch_shapes(cfg, mesh, first.text, first.images), tokens).memory_analysis()
    gib = lambda size: round(size / 2**30, 1)
    return {
        "stage": stage, "tokens": tokens, "layout": layout, "target": str(target),
        "state_gib": gib(memory.argument_size_in_bytes), "temporary_gib": gib(memory.temp_size_in_bytes),
    }  # fmt: skip


def table(results: dict[tuple[str, int, str], dict]) -> str:
    """Conversations a second by stage and tokens, as ratios to 576, beside the paper's."""
    lines = ["stage     tokens  layout   conversations/s   ratio to 576   paper's ratio    MFU   peak GiB"]
    for (stage, tokens, layout), result in results.items():
        rate = result["conversations_a_second"]
        reference = results.get((stage, 576, layout), {}).get("conversations_a_second")
        ratio = f"{rate / reference:.2f}" if reference else "-"
        paper = PAPER[stage][576] / PAPER[stage][tokens]
        lines.append(
            f"{stage:9} {tokens:6}  {layout:7} {rate:16.1f} {ratio:>14} {paper:15.2f} {result['mfu'] or 0:6.3f} "
            f"{result['peak_memory_gib']:10.1f}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", default="finetune,pretrain")
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)))
    parser.add_argument("--layouts", default="packed,padded")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--compile-for", metavar="TARGET", help="as for the plan command, e.g. h100:8")
    options = parser.parse_args()
    from deltallava_jax.analysis.targets import parse_target, prepare

    target = parse_target(options.compile_for) if options.compile_for else None
    if target:
        prepare(target)
    RESULTS.mkdir(parents=True, exist_ok=True)
    results = {}
    for stage in options.stages.split(","):
        for tokens in map(int, options.tokens.split(",")):
            for layout in options.layouts.split(","):
                if target:
                    print(json.dumps(compiled(stage, tokens, layout, target)), flush=True)
                    continue
                file = RESULTS / f"{stage}-{tokens}-{layout}.json"
                if not file.exists():
                    file.write_text(json.dumps(run(stage, tokens, layout, options.steps), indent=2) + "\n")
                results[stage, tokens, layout] = json.loads(file.read_text())
    if results:
        print(table(results))


if __name__ == "__main__":
    main()

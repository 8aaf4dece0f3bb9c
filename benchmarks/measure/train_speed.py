"""Train steps by visual tokens: speed, memory and the ratio to 576 tokens, beside the paper's Table 4.

    python -m benchmarks.measure.train_speed --minutes 9              # on the GPU at hand, at Vicuna-7B's size
    python -m benchmarks.measure.train_speed --size small --stages finetune --layouts packed       # on a CPU
    python -m benchmarks.measure.train_speed --compile-for h100:8     # without a GPU: compiles each step alone

A run is a file in benchmarks/results/train_speed/; one that is there is kept, so that the same command goes on where
--minutes or a kill ended it. Weights are random. Both stages of LLaVA's recipe at the share of one of eight devices: 32
conversations a step in stage 1, 16 in stage 2 (small: 8 and 4). 576 tokens is LLaVA-1.5's MLP, fewer are Delta. Texts
are random tokens whose lengths follow captions in stage 1 and an instruction mixture in stage 2
(data_loading.py), once packed, once padded as LLaVA's batches are. Records without an image have steps of
their own, measured once a layout (--tokens 0). Where a device cannot hold the decoder with its optimizer, it gets fewer
layers."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import os
import re
import statistics
import time
from pathlib import Path

import numpy as np

from benchmarks.measure import sizes
from benchmarks.measure.data_loading import MIXTURE, draw
from benchmarks.program import RESULTS, argument_parser, cores, origin, write_result

FOLDER = RESULTS / "train_speed"
TOKENS = (576, 1, 144, 16, 64, 4, 0)  # the first ones give the ratio; 0: records without an image
# Of the recipe's batch, as on eight devices or on 32, and slots of a packed row, about.
SHARE, ROW = {"vicuna_7b": 8, "small": 32}, {"vicuna_7b": 3072, "small": 1536}
# The paper's Table 4, wall-clock time of an epoch on its machine, in minutes.
PAPER = {
    "pretrain": {576: 84.0, 144: 33.5, 64: 23.4, 16: 18.6, 4: 16.5, 1: 16.0},
    "finetune": {576: 274.3, 144: 201.6, 64: 197.4, 16: 194.5, 4: 192.6, 1: 171.8},
}
CAPTIONS = ((1.0, 15, 65, 1),)  # as MIXTURE: share, text tokens from and to, images
TEXT_SHARE = sum(share for share, _, _, images in MIXTURE if not images)  # of stage 2's conversations
GIB = 2**30
ROOM = {1: 16 * GIB, 4: 8 * GIB}  # bytes beside parameters, optimizer and gradients, by microbatches


def mixture(stage: str, tokens: int) -> tuple:
    kinds = CAPTIONS if stage == "pretrain" else [kind for kind in MIXTURE if bool(kind[3]) == bool(tokens)]
    whole = sum(share for share, *_ in kinds)
    return tuple((share / whole, *rest) for share, *rest in kinds)


def config(size: str, stage: str, tokens: int, layout: str, devices: int, capacity: int | None = None):
    """The recipe of a stage for so many devices, in padded batches or in packed rows for as many conversations.

    capacity: bytes of memory of a device; the decoder has as many layers, in fours, as fit."""
    from configs.llava import CONVERSATIONS, MEAN_TEXT, base

    projector = dict(name="mlp")
    if tokens != 576:
        projector = dict(name="delta", scale_factor=round((576 / max(tokens, 1)) ** 0.5))
    cfg = base("train_speed", stage, projector, tokens=tokens)
    conversations = CONVERSATIONS[stage] // SHARE[size] * devices
    if layout == "padded":
        data = dict(rows=conversations, row_length=2048 + max(tokens - 1, 0), packed=False)
    elif not tokens:
        data = dict(rows=2 * devices, row_length=max(ROW[size], 2048))
    else:
        slots = conversations * (MEAN_TEXT[stage] + tokens) // devices
        rows = max(1, round(slots / ROW[size]))
        data = dict(rows=rows * devices, row_length=128 * max(round(slots / rows / 128), 2))
    parts = 4 if (layout, stage) == ("padded", "finetune") else 1
    cfg = dataclasses.replace(
        cfg,
        model=sizes.model(size, projector),
        data=dataclasses.replace(cfg.data, **data),
        optimizer=dataclasses.replace(cfg.optimizer, accumulation=parts),
    )
    while capacity and cfg.model.decoder.layers > 4 and state_bytes(cfg) / devices + ROOM[parts] > capacity:
        decoder = dataclasses.replace(cfg.model.decoder, layers=cfg.model.decoder.layers - 4)
        cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, decoder=decoder))
    return cfg


def state_bytes(cfg) -> int:
    """Of parameters, optimizer and gradients, which microbatches hold twice: what they sum up and their own."""
    import jax

    from deltallava_jax.models import vlm
    from deltallava_jax.training.optimizer import split

    sizes_of = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
    shapes = jax.eval_shape(lambda: split(vlm.init_params(cfg.model, jax.random.key(0)), cfg.optimizer))
    gradients = 4 if cfg.optimizer.accumulation == 1 else 8
    return (12 + gradients) * sizes_of(shapes[0]) + 2 * sizes_of(shapes[1])


class Load:
    """An epoch of random conversations: its commonest batch, and what an average step of it holds."""

    def __init__(self, cfg, stage: str, tokens: int, records: int = 4096):
        from deltallava_jax.data.packing import plan_for

        self.cfg, self.lengths_images = cfg, draw(mixture(stage, tokens), records)
        self.plan = plan_for(cfg.data, *self.lengths_images, (max(tokens, 1),), 0)
        self.steps = [self.plan.step(number) for number in range(self.plan.steps_for(1) - 1)]  # the last one has gaps
        slots = lambda step: step.text + step.images * (max(tokens, 1) - 1)
        (self.text, self.images), _ = collections.Counter((s.text, s.images) for s in self.steps).most_common(1)[0]
        self.first = next(step for step in self.steps if (step.text, step.images) == (self.text, self.images))
        # Other shapes take their time in proportion to their slots.
        self.measured = sum(map(slots, self.steps)) / slots(self.first)
        kept = [(record, step.text) for step in self.steps for row in step.rows for record in row]
        records, room = (np.array(column) for column in zip(*kept, strict=True))
        lengths, images = (column[records] for column in self.lengths_images)
        live = np.minimum(lengths, room).sum() + images.sum() * (max(tokens, 1) - 1)
        self.epoch = {"conversations": len(kept), "images": int(images.sum()), "tokens": int(live)}
        self.live = live / (self.measured * slots(self.first) * cfg.data.rows)

    def batch(self):
        """Random tokens and pixels, images where conversations begin, their second halves supervised."""
        from deltallava_jax.models import systems
        from deltallava_jax.sequence import Batch

        cfg, plan, rng, side = self.cfg, self.plan, np.random.default_rng(0), self.cfg.model.vision.image_size
        B, T, I = len(self.first.rows), self.text, self.images
        batch = Batch.empty(B, T, I, side, question=systems.question_length(cfg.model.projector))
        batch.tokens[:] = rng.integers(3, cfg.model.decoder.vocab_size, (B, T), np.int32)
        for row, records in enumerate(self.first.rows):
            start = placed = 0
            for segment, record in enumerate(records, 1):
                end = min(start + int(plan.lengths[record]), T)
                batch.segments[row, start:end], batch.loss_mask[row, (start + end) // 2 : end] = segment, True
                if plan.images[record]:
                    batch.image_positions[row, placed], batch.tokens[row, start], placed = start, 0, placed + 1
                start = end
        batch.images[:] = rng.integers(0, 256, batch.images.shape, np.uint8)
        return batch


def gib(memory) -> tuple[float, float]:
    """(arguments and results, temporaries) of a compiled step."""
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return round(held / GIB, 1), round(memory.temp_size_in_bytes / GIB, 1)


def run(size: str, stage: str, tokens: int, layout: str, steps: int) -> dict:
    """Trains ``steps`` steps of the commonest shape after a first one."""
    import jax

    from deltallava_jax.analysis.flops import StepOperations
    from deltallava_jax.analysis.targets import peak_flops
    from deltallava_jax.parallel.mesh import make_mesh, put_rows
    from deltallava_jax.training.step import TrainStep, init_state

    device = jax.devices()[0]
    capacity = (device.memory_stats() or {}).get("bytes_limit")
    cfg = config(size, stage, tokens, layout, jax.device_count(), capacity)
    mesh, load = make_mesh(cfg), Load(cfg, stage, tokens)
    step, batch = TrainStep(cfg, mesh, 1000), put_rows(load.batch(), mesh)
    program = step.compile(batch, max(tokens, 1))
    operations = StepOperations(step)(batch, max(tokens, 1))
    state, seconds = init_state(cfg, mesh, 1000), []
    for _ in range(steps + 1):
        jax.block_until_ready(state)
        began = time.perf_counter()
        state, values = program(state, batch)
        jax.block_until_ready((state, values))
        seconds.append(time.perf_counter() - began)
    loss, second = float(values["loss"]), statistics.median(seconds[1:])
    peak = peak_flops(device.device_kind)
    held, temporary = gib(program.memory_analysis())
    return {
        "size": size, "stage": stage, "tokens": tokens, "layout": layout, "decoder_layers": cfg.model.decoder.layers,
        "rows": cfg.data.rows, "text": load.text, "images": load.images, "live_share_of_slots": round(load.live, 3),
        "seconds_a_step": round(second, 4), "slowest_step": round(max(seconds[1:]), 4),
        **{f"{key}_a_second": round(value / load.measured / second, 2) for key, value in load.epoch.items()},
        "mfu": round(operations / second / jax.device_count() / peak, 3) if peak else None,
        "tera_operations_a_step": round(operations / 1e12, 2), "peak_memory_gib": round(held + temporary, 1),
        "loss": round(loss, 3), "steps": steps, "load": round(os.getloadavg()[0], 1),
        **origin(__spec__.name, ["--size", size], f"{jax.device_count()} {device.device_kind}, {cores()}"),
    }  # fmt: skip


def compiled(size: str, stage: str, tokens: int, layout: str, target) -> dict:
    """Compiles the step for a machine that is not there."""
    from deltallava_jax.analysis import targets
    from deltallava_jax.parallel.mesh import make_mesh
    from deltallava_jax.training.step import TrainStep, batch_shapes

    cfg = config(size, stage, tokens, layout, target.count, target.capacity)
    mesh, load = make_mesh(cfg, targets.devices(target)), Load(cfg, stage, tokens)
    step = TrainStep(cfg, mesh, 1000)
    began = time.perf_counter()
    program = step.compile(batch_shapes(cfg, mesh, load.text, load.images), max(tokens, 1))
    held, temporary = gib(program.memory_analysis())
    return {
        "stage": stage, "tokens": tokens, "layout": layout, "target": str(target),
        "decoder_layers": cfg.model.decoder.layers, "rows": cfg.data.rows, "text": load.text, "images": load.images,
        "state_gib": held, "temporary_gib": temporary, "seconds_to_compile": round(time.perf_counter() - began),
    }  # fmt: skip


def seconds_a_conversation(results: dict, stage: str, tokens: int, layout: str) -> float | None:
    """Of the stage's whole mixture: with an image at that many tokens, and in stage 2 its share of those without one.

    results: by (stage, tokens, layout). None where a run is missing."""
    with_image, without = results.get((stage, tokens, layout)), results.get((stage, 0, layout))
    share = TEXT_SHARE if stage == "finetune" else 0.0
    if not with_image or (share and not without):
        return None
    seconds = lambda result: 1 / result["conversations_a_second"]
    return (1 - share) * seconds(with_image) + (share * seconds(without) if share else 0.0)


def read(folder: Path) -> dict[tuple[str, int, str], dict]:
    found = [json.loads(file.read_text()) for file in folder.glob("*.json")]
    order = lambda one: (one["stage"], one["layout"], -one["tokens"])
    return {(one["stage"], one["tokens"], one["layout"]): one for one in sorted(found, key=order)}


def rows(results: dict) -> list[list[str]]:
    """Stage, tokens, layout, conversations a second of the mixture, its ratio to 576 tokens, the paper's, tokens a
    second, images a second, MFU, peak memory, layers."""
    lines = []
    for (stage, tokens, layout), one in results.items():
        mean, most = (seconds_a_conversation(results, stage, count, layout) for count in (tokens, 576))
        lines.append([
            stage, str(tokens or "no image"), layout, f"{1 / mean:.2f}" if mean and tokens else "",
            f"{most / mean:.2f}" if mean and most and tokens else "",
            f"{PAPER[stage][576] / PAPER[stage][tokens]:.2f}" if tokens in PAPER[stage] else "",
            f"{one['tokens_a_second']:,.0f}", f"{one['images_a_second']:.2f}" if tokens else "",
            "" if one["mfu"] is None else f"{one['mfu']:.3f}", f"{one['peak_memory_gib']:.1f}",
            str(one["decoder_layers"]),
        ])  # fmt: skip
    return lines


HEAD = ["Stage", "Tokens", "Layout", "Conversations/s", "Ratio to 576", "Paper's ratio", "Tokens/s", "Images/s", "MFU",
        "Memory, GiB", "Layers"]  # fmt: skip


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argument_parser(__spec__.name, __doc__)
    parser.add_argument("--size", choices=sizes.SIZES, default="vicuna_7b", help=sizes.HELP)
    parser.add_argument("--stages", default="finetune,pretrain")
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)))
    parser.add_argument("--layouts", default="packed,padded")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begins no run that would end later")
    parser.add_argument("--compile-for", metavar="TARGET", help="as for the plan command, e.g. h100:8")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    began, longest = time.monotonic(), 0.0
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    from deltallava_jax.analysis.targets import parse_target, prepare

    target = parse_target(options.compile_for) if options.compile_for else None
    if target:
        prepare(target)
    asked = [
        (stage, tokens, layout)
        for layout in options.layouts.split(",")
        for stage in options.stages.split(",")
        for tokens in map(int, options.tokens.split(","))
        if tokens or stage == "finetune"
    ]
    if target:
        for one in asked:
            print(json.dumps(compiled(options.size, *one, target)), flush=True)
        return
    import jax

    kind = re.sub(r"\W+", "-", jax.devices()[0].device_kind.lower())
    folder = FOLDER / f"{options.size}-{jax.device_count()}-{kind}"
    folder.mkdir(parents=True, exist_ok=True)
    for stage, tokens, layout in asked:
        file, start = folder / f"{stage}-{tokens}-{layout}.json", time.monotonic()
        if file.exists():
            continue
        if start - began + 1.2 * longest > 60 * options.minutes:
            print(f"stopped after {(start - began) / 60:.1f} minutes; the same command goes on")
            break
        try:
            result = run(options.size, stage, tokens, layout, options.steps)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            print(f"{file.stem}: the memory does not suffice, left out; {str(error).splitlines()[0]}", flush=True)
            continue
        write_result(file, result)
        longest = max(longest, time.monotonic() - start)
        print(f"{file.stem}: {result['seconds_a_step']} s a step, {time.monotonic() - start:.0f} s in all", flush=True)
    table = [HEAD, *rows(read(folder))]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    print("\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in table))


if __name__ == "__main__":
    main()

"""Speed of answers: time to the first token and steady decoding.

    python -m benchmarks.measure.inference                        # SmolLM2-135M, float32, beside transformers' generate
    python -m benchmarks.measure.inference --workdir runs/easy_vqa    # a model of ours, at each of its budgets
    python -m benchmarks.measure.inference --random vicuna_7b --compile-for h100:1    # no GPU: compiles alone
    python -m benchmarks.measure.inference --random vicuna_7b     # random weights, CLIP ViT-L/14-336, 576 to 1 tokens
    python -m benchmarks.measure.inference --random small \\
        --out benchmarks/results/inference_small.json             # the same on a CPU

What to install for SmolLM2 is said in benchmarks/smollm2.py. Both sides run the same prompts in turns within one
process; torch does so with a thread for each core and with one alone, and the faster of the two counts. Beside the
speeds stands what the memory allows: all weights read once for a token, at the speed at which torch sums a large array
in the same rounds.
Other programs slow both sides, torch's threads more than ours: the load of the machine is written down."""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import smollm2
from benchmarks.measure import sizes
from benchmarks.program import RESULTS, argument_parser, cores, origin, write_result

PROMPTS = (
    "The capital of France is",
    "What is the boiling point of water at sea level?",
    "def fibonacci(n):",
    "Explain in one sentence why the sky is blue.",
)
TEXT = 68  # text tokens of a prompt about an image, as in the paper's measurements
PAPER = {576: 23.96, 1: 37.08}  # Figure 3: tokens a second, where section 6.5 prints them


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argument_parser(__spec__.name, __doc__)
    parser.add_argument("--workdir", type=Path)
    parser.add_argument("--random", choices=sizes.SIZES, help=sizes.HELP)
    parser.add_argument("--compile-for", metavar="TARGET", help="as plan's --target")
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--new", type=int, default=30, help="new tokens")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    return parser.parse_args(arguments)


def ours(engine, batch, visual, new: int) -> tuple[float, float]:
    """(seconds to the first token, seconds a further step)."""
    import numpy as np

    from deltallava_jax.inference.sampling import Sampling

    began = time.perf_counter()
    slots = engine.prefill(batch, *visual(), [Sampling(max_new_tokens=new)] * len(batch.tokens), -1)
    np.asarray(slots.token)
    first = time.perf_counter()
    while np.asarray(slots.active).any():
        slots, _ = engine.decode(slots)
    return first - began, (time.perf_counter() - first) / (new - 1)


def theirs(model, prompts, new: int) -> tuple[float, float]:
    import torch

    length = max(len(one.ids) for one in prompts)
    left = lambda row, value: [value] * (length - len(row)) + row
    inputs = {
        "input_ids": torch.tensor([left(one.ids.tolist(), 0) for one in prompts]),
        "attention_mask": torch.tensor([left([1] * len(one.ids), 0) for one in prompts]),
    }

    def seconds(count):
        began = time.perf_counter()
        model.generate(**inputs, max_new_tokens=count, do_sample=False, pad_token_id=0)
        return time.perf_counter() - began

    first = seconds(1)
    return first, (seconds(new) - first) / (new - 1)


def beside_torch(options: argparse.Namespace) -> list[dict]:
    import numpy as np
    import torch

    from deltallava_jax import load
    from deltallava_jax.inference.generate import bucket, prompt_batch
    from deltallava_jax.inference.model import plain_prompt

    with tempfile.TemporaryDirectory() as folder:
        reference = smollm2.write(folder)
        model = load(folder)
    reference.generation_config.eos_token_id = None
    weights = sum(p.numel() for p in reference.parameters())
    large = torch.ones(weights)
    results = []
    for rows in map(int, options.batches.split(",")):
        prompts = [plain_prompt(PROMPTS[i % len(PROMPTS)], model.tokenizer) for i in range(rows)]
        batch = prompt_batch(prompts, bucket(max(len(one.ids) for one in prompts)))
        nothing = lambda: model.engine.encode(np.zeros(0))
        ours(model.engine, batch, nothing, options.new)  # compiles
        theirs(reference, prompts, 2)
        mine, reading, threads = [], [], {count: [] for count in (1, os.cpu_count())}
        for _ in range(options.rounds):
            mine.append(ours(model.engine, batch, nothing, options.new))
            for count, other in threads.items():
                torch.set_num_threads(count)
                other.append(theirs(reference, prompts, options.new))
            began = time.perf_counter()
            large.sum()
            reading.append(time.perf_counter() - began)
        result = {"batch": rows, "load": round(os.getloadavg()[0], 1)}
        for kind, pick in (("median", np.median), ("best", np.min)):
            (a, b), e = pick(mine, axis=0), pick(reading)
            found = {count: pick(other, axis=0) for count, other in threads.items()}
            count = min(found, key=lambda count: found[count][1])
            c, d = found[count]
            result[kind] = {
                "torch_threads": count,
                "first_ms": [round(a * 1e3, 1), round(c * 1e3, 1)],
                "first_ratio": round(c / a, 2),
                "tokens_per_second": [round(rows / b, 1), round(rows / d, 1)],
                "steady_ratio": round(d / b, 2),
                "memory_allows_tokens_per_second": round(rows / e, 1),
            }
        print(json.dumps(result), flush=True)
        results.append(result)
    return results


def by_budget(options: argparse.Namespace) -> list[dict]:
    import jax
    import numpy as np

    from deltallava_jax import load
    from deltallava_jax.data.conversation import Tokenized
    from deltallava_jax.inference.generate import Engine, bucket, prompt_batch
    from deltallava_jax.models import systems

    engine = load(options.workdir).engine if options.workdir else Engine(*random_model(options.random))
    cfg, rng, results = engine.cfg, np.random.default_rng(0), []
    weights = sum(x.nbytes for x in jax.tree.leaves(engine.params["decoder"]))
    for rows in map(int, options.batches.split(",")):
        ids = rng.integers(3, min(cfg.decoder.vocab_size, 300), TEXT + 1).astype(np.int32)
        ids[1] = 0  # the image
        nothing = np.zeros(len(ids), np.int32)
        one = Tokenized(ids, nothing > 0, np.ones(1, np.int32), nothing, np.zeros((1, 0), np.int32))
        batch, side = prompt_batch([one] * rows, bucket(len(ids))), cfg.vision.image_size
        pixels = rng.integers(0, 256, (rows, side, side, 3)).astype(np.uint8)
        known = systems.budgets(cfg.projector)
        look = {budget: functools.partial(engine.encode, pixels, batch, budget=budget) for budget in known}
        for visual in look.values():
            ours(engine, batch, visual, options.new)  # compiles
        times = {budget: [] for budget in known}
        for _ in range(options.rounds):
            for budget, visual in look.items():
                times[budget].append(ours(engine, batch, visual, options.new))
        for budget, found in times.items():
            first, step = np.median(found, axis=0)
            whole = first + step * (options.new - 1)
            result = {
                "batch": rows,
                "budget": budget,
                "first_ms": round(first * 1e3, 1),
                "tokens_per_second": round(rows / step, 1),
                "new_tokens_per_second_of_the_whole_call": round(rows * options.new / whole, 1),
                "weights_gigabytes_per_second": round(weights / step / 1e9, 1),
            }
            print(json.dumps(result), flush=True)
            results.append(result)
        if options.random:
            print(ratios(results, rows))
    return results


def ratios(results: list[dict], rows: int) -> str:
    """Tokens a second of whole calls as shares of those at 576 visual tokens, beside the paper's."""
    rate = {one["budget"]: one["new_tokens_per_second_of_the_whole_call"] for one in results if one["batch"] == rows}
    paper = lambda budget: f" (the paper's: {PAPER[budget] / PAPER[576]:.2f})" if budget in PAPER else ""
    shares = [f"{budget}: {each / rate[576]:.2f}{paper(budget)}" for budget, each in rate.items()]
    return f"batch {rows}, ratio to 576 visual tokens: " + ", ".join(shares)


def random_config(size: str):
    return sizes.model(size, dict(name="delta", scale_factor=(1, 2, 3, 4, 6, 12, 24)))


def random_model(size: str):
    """(parameters, config) in the size's dtype, made on the device."""
    import jax

    from deltallava_jax.models import vlm

    cfg = random_config(size)
    shapes = jax.eval_shape(lambda: vlm.init_params(cfg, jax.random.key(0)))
    draw = jax.jit(lambda key, shape: 0.02 * jax.random.normal(key, shape, cfg.dtype), static_argnums=1)
    keys = iter(jax.random.split(jax.random.key(0), len(jax.tree.leaves(shapes))))
    return jax.tree.map(lambda leaf: draw(next(keys), leaf.shape), shapes), cfg


def compile_for(options: argparse.Namespace) -> list[dict]:
    """Compiles what the measurement runs, for one device of the target; the memory that each program takes there.

    Without a GPU the compiler makes no kernels of its own for the products, so that a single row's head is widened to
    float32 first (0.5 GiB for a 7B): on the GPU that is one fused kernel."""
    from deltallava_jax.analysis import targets

    target = targets.parse_target(options.compile_for)
    targets.prepare(target)
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import SingleDeviceSharding

    from deltallava_jax.data.conversation import Tokenized
    from deltallava_jax.inference import slots as device
    from deltallava_jax.inference.generate import bucket, prompt_batch
    from deltallava_jax.inference.sampling import Sampling, controls
    from deltallava_jax.models import decoder, systems, vlm

    place = SingleDeviceSharding(targets.devices(target)[0])
    there = lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree)
    like = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=place)
    cfg, results = random_config(options.random), []

    def serving():
        params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), vlm.init_params(cfg, jax.random.key(0)))
        return {**params, "decoder": decoder.unstacked(params["decoder"], cfg.decoder, cfg.dtype)}

    params = there(jax.eval_shape(serving))
    nothing = np.zeros(TEXT + 1, np.int32)
    one = Tokenized(nothing, nothing > 0, np.ones(1, np.int32), nothing, np.zeros((1, 0), np.int32))
    side, length = cfg.vision.image_size, bucket(len(nothing))
    for rows, budget in itertools.product(map(int, options.batches.split(",")), systems.budgets(cfg.projector)):
        batch, said = prompt_batch([one] * rows, length), controls([Sampling(max_new_tokens=options.new)] * rows, -1)
        visual = like((rows, budget, cfg.decoder.width), jnp.bfloat16)
        read = functools.partial(device.prefill, capacity=bucket(length + budget - 1 + options.new))
        slots = there(jax.eval_shape(lambda *x, read=read: read(x[0], cfg, *x[1:]), params, batch, visual, None, said))
        programs = {
            "encode": (device.encode, (like((rows, side, side, 3), jnp.uint8),), {"budget": budget}),
            "prefill": (device.prefill, (there(batch), visual, None, there(said)), read.keywords),
            "decode": (device.decode, (slots, like((), jnp.int32)), {}),
        }
        for name, (program, arguments, fixed) in programs.items():
            memory = program.lower(params, cfg, *arguments, **fixed).compile().memory_analysis()
            gib = lambda size: round(size / 2**30, 2)
            result = {
                "batch": rows,
                "budget": budget,
                "program": name,
                "arguments_gib": gib(memory.argument_size_in_bytes),
                "beside_them_gib": gib(memory.temp_size_in_bytes + memory.output_size_in_bytes),
                "in_place_gib": gib(memory.alias_size_in_bytes),
            }
            print(json.dumps(result), flush=True)
            results.append(result)
    return results


def main() -> None:
    options = parse()
    hardware = f"compiled for {options.compile_for}, not run" if options.compile_for else ""
    if options.compile_for:
        results = compile_for(options)
    else:
        results = by_budget(options) if options.workdir or options.random else beside_torch(options)
    import jax

    hardware = hardware or f"{jax.devices()[0].device_kind}, {cores()}"
    name = "compiled" if options.compile_for else "random" if options.random else "workdir"
    packages = ("jax",)
    if not (options.workdir or options.random):
        name = "smollm2"
        packages = ("jax", "torch", "transformers")
    out = options.out or RESULTS / f"inference_{name}.json"
    record = origin(__spec__.name, [Path(word).name for word in sys.argv[1:]], hardware, packages)
    record["new_tokens"] = options.new
    if not options.compile_for:
        record |= {"rounds": options.rounds, "pairs": "ours, transformers'"}
    write_result(out, record | {"results": results})
    print(f"written to {out}")


if __name__ == "__main__":
    main()

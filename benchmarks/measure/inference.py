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
Other programs slow both sides, torch's threads more than ours: the load of the machine is written down.

With --workdir or --random each pair of a batch and a budget is a row, the most telling first (144 tokens an image),
written as soon as it is measured. A call ends after --minutes; the next one of the same command on the same machine
goes on with the missing rows. Beside tokens a second stands the bound: weights and used cache read once for a token, at
the memory bandwidth of the data sheet, or where the device is not known, at which it sums a large array."""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import smollm2
from benchmarks.measure import compiled_inference, sizes
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
    parser.add_argument("--minutes", type=float, default=7, help="after which no further row is begun")
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


FIRST = (144, 576, 1)  # budgets; the others follow
# XLA makes a graph of the decode loop's body; with these options, of the whole loop and its conditional.
ONE_GRAPH = {
    "xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,DYNAMIC_SLICE_FUSION,CONDITIONAL,WHILE",
    "xla_gpu_graph_min_graph_size": 1,
}


def pairs(options: argparse.Namespace, budgets: tuple[int, ...]) -> list[tuple[int, int]]:
    """(batch, budget), the most telling first."""
    order = sorted(budgets, key=lambda budget: (FIRST.index(budget) if budget in FIRST else len(FIRST), -budget))
    return [(rows, budget) for budget in order for rows in map(int, options.batches.split(","))]


def by_budget(options: argparse.Namespace, record: dict, out: Path) -> list[dict]:
    import jax

    from deltallava_jax import load
    from deltallava_jax.inference.generate import Engine
    from deltallava_jax.models import systems

    began, results = time.monotonic(), earlier(out, record)
    engine = load(options.workdir).engine if options.workdir else Engine(*random_model(options.random))
    speed, left = bandwidth(), pairs(options, systems.budgets(engine.cfg.projector))
    left = [pair for pair in left if not any((one["batch"], one["budget"]) == pair for one in results)]
    for done, pair in enumerate(left):
        if done and time.monotonic() - began > 60 * options.minutes:
            print(f"{options.minutes:g} minutes are over; the same command measures the other {len(left) - done}")
            break
        result = measured(engine, *pair, speed, options)
        print(json.dumps(result), flush=True)
        results = sorted([*results, result], key=lambda one: (one["batch"], -one["budget"]))
        write_result(out, record | {"results": results})
        if jax.default_backend() == "gpu" and pair == pairs(options, (144,))[0]:
            result["loop_as_one_graph"] = as_one_graph(engine, *pair, options)
            print(json.dumps(result), flush=True)
            write_result(out, record | {"results": results})
    if options.random:
        for rows in map(int, options.batches.split(",")):
            print(ratios(results, rows))
    return results


def earlier(out: Path, record: dict) -> list[dict]:
    """The rows of a result file that the same command made with the same versions on the same hardware."""
    found = json.loads(out.read_text()) if out.is_file() else {}
    same = all(found.get(key) == value for key, value in record.items() if key != "date")
    return found["results"] if same and found else []


def bandwidth() -> dict:
    """Bytes a second of the device's memory: of its data sheet, else as it sums an array of a GiB."""
    import jax
    import jax.numpy as jnp

    from deltallava_jax.analysis.targets import CHIPS

    kind = jax.devices()[0].device_kind
    for chip in CHIPS.values():
        if chip.gpu and chip.gpu.name == kind:
            return {"bytes": chip.bandwidth, "source": f"data sheet of {kind}"}
    array, add = jnp.ones(2**28), jax.jit(jnp.sum)
    seconds = []
    for _ in range(6):
        began = time.perf_counter()
        add(array).block_until_ready()
        seconds.append(time.perf_counter() - began)
    return {"bytes": array.nbytes / min(seconds[1:]), "source": "sum of an array of 1 GiB"}


def token_bytes(cfg, rows: int, used: int, dtype_bytes: int) -> int:
    """Bytes that a step reads at least: every weight but the embedding's unused rows, keys and values of ``used``
    positions a row."""
    import jax

    from deltallava_jax.models import decoder

    shapes = jax.eval_shape(lambda: decoder.init_params(cfg, jax.random.key(0)))
    parts = shapes if cfg.tied_head else {key: shapes[key] for key in ("layers", "head")}
    weights = sum(leaf.size for leaf in jax.tree.leaves(parts))
    return dtype_bytes * (weights + rows * used * 2 * cfg.layers * cfg.kv_heads * cfg.head_dim)


def asked(engine, rows: int, budget: int):
    """(prompts, the function that makes their visual tokens)"""
    import numpy as np

    from deltallava_jax.inference.generate import bucket, prompt_batch

    cfg, rng = engine.cfg, np.random.default_rng(0)
    ids = rng.integers(3, min(cfg.decoder.vocab_size, 300), TEXT + 1).astype(np.int32)
    ids[1] = 0  # the image
    batch, side = prompt_batch([prompt(ids)] * rows, bucket(len(ids))), cfg.vision.image_size
    pixels = rng.integers(0, 256, (rows, side, side, 3)).astype(np.uint8)
    return batch, functools.partial(engine.encode, pixels, batch, budget=budget)


def measured(engine, rows: int, budget: int, speed: dict, options: argparse.Namespace) -> dict:
    import jax.numpy as jnp
    import numpy as np

    cfg, (batch, look) = engine.cfg, asked(engine, rows, budget)
    ours(engine, batch, look, options.new)  # compiles
    first, step = np.median([ours(engine, batch, look, options.new) for _ in range(options.rounds)], axis=0)
    least = token_bytes(cfg.decoder, rows, TEXT + budget + options.new // 2, jnp.dtype(cfg.dtype).itemsize)
    return {
        "batch": rows,
        "budget": budget,
        "first_ms": round(first * 1e3, 1),
        "tokens_per_second": round(rows / step, 1),
        "bound_tokens_per_second": round(rows * speed["bytes"] / least, 1),
        "share_of_the_bound": round(least / speed["bytes"] / step, 3),
        "bandwidth": speed["source"],
        "new_tokens_per_second_of_the_whole_call": round(rows * options.new / (first + step * (options.new - 1)), 1),
    }


def as_one_graph(engine, rows: int, budget: int, options: argparse.Namespace) -> dict:
    """The decode loop of ``ours``, compiled with ONE_GRAPH."""
    import jax
    import numpy as np

    from deltallava_jax.inference import slots as device
    from deltallava_jax.inference.sampling import Sampling

    batch, look = asked(engine, rows, budget)
    visual, program, seconds = look(), None, []
    for _ in range(options.rounds + 1):
        slots = engine.prefill(batch, *visual, [Sampling(max_new_tokens=options.new)] * rows, -1)
        if program is None:
            try:
                lowered = device.decode.lower(engine.params, engine.cfg, slots, device.CHUNK)
                program = lowered.compile(compiler_options=ONE_GRAPH)
            except jax.errors.JaxRuntimeError as error:
                return {"refused": str(error).splitlines()[0]}
        np.asarray(slots.token)
        began = time.perf_counter()
        while np.asarray(slots.active).any():
            slots, _ = program(engine.params, slots, device.CHUNK)
        seconds.append((time.perf_counter() - began) / (options.new - 1))
    return {"tokens_per_second": round(rows / float(np.median(seconds[1:])), 1)}


def prompt(ids):
    """With an image at its second token."""
    import numpy as np

    from deltallava_jax.data.conversation import Tokenized

    nothing = np.zeros(len(ids), np.int32)
    return Tokenized(ids, nothing > 0, np.ones(1, np.int32), nothing, np.zeros((1, 0), np.int32))


def ratios(results: list[dict], rows: int) -> str:
    """Tokens a second of whole calls as shares of those at 576 visual tokens, beside the paper's."""
    rate = {one["budget"]: one["new_tokens_per_second_of_the_whole_call"] for one in results if one["batch"] == rows}
    if 576 not in rate:
        return f"batch {rows}: 576 visual tokens are not measured yet"
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


def main() -> None:
    options = parse()
    if options.compile_for and not options.random:
        sys.exit("--compile-for needs --random")
    if options.compile_for:
        compiled_inference.prepare(options.compile_for)
    import jax

    hardware = f"compiled for {options.compile_for}, not run" if options.compile_for else ""
    hardware = hardware or f"{jax.devices()[0].device_kind}, {cores()}"
    name = "compiled" if options.compile_for else "random" if options.random else "workdir"
    packages = ("jax",)
    if not (options.workdir or options.random):
        name = "smollm2"
        packages = ("jax", "torch", "transformers")
    out = options.out or RESULTS / f"inference_{name}.json"
    record = origin(__spec__.name, [Path(word).name for word in sys.argv[1:]], hardware, packages)
    record["new_tokens"] = options.new
    if options.compile_for:
        results = compiled_inference.programs(random_config(options.random), options)
    else:
        record |= {"rounds": options.rounds, "pairs": "ours, transformers'"}
        results = by_budget(options, record, out) if options.workdir or options.random else beside_torch(options)
    write_result(out, record | {"results": results})
    print(f"written to {out}")


if __name__ == "__main__":
    main()

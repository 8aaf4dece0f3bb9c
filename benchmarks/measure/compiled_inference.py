"""What an answer's programs need on a machine that is not at hand: memory, the bytes of a token beside the least, on
GPUs the launches of a token. A part of ``benchmarks.measure.inference --compile-for``.

Without a GPU the compiler cannot measure kernels, so all products are cuBLAS's."""

from __future__ import annotations

import functools
import json
import os
import re
import tempfile
import time
from pathlib import Path

from deltallava_jax.analysis import costs, hlo, targets

DUMP = "--xla_dump_to={} --xla_dump_hlo_module_re=jit_decode.*"
UNUSED = "choose/cond"  # the sampler's drawing, which greedy answers skip


def prepare(text: str) -> None:
    """To be called before JAX initializes its devices."""
    target = targets.parse_target(text)
    if target.is_gpu:
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DUMP.format(_dump().name)}".strip()
    targets.prepare(target)


@functools.cache
def _dump() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory()


def programs(cfg, options) -> list[dict]:
    """Of each batch and budget: the programs that ``measured`` runs, compiled for one device of the target."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import SingleDeviceSharding

    from benchmarks.measure import inference
    from deltallava_jax.inference import slots as device
    from deltallava_jax.inference.generate import bucket, prompt_batch
    from deltallava_jax.inference.sampling import Sampling, controls
    from deltallava_jax.models import decoder, systems, vlm

    target = targets.parse_target(options.compile_for)
    place = SingleDeviceSharding(targets.devices(target)[0])
    there = lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree)
    like = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    def serving():
        params = jax.tree.map(lambda x: x.astype(cfg.dtype), vlm.init_params(cfg, jax.random.key(0)))
        return {**params, "decoder": decoder.unstacked(params["decoder"], cfg.decoder, cfg.dtype)}

    params, results = there(jax.eval_shape(serving)), []
    weights = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params["decoder"]))
    one = inference.prompt(np.zeros(inference.TEXT + 1, np.int32))
    side, length = cfg.vision.image_size, bucket(len(one.ids))
    began = time.monotonic()
    for rows, budget in inference.pairs(options, systems.budgets(cfg.projector)):
        if results and time.monotonic() - began > 60 * options.minutes:
            break
        batch, said = prompt_batch([one] * rows, length), controls([Sampling(max_new_tokens=options.new)] * rows, -1)
        visual = like((rows, budget, cfg.decoder.width), cfg.dtype)
        read = functools.partial(device.prefill, capacity=bucket(length + budget - 1 + options.new))
        slots = there(jax.eval_shape(lambda *x, read=read: read(x[0], cfg, *x[1:]), params, batch, visual, None, said))
        used = inference.TEXT + budget + options.new // 2
        lengths = tuple(device.read_length(used, cache, weights) for cache in slots.caches)
        runs = {
            "decode": (device.decode, (slots, like((), jnp.int32)), {"read": lengths}),
            "prefill": (device.prefill, (there(batch), visual, None, there(said)), read.keywords),
            "encode": (device.encode, (like((rows, side, side, 3), jnp.uint8),), {"budget": budget}),
        }
        for name, (program, arguments, fixed) in runs.items():
            compiled = program.lower(params, cfg, *arguments, **fixed).compile()
            result = {"batch": rows, "budget": budget, "program": name} | memory(compiled)
            if name == "decode":
                least = inference.token_bytes(cfg.decoder, rows, used, jnp.dtype(cfg.dtype).itemsize)
                moved = bytes_of_a_token(compiled.as_text())
                result |= {
                    "used": used,
                    "read": lengths[0],
                    "capacity": slots.caches[0].live.shape[1],
                    "gigabytes_a_token": round(moved / 1e9, 3),
                    "least_gigabytes_a_token": round(least / 1e9, 3),
                    "moved_over_least": round(moved / least, 3),
                }
                if target.chip:
                    result["bound_tokens_per_second"] = round(rows * target.chip.bandwidth / least, 1)
                if target.is_gpu:
                    result |= launches()
            print(json.dumps(result), flush=True)
            results.append(result)
    return results


def memory(compiled) -> dict:
    found = compiled.memory_analysis()
    gib = lambda size: round(size / 2**30, 2)
    return {
        "arguments_gib": gib(found.argument_size_in_bytes),
        "beside_them_gib": gib(found.temp_size_in_bytes + found.output_size_in_bytes),
        "in_place_gib": gib(found.alias_size_in_bytes),
    }


def bytes_of_a_token(text: str) -> int:
    """Bytes that one iteration of the decode program's loop moves, by its optimized program."""
    program = hlo.parse(text)
    counter = costs.Counter(program)
    (loop,) = (each for each in program.computations[program.entry].values() if each.opcode == "while")
    body = re.search(r"body=%?([\w.-]+)", loop.rest).group(1)
    return sum(cost.bytes * cost.count for cost in counter.walk(body, 1) if UNUSED not in cost.source)


def launches() -> dict:
    """What the host launches for a token on a GPU whose driver knows graphs of library calls (CUDA 12.3): graphs, the
    kernels in them, and others with the conditional of the sampler, which the host waits for. From XLA's dump of the
    program that was compiled last."""
    (file,) = Path(_dump().name).glob("*.thunk_sequence_after_thunk_passes.txt")
    lines = file.read_text().split("\n")
    for other in Path(_dump().name).iterdir():
        other.unlink()
    inside = lines[next(i for i, line in enumerate(lines) if line == "  body:") + 1 :]
    kinds = [re.match(r"( *)\d+: (k\w+)", line) for line in inside]
    kinds = [(len(found.group(1)), found.group(2)) for found in kinds if found]
    top = [kind for depth, kind in kinds if depth == 4]
    graphs, within, depths = top.count("kCommandBuffer"), 0, False
    for depth, kind in kinds:
        depths = kind == "kCommandBuffer" if depth == 4 else depths
        within += depth == 8 and depths
    return {"graphs_a_token": graphs, "kernels_in_graphs": within, "other_launches": len(top) - graphs}

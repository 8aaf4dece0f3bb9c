"""Would int8 weights leave the answers as they are? SmolLM2-135M through qwix, against its own float32.

    pip install qwix && python -m benchmarks.measure.int8

The layers' matrices are quantised by qwix, symmetrically: one scale an output channel, or one for 64 inputs of each.
Twenty prompts are answered greedily, 32 tokens each. ``tokens``: the next token is the same after float32's own answer
so far; ``answers``: all 32 are the same. bfloat16 weights and computing stand beside as a measure. The speed is that
of the matrix products of one token, all layers, as the engine and as qwix.dot_general compute them.
int8 changes more answers than bfloat16 does, and on CPUs it is slower by far: the engine has no int8 weights."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import tempfile
from pathlib import Path

from benchmarks import smollm2
from benchmarks.measure.smollm2_parity import NEVER, NEW_TOKENS, PROMPTS
from benchmarks.measure.timing import alternate
from benchmarks.program import RESULTS, argument_parser, cores, origin, write_result

ROUNDS = 20


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argument_parser(__spec__.name, __doc__)
    parser.add_argument("--out", type=Path, default=RESULTS / "int8_smollm2.json")
    return parser.parse_args(arguments)


def main() -> None:
    out = parse().out
    import jax
    import jax.numpy as jnp
    import numpy as np
    import qwix

    from deltallava_jax import load
    from deltallava_jax.data.conversation import Tokenized
    from deltallava_jax.inference.generate import Engine, prompt_batch
    from deltallava_jax.inference.model import plain_prompt
    from deltallava_jax.inference.sampling import Sampling
    from deltallava_jax.models import vlm
    from deltallava_jax.models.layers import output_major

    jax.config.update("jax_default_matmul_precision", "highest")
    with tempfile.TemporaryDirectory() as folder:
        smollm2.write(folder)
        model = load(folder)
    prompts = [plain_prompt(prompt, model.tokenizer) for prompt in PROMPTS]
    length = max(len(one.ids) for one in prompts)
    batch, sampling = prompt_batch(prompts, length), Sampling(max_new_tokens=NEW_TOKENS)

    def answers(params, cfg):
        return np.array(Engine(params, cfg).tokens(batch, sampling=sampling, end=NEVER))

    expected = answers(model.params, model.cfg)

    def after(one: Tokenized, said) -> Tokenized:
        ids = np.concatenate([one.ids, said]).astype(np.int32)
        return Tokenized(ids, ids < 0, one.image_positions, 0 * ids, one.questions)

    whole = prompt_batch([after(*both) for both in zip(prompts, expected, strict=True)], length + NEW_TOKENS)
    places = np.array([len(one.ids) - 1 for one in prompts])[:, None] + np.arange(NEW_TOKENS)

    def compared(params, cfg):
        said = answers(params, cfg)
        logits = jax.jit(lambda params: vlm.logits(params, cfg, whole).argmax(-1))(params)
        tokens = np.take_along_axis(np.asarray(logits), places, axis=1)
        return {
            "tokens": round(float((tokens == expected).mean()), 4),
            "answers": f"{int((said == expected).all(1).sum())} of {len(prompts)}",
        }

    def matrices(change):
        """The parameters with each matrix of the layers changed."""
        leaf = lambda path, x: change(x) if path[-1].key == "kernel" else x
        return {"decoder": jax.tree_util.tree_map_with_path(leaf, model.params["decoder"])}

    forms = {
        f"int8, {name}": jax.jit(lambda x, tiles=tiles: qwix.quantize(x, jnp.int8, channelwise_axes=(0,), **tiles))
        for name, tiles in {"a scale a channel": {}, "a scale for 64": {"tiled_axes": {1: 64}}}.items()
    }
    kernels = [x for path, x in jax.tree_util.tree_leaves_with_path(model.params["decoder"]["layers"])
               if path[-1].key == "kernel"]  # fmt: skip
    bytes_of = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))
    results = [{"weights": "float32", "bytes": bytes_of(kernels), **compared(model.params, model.cfg)}]
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), model.params)
    results.append({"weights": "bfloat16", "bytes": bytes_of(kernels) // 2}
                   | compared(half, dataclasses.replace(model.cfg, dtype="bfloat16")))  # fmt: skip
    for name, quantise in forms.items():
        there_and_back = lambda x, quantise=quantise: qwix.dequantize(quantise(x))
        size = sum(bytes_of(quantise(x)) for x in kernels)
        results.append({"weights": name, "bytes": size, **compared(matrices(there_and_back), model.cfg)})

    rows = {width: jnp.ones((1, width)) for width in {x.shape[1] for x in kernels}}
    numbers = (((1,), (1,)), ((), ()))
    ways = {"float32": (kernels, jax.jit(lambda all: [output_major(x, rows[x.shape[1]]) for x in all]))}
    by_qwix = jax.jit(lambda all: [qwix.dot_general(rows[x.shape[1]], x, numbers) for x in all])
    ways |= {name: ([quantise(x) for x in kernels], by_qwix) for name, quantise in forms.items()}
    calls = {
        name: lambda weights=weights, run=run: jax.block_until_ready(run(weights))
        for name, (weights, run) in ways.items()
    }
    seconds = alternate(calls, ROUNDS)
    for result in results:
        if result["weights"] in seconds:
            result["products_ms"] = round(1e3 * float(np.median(seconds[result["weights"]])), 1)
        print(json.dumps(result))
    record = {
        **origin(__spec__.name, [], f"{jax.devices()[0].device_kind}, {cores()}", ("jax", "qwix")),
        "weights": smollm2.gguf().name,
        "load": round(os.getloadavg()[0], 1),
        "new_tokens": NEW_TOKENS,
        "results": results,
    }
    write_result(out, record)
    print(f"written to {out}")


if __name__ == "__main__":
    main()

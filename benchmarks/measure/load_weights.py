"""Seconds to load a Vicuna-7B-sized checkpoint of random weights from local safetensors onto one device.

    python -m benchmarks.measure.load_weights --folder /local/disk --layers 32
    python -m benchmarks.measure.load_weights --compile-for h100:1      # no GPU: compile what runs on it alone

The peer is reading the same files and doing nothing with them: the ratio says how far loading is from the disk."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.program import RESULTS, argument_parser, cores, origin, write_result
from deltallava_jax.analysis.targets import Target, devices, parse_target, prepare


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argument_parser(__spec__.name, __doc__)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where the checkpoint is made")
    parser.add_argument("--layers", type=int, default=32, help="fewer for a trial")
    parser.add_argument("--shards", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS / "load_weights.json")
    parser.add_argument("--compile-for", metavar="TARGET", help="as for the plan command, e.g. h100:1")
    return parser.parse_args(arguments)


def make(folder: Path, layers: int, shards: int) -> int:
    """Writes the checkpoint; its bytes. Weights are one random block repeated: only their size matters."""
    import ml_dtypes
    import numpy as np
    from safetensors.numpy import save_file

    from deltallava_jax.config import DecoderConfig, preset
    from deltallava_jax.convert.export import HF_DECODER
    from deltallava_jax.convert.families import Llama

    cfg = preset(DecoderConfig, "vicuna_7b", layers=layers)
    (folder / "config.json").write_text(json.dumps(Llama.to_hf(cfg)))
    names = [(name, shape) for name, shape in tensors(cfg, HF_DECODER)]
    block = np.random.default_rng(0).standard_normal(2**20).astype(ml_dtypes.bfloat16)
    index = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = names[number * len(names) // shards : (number + 1) * len(names) // shards]
        save_file({name: np.resize(block, shape) for name, shape in part}, folder / file, {"format": "pt"})
        index |= {name: file for name, _ in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def tensors(cfg, layout):
    """(torch name, torch shape) of every tensor."""
    import jax

    from deltallava_jax.config import ModelConfig
    from deltallava_jax.models import vlm
    from deltallava_jax.models.names import flatten

    model = ModelConfig(None, None, cfg)
    shapes = flatten(jax.eval_shape(lambda: vlm.init_params(model, jax.random.key(0))))
    for entry in layout.name_table(model):
        shape = shapes[entry.path].shape
        for name in entry.torch_names(shape):
            yield name, entry.torch_shape(shape)


def compile_for(target: Target, layers: int) -> None:
    """Compiles every step of the loading that runs on the device for one GPU of the target."""
    import jax
    from jax.sharding import SingleDeviceSharding

    from deltallava_jax.config import DecoderConfig, ModelConfig, preset
    from deltallava_jax.convert.arrays import inserter, to_ours
    from deltallava_jax.convert.export import HF_DECODER
    from deltallava_jax.models import vlm
    from deltallava_jax.models.names import flatten

    place = SingleDeviceSharding(devices(target)[0])
    model = ModelConfig(None, None, preset(DecoderConfig, "vicuna_7b", layers=layers))
    shapes = flatten(jax.eval_shape(lambda: vlm.init_params(model, jax.random.key(0))))
    whole = peak = 0
    struct = lambda shape: jax.ShapeDtypeStruct(shape, jax.numpy.bfloat16, sharding=place)
    for entry in HF_DECODER.name_table(model):
        shape = shapes[entry.path].shape
        tensor, dtype = entry.torch_shape(shape), jax.numpy.bfloat16
        if entry.stacked:
            step = inserter(entry, dtype, place).lower(struct(shape), struct((1, *tensor)), 0)
        else:
            step = to_ours(entry, dtype, place).lower(struct(tensor))
        memory = step.compile().memory_analysis()
        whole += memory.output_size_in_bytes
        peak = max(peak, memory.argument_size_in_bytes + memory.temp_size_in_bytes)
        print(f"{entry.path:36} {str(shape):24} compiled")
    kind = topology.devices[0].device_kind
    print(f"{kind}: {whole / 2**30:.1f} GiB of parameters, {peak / 2**30:.1f} GiB at most to move one")


def main() -> None:
    options = parse()
    if options.compile_for:
        target = parse_target(options.compile_for)
        prepare(target)
        compile_for(target, options.layers)
        return
    import jax

    from deltallava_jax.convert.read import read

    folder = Path(tempfile.mkdtemp(prefix="load_weights-", dir=options.folder))
    try:
        size = make(folder, options.layers, options.shards)
        print(f"made {size / 1e9:.1f} GB in {folder}")
        began = time.perf_counter()
        for file in folder.glob("*.safetensors"):
            with file.open("rb", buffering=0) as opened:
                while opened.read(2**24):
                    pass
        reading = time.perf_counter() - began
        began = time.perf_counter()
        jax.block_until_ready(read(folder).params)
        loading = time.perf_counter() - began
    finally:
        shutil.rmtree(folder)
    result = {
        **origin(__spec__.name, sys.argv[1:], f"{jax.devices()[0].device_kind}, {cores()}"),
        "gigabytes": round(size / 1e9, 2),
        "layers": options.layers,
        "seconds_to_load": round(loading, 2),
        "seconds_to_read_the_files": round(reading, 2),
        "ratio": round(loading / reading, 2),
        "note": "the files were just written, so both may read them from memory",
    }
    write_result(options.out, result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()

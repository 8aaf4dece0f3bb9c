"""Conversion and loading need the memory of the model and of one shard, not of two models: tried on 600 MB in three."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

ROOT = Path(__file__).parents[2]
MB = 10**6
ROOM = 500 * MB  # Python, JAX, compiled programs, buffers
WIDTH, MLP, LAYERS, VOCAB = 2048, 5632, 3, 34000

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads Linux's account of memory")

# The peak of the process itself, in bytes. Not getrusage: that counts the parent process as well.
PROGRAM = """
import sys
from pathlib import Path
import jax
import deltallava_jax
from deltallava_jax.convert.read import read
from deltallava_jax.convert.workdir import write_workdir
from deltallava_jax.convert.export import write_hf

source, how, target = sys.argv[1:]
if how == "load":
    model = deltallava_jax.load(source, tensor=2)
else:
    model = read(Path(source), progress=False)
if how in ("workdir", "hf"):
    Path(target).mkdir()
if how == "workdir":
    write_workdir(model, Path(target), "model")
if how == "hf":
    write_hf(model, Path(target), 200 * 10**6)
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
print(sum(leaf.nbytes for leaf in jax.tree.leaves(model.params)), int(status["VmHWM"].split()[0]) * 1024)
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A LlamaForCausalLM in bfloat16; removed afterwards."""
    folder = tmp_path_factory.mktemp("large")
    config = dict(
        architectures=["LlamaForCausalLM"], model_type="llama", vocab_size=VOCAB, hidden_size=WIDTH,
        intermediate_size=MLP, num_hidden_layers=LAYERS, num_attention_heads=16, num_key_value_heads=16,
    )  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    shards = [{"model.embed_tokens.weight": (VOCAB, WIDTH)}, {"lm_head.weight": (VOCAB, WIDTH)}, {}]
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        shapes = {f"{layer}.self_attn.{name}_proj.weight": (WIDTH, WIDTH) for name in "qkvo"}
        shapes |= {f"{layer}.mlp.{name}_proj.weight": (MLP, WIDTH) for name in ("gate", "up")}
        shapes |= {f"{layer}.mlp.down_proj.weight": (WIDTH, MLP)}
        shapes |= {f"{layer}.{name}_layernorm.weight": (WIDTH,) for name in ("input", "post_attention")}
        for place, (name, shape) in enumerate(shapes.items()):  # the last shard has twice the layers' tensors
            shards[(2, 0, 2, 1)[place % 4]][name] = shape
    shards[2]["model.norm.weight"] = (WIDTH,)
    some = np.random.default_rng(0).standard_normal(10**6, np.float32).astype(ml_dtypes.bfloat16)
    where = {}
    for i, shapes in enumerate(shards):
        file = f"model-{i + 1:05d}-of-00003.safetensors"
        save_file({name: np.resize(some, shape) for name, shape in shapes.items()}, folder / file, {"format": "pt"})
        where |= dict.fromkeys(shapes, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    sizes = [file.stat().st_size for file in sorted(folder.glob("*.safetensors"))]
    assert 550 * MB < sum(sizes) < 650 * MB and all(150 * MB < size < 250 * MB for size in sizes), sizes
    yield folder
    for file in folder.iterdir():
        file.unlink()


@pytest.mark.parametrize("how", ["read", "load", "workdir", "hf"])
def test_the_peak_is_the_model_and_a_shard(source, tmp_path, how):
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "JAX_ENABLE_COMPILATION_CACHE": "false",
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, source, how, tmp_path / "made"],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    arrays, peak = map(int, done.stdout.split())
    for file in (tmp_path / "made").rglob("*"):
        if file.is_file():
            file.unlink()
    assert arrays == 2 * _parameters()
    allowed = max(file.stat().st_size for file in source.glob("*.safetensors")) + arrays + ROOM
    print(f"{how}: {peak / MB:.0f} MB at most; the model has {arrays / MB:.0f} MB, allowed are {allowed / MB:.0f} MB")
    assert peak < allowed, f"{peak / MB:.0f} MB, allowed are {allowed / MB:.0f} MB"


def _parameters() -> int:
    layer = 4 * WIDTH**2 + 3 * WIDTH * MLP + 2 * WIDTH
    return LAYERS * layer + 2 * math.prod((VOCAB, WIDTH)) + WIDTH

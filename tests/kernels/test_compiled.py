"""The kernels as the real compilers for TPUs and H100s make them, where those are installed: forward and backward,
windowed attention at every budget with no copy of keys or values, dense attention without scores."""

import re

import jax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from deltallava_jax.analysis import targets
from deltallava_jax.kernels.attention import attention, causal
from deltallava_jax.kernels.windowed_attention import windowed_attention

GRID, HEADS, BATCH = 24, 8, 64
CALLS = {"h100": "mosaic_gpu", "v5e": "tpu_custom_call", "v5p": "tpu_custom_call"}
MACHINES = [
    pytest.param(
        targets.parse_target(name),
        id=name,
        marks=pytest.mark.skipif(
            not targets.installed(targets.parse_target(name)), reason=f"needs the compiler for {name}: {install}"
        ),
    )
    for name, install in (
        ("v5e:2x2", "pip install -r requirements-plan.txt"),
        ("v5p:2x2x1", "pip install -r requirements-plan.txt"),
        ("h100:4", "pip install 'jax[cuda13]'"),
    )
]


def compiled(target, scale, shards=1, window=1):
    """The program of forward and backward, BATCH images a device."""
    targets.prepare(target)
    mesh = jax.make_mesh((shards,), ("data",), axis_types=(AxisType.Auto,), devices=targets.devices(target)[:shards])
    rows = NamedSharding(mesh, P("data"))
    side = GRID // scale
    q, k = (jax.ShapeDtypeStruct((shards * BATCH, n, n, HEADS * 128), "bfloat16", sharding=rows) for n in (side, GRID))

    def run(q, k, v, do):
        heads = lambda x: x.reshape(*x.shape[:3], HEADS, 128)
        attention = lambda *x: windowed_attention(*map(heads, x), window=window, implementation="pallas").reshape(
            q.shape
        )
        out, pull = jax.vjp(attention, q, k, v)
        return out, *pull(do)

    with jax.set_mesh(mesh):
        return jax.jit(run).lower(q, k, k, q).compile()


@pytest.mark.parametrize("scale", [1, 2, 3, 4, 6, 8, 12, 24])
@pytest.mark.parametrize("target", MACHINES)
def test_both_kernels_compile_at_every_budget(target, scale):
    program = compiled(target, scale)
    calls = re.findall(r'custom_call_target="([^"]+)"', program.as_text())
    assert sum(CALLS[target.kind] in call for call in calls) == 2, calls
    # The queries and the output may be laid out anew, keys and values not.
    assert program.memory_analysis().temp_size_in_bytes < BATCH * GRID**2 * HEADS * 128


@pytest.mark.parametrize("scale, window", [(1, 4), (2, 2), (3, 8), (6, 2)])
@pytest.mark.parametrize("target", [machine for machine in MACHINES if machine.values[0].kind == "v5e"])
def test_windows_of_several_queries_compile(target, scale, window):
    calls = re.findall(r'custom_call_target="([^"]+)"', compiled(target, scale, window=window).as_text())
    assert sum(CALLS[target.kind] in call for call in calls) == 2, calls


@pytest.mark.parametrize("target", MACHINES)
def test_devices_exchange_nothing(target):
    text = compiled(target, 2, shards=2).as_text()
    assert not re.findall(r"all-gather|all-reduce|all-to-all|collective-permute", text)


ROWS = 4
DENSE = {"h100": ("cudnn", r"__cudnn\$fmha", 2), "v5e": ("splash", "tpu_custom_call", 3)}


@pytest.mark.parametrize("target", [machine for machine in MACHINES if machine.values[0].kind in DENSE])
@pytest.mark.parametrize("packed, length", [(True, 2048), (False, 577)])  # a decoder's rows, and CLIP's patches
def test_dense_attention_on_four_devices(target, packed, length):
    """Rows over fsdp and heads over tensor: each device runs the kernels on its own part and exchanges nothing."""
    targets.prepare(target)
    name, call, count = DENSE[target.kind]
    devices = targets.devices(target)[:4]
    mesh = jax.make_mesh((1, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3, devices=devices)
    spec = lambda *axes: NamedSharding(mesh, P(("data", "fsdp"), *axes))
    q, k = (
        jax.ShapeDtypeStruct((ROWS, length, heads, 128), "bfloat16", sharding=spec(None, "tensor")) for heads in (28, 4)
    )
    segments = jax.ShapeDtypeStruct((ROWS, length), "int32", sharding=spec())

    def run(q, k, v, do, segments):
        seen = causal(segments) if packed else None
        out, pull = jax.vjp(lambda *qkv: attention(*qkv, seen, implementation=name), q, k, v)
        return out, *pull(do)

    with jax.set_mesh(mesh), jax.default_matmul_precision("default"):
        program = jax.jit(run).lower(q, k, k, q, segments).compile()
    text = program.as_text()
    assert len(re.findall(rf'custom_call_target="{call}', text)) == count
    assert not re.findall(r"all-gather|all-reduce|all-to-all|collective-permute", text)
    scores = ROWS // 2 * 28 // 2 * length**2 * 4
    assert program.memory_analysis().temp_size_in_bytes < scores / (4 if packed else 1)

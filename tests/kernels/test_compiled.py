"""The kernels as the real compilers for TPUs and H100s make them, where those are installed: forward and backward at
every budget, with no copy of keys or values."""

import re

import jax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from deltallava_jax.analysis import targets
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
        ("h100:2", "pip install 'jax[cuda13]'"),
    )
]


def compiled(target, scale, shards=1):
    """The program of forward and backward, BATCH images a device."""
    targets.prepare(target)
    mesh = jax.make_mesh((shards,), ("data",), axis_types=(AxisType.Auto,), devices=targets.devices(target)[:shards])
    rows = NamedSharding(mesh, P("data"))
    side = GRID // scale
    q, k = (jax.ShapeDtypeStruct((shards * BATCH, n, n, HEADS * 128), "bfloat16", sharding=rows) for n in (side, GRID))

    def run(q, k, v, do):
        heads = lambda x: x.reshape(*x.shape[:3], HEADS, 128)
        attention = lambda *x: windowed_attention(*map(heads, x), implementation="pallas").reshape(q.shape)
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


@pytest.mark.parametrize("target", MACHINES)
def test_devices_exchange_nothing(target):
    text = compiled(target, 2, shards=2).as_text()
    assert not re.findall(r"all-gather|all-reduce|all-to-all|collective-permute", text)

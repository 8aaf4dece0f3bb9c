"""The kernels compiled for TPUs and H100s, where those compilers are installed, forward and backward: windowed
attention at every budget with no copy of keys or values, dense attention without scores."""

import re

import jax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from deltallava_jax.analysis import targets
from deltallava_jax.config import DecoderConfig, VisionConfig
from deltallava_jax.kernels.attention import attention, causal
from deltallava_jax.kernels.windowed_attention import windowed_attention
from deltallava_jax.models import decoder, vision
from deltallava_jax.sequence import text_layout

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
    """The program of forward and backward, BATCH images per device."""
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
    # Queries and output may be copied to another layout, keys and values not.
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
    """Rows over fsdp and heads over tensor: each device runs the kernels on its own shard, without collectives."""
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
        mask = causal(segments) if packed else None
        out, pull = jax.vjp(lambda *qkv: attention(*qkv, mask, implementation=name), q, k, v)
        return out, *pull(do)

    with jax.set_mesh(mesh), jax.default_matmul_precision("default"):
        program = jax.jit(run).lower(q, k, k, q, segments).compile()
    text = program.as_text()
    assert len(re.findall(rf'custom_call_target="{call}', text)) == count
    assert not re.findall(r"all-gather|all-reduce|all-to-all|collective-permute", text)
    scores = ROWS // 2 * 28 // 2 * length**2 * 4
    assert program.memory_analysis().temp_size_in_bytes < scores / (4 if packed else 1)


@pytest.mark.parametrize("target", [machine for machine in MACHINES if machine.values[0].kind in DENSE])
@pytest.mark.parametrize("part, remat", [("decoder", "attention"), ("tower", "none")])
def test_a_layer_takes_the_kernel_by_default(target, part, remat):
    """Unmeasured and without a word in the configuration; what the kernel gives is saved where a policy says so."""
    targets.prepare(target)
    _, call, count = DENSE[target.kind]
    axes = dict(axis_shapes=(1, 1, 1), axis_names=("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    mesh = jax.make_mesh(**axes, devices=targets.devices(target)[:1])
    whole = NamedSharding(mesh, P())
    put = lambda x: jax.ShapeDtypeStruct(x.shape, "bfloat16" if x.dtype == "float32" else x.dtype, sharding=whole)
    cfg = {
        "decoder": DecoderConfig(width=256, heads=2, kv_heads=2, mlp_width=512, layers=2),
        "tower": VisionConfig(width=128, heads=2, mlp_width=256, layers=2),
    }[part]
    module = {"decoder": decoder, "tower": vision}[part]
    params = jax.tree.map(put, jax.eval_shape(lambda: module.init_params(cfg, jax.random.key(0))))
    length = 512 if part == "decoder" else 577
    hidden = put(jax.ShapeDtypeStruct((2, length, cfg.width), "float32"))
    segments = put(jax.ShapeDtypeStruct((2, length), "int32"))

    def loss(params, hidden, segments):
        if part == "tower":
            return vision.forward(params, cfg, hidden, (0, 2), remat).astype("float32").sum()
        rows = text_layout(jax.numpy.broadcast_to(jax.numpy.arange(length), segments.shape), segments)
        return decoder.forward(params, cfg, hidden, rows, remat=remat)[0].astype("float32").sum()

    with jax.set_mesh(mesh), jax.default_matmul_precision("default"):
        program = jax.jit(jax.grad(loss, (0, 1))).lower(params, hidden, segments).compile()
    assert len(re.findall(rf'custom_call_target="{call}', program.as_text())) == count


@pytest.mark.parametrize("target", [machine for machine in MACHINES if machine.values[0].kind == "h100"])
@pytest.mark.parametrize("key_heads", [8, 2])
def test_packed_rows_as_sequences_compile(target, key_heads):
    """No gradient of the mask, and where heads share no keys, calls without a mask beside those with one."""
    targets.prepare(target)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,), devices=targets.devices(target)[:1])
    put = lambda *shape, dtype="bfloat16": jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P()))
    q, k, segments = put(2, 1024, 8, 128), put(2, 1024, key_heads, 128), put(2, 1024, dtype="int32")

    def run(q, k, v, do, segments):
        out, pull = jax.vjp(lambda *qkv: attention(*qkv, causal(segments), implementation="cudnn_segments"), q, k, v)
        return out, *pull(do)

    with jax.set_mesh(mesh):
        text = jax.jit(run).lower(q, k, k, q, segments).compile().as_text()
    calls = [line for line in text.splitlines() if 'custom_call_target="__cudnn$fmha' in line]
    names = sorted(re.search(r"fmha(\w+)", line)[1] for line in calls)
    masked = ["ScaleBiasSoftmax", "ScaleBiasSoftmaxBackward"]
    assert names == masked + (["Softmax", "SoftmaxBackward"] if key_heads == 8 else [])
    results = [line.split("custom-call(")[0] for line in calls]
    assert not any("1024,1024]" in result for result in results)

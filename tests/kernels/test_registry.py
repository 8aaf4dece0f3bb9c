"""The choice among implementations: forced, measured, the library's kernel, XLA; what is logged and refused."""

import jax
import jax.numpy as jnp
import pytest

from deltallava_jax.config import ModelConfig
from deltallava_jax.config import model as settings
from deltallava_jax.errors import ConfigError
from deltallava_jax.kernels import devices, registry
from deltallava_jax.kernels.attention import AttentionMask, attention, causal
from deltallava_jax.kernels.registry import Call
from deltallava_jax.kernels.tuning import ATTENTION, WINDOWED_ATTENTION
from tests.kernels import planted

H100 = "NVIDIA H100 80GB HBM3"


@pytest.fixture
def on(monkeypatch):
    """on(platform, kind): the target device of the dispatch."""
    yield lambda platform, kind: (
        monkeypatch.setattr(devices, "device", lambda: (platform, kind)), devices.log_once.cache_clear()
    )  # fmt: skip
    planted.uproot()


def arrays(queries=1024, keys=None, heads=4, key_heads=2, width=64, dtype="bfloat16", rows=2):
    keys = keys or queries
    shapes = (rows, queries, heads, width), (rows, keys, key_heads, width)
    return [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]


def by_segments(rows=2, length=1024):
    return causal(jnp.ones((rows, length), jnp.int32))


def of_cache(queries, keys):
    return AttentionMask(jnp.ones((2, 1, queries, keys), bool))


def test_the_settings_are_the_implementations_but_for_one_that_has_to_be_measured():
    assert settings.ATTENTION == ("auto", *(name for name in ATTENTION.implementations if name != "cudnn_segments"))
    assert settings.WINDOWED_ATTENTION == ("auto", *WINDOWED_ATTENTION.implementations)
    with pytest.raises(ConfigError, match="model.attention is 'triton'; known: auto, xla, blocks, splash, cudnn"):
        ModelConfig(attention="triton")
    with pytest.raises(ConfigError, match="model.windowed_attention is 'cudnn'; known: auto, xla, pallas"):
        ModelConfig(windowed_attention="cudnn")


@pytest.mark.parametrize(
    "platform, kind, name", [("gpu", H100, "cudnn"), ("tpu", "TPU v5 lite", "splash"), ("cpu", "cpu", "blocks")]
)
def test_unmeasured_the_library_is_taken_where_rows_attend_to_themselves(on, platform, kind, name, caplog):
    on(platform, kind)
    with jax.default_matmul_precision("default"):  # splash attention needs it
        assert ATTENTION.choose(*arrays(), by_segments()) == name
        assert ATTENTION.choose(*arrays(577), None) == (name if platform != "cpu" else "xla")  # a tower
        for queries, keys in ((144, 144), (1, 1024), (144, 576)):  # short, a token to decode, cross-attention
            assert ATTENTION.choose(*arrays(queries, keys), None) == "xla"
        assert ATTENTION.choose(*arrays(1, 1024), of_cache(1, 1024)) == "xla"
    q, k = (jax.ShapeDtypeStruct((2, side, side, 8, 128), "bfloat16") for side in (12, 24))
    assert WINDOWED_ATTENTION.choose(q, k, 1) == "xla"
    assert not caplog.records


@pytest.mark.parametrize(
    "platform, kind, changes, reason",
    [
        ("gpu", H100, dict(dtype="float32"), "cudnn takes bfloat16 or float16, not float32"),
        ("gpu", H100, dict(width=160), "cudnn takes heads of a multiple of 8 up to 128, not 160"),
        ("gpu", "Tesla V100-SXM2-16GB", {}, "cudnn needs an NVIDIA GPU from Ampere on, not Tesla V100-SXM2-16GB"),
        ("gpu", "NVIDIA GeForce RTX 2080 Ti", {}, "cudnn needs an NVIDIA GPU from Ampere on"),
        ("gpu", "NVIDIA TITAN RTX", {}, "cudnn needs an NVIDIA GPU from Ampere on"),
        ("gpu", "AMD Instinct MI300X", {}, "cudnn needs an NVIDIA GPU from Ampere on"),
        ("tpu", "TPU v5", dict(width=20, dtype="float32"), "splash takes heads of a multiple of 8, not 20"),
    ],
)
def test_a_fallback_to_xla_is_logged_once_with_its_reason(on, platform, kind, changes, reason, caplog):
    on(platform, kind)
    for _ in range(2):
        assert ATTENTION.choose(*arrays(**changes), by_segments()) == "xla"
    (record,) = caplog.records
    assert record.message.startswith(f"dense attention runs in XLA: {reason}")


@pytest.mark.parametrize(
    "kind", ["NVIDIA A100-SXM4-80GB", "NVIDIA H200", "NVIDIA L40S", "NVIDIA RTX A6000", "NVIDIA A10G", "NVIDIA L4",
             "NVIDIA GeForce RTX 3090", "NVIDIA GeForce RTX 4090", "NVIDIA B200", "NVIDIA GB200",
             "NVIDIA RTX 6000 Ada Generation"],
)  # fmt: skip
def test_gpus_from_ampere_on_are_known(on, kind, caplog):
    on("gpu", kind)
    assert ATTENTION.choose(*arrays(), by_segments()) == "cudnn" and not caplog.records


# ---------------------------------------------------------------- forced


def test_a_forced_name_holds_where_rows_attend_to_themselves(on):
    on("gpu", H100)
    with registry.forced(ModelConfig(attention="xla"), ordered=True):
        assert ATTENTION.choose(*arrays(), by_segments()) == "xla"
    with registry.forced(ModelConfig(attention="cudnn", windowed_attention="pallas"), ordered=True):
        assert ATTENTION.choose(*arrays(64), by_segments(2, 64)) == "cudnn"  # short as it is
        assert ATTENTION.choose(*arrays(1, 1024), of_cache(1, 1024)) == "xla"
        assert ATTENTION.choose(*arrays(144, 576), None) == "xla"
        q, k = (jax.ShapeDtypeStruct((2, side, side, 8, 128), "bfloat16") for side in (12, 24))
        assert WINDOWED_ATTENTION.choose(q, k, 1) == "pallas"
    assert ATTENTION.choose(*arrays(64), by_segments(2, 64)) == "xla"


def test_an_order_that_cannot_be_followed_is_refused_by_name(on):
    on("gpu", H100)
    for cfg, reason in (
        (ModelConfig(attention="splash"), "model.attention=splash: runs on tpu, not on gpu"),
        (ModelConfig(attention="cudnn"), "model.attention=cudnn: takes bfloat16 or float16, not float32"),
    ):
        with registry.forced(cfg, ordered=True), pytest.raises(ConfigError, match=reason):
            ATTENTION.choose(*arrays(dtype="float32"), by_segments())
    with registry.forced(ModelConfig(windowed_attention="pallas"), ordered=True):
        q, k = (jax.ShapeDtypeStruct((2, side, side, 8, 128), "bfloat16") for side in (12, 24))
        with pytest.raises(ConfigError, match="model.windowed_attention=pallas: takes windows of one query, not 2 x 2"):
            WINDOWED_ATTENTION.choose(q, k, 2)


def test_a_configuration_of_another_machine_does_not_stop_inference(on):
    on("tpu", "TPU v5 lite")
    with registry.forced(ModelConfig(attention="cudnn")), jax.default_matmul_precision("default"):
        assert ATTENTION.choose(*arrays(), by_segments()) == "splash"


def test_the_outermost_setting_counts(on):
    on("gpu", H100)
    for outer, name in (("xla", "xla"), ("auto", "cudnn")):
        with registry.forced(ModelConfig(attention=outer), ordered=True):
            with registry.forced(ModelConfig(attention="splash")):
                assert ATTENTION.choose(*arrays(), by_segments()) == name


def test_a_traced_program_follows_the_setting(on):
    """The caches of traced functions know it."""
    on("gpu", H100)
    seen = []

    @jax.jit
    def choose(q):
        seen.append(ATTENTION.choose(q, q, None))
        return q

    q = jnp.zeros(arrays()[0].shape, jnp.bfloat16)
    for name in ("auto", "xla", "auto", "cudnn"):
        with registry.forced(ModelConfig(attention=name), ordered=True):
            choose(q)
    assert seen == ["cudnn", "xla", "cudnn"]


# ---------------------------------------------------------------- measured


def test_what_was_measured_comes_before_the_library(on):
    on("gpu", H100)
    q, k = arrays()
    call = "attention 2x1024x4x64, keys 2x1024x2x64 bfloat16, causal segments"
    assert str(ATTENTION.call(q, k, by_segments())) == call
    registry.use(H100, {call: "xla"})
    assert ATTENTION.choose(q, k, by_segments()) == "xla"
    assert ATTENTION.choose(q, k, None) == "cudnn"  # another call
    assert ATTENTION.choose(*arrays(dtype="float16"), by_segments()) == "cudnn"
    with registry.forced(ModelConfig(attention="cudnn"), ordered=True):
        assert ATTENTION.choose(q, k, by_segments()) == "cudnn"
    on("gpu", "NVIDIA A100-SXM4-80GB")  # a program for another device
    assert ATTENTION.choose(q, k, by_segments()) == "cudnn"


@pytest.mark.parametrize("name", ["splash", "a kernel of another version"])
def test_a_measured_kernel_that_cannot_run_is_not_taken(on, name):
    on("gpu", H100)
    registry.use(H100, {str(ATTENTION.call(*arrays(), None)): name})
    assert ATTENTION.choose(*arrays(), None) == "cudnn"


def test_a_call_is_what_one_device_computes():
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    with jax.set_mesh(mesh):
        call = ATTENTION.call(*arrays(rows=16), by_segments(16))
        q, k = (jax.ShapeDtypeStruct((64, side, side, 8, 128), "bfloat16") for side in (12, 24))
        windows = WINDOWED_ATTENTION.call(q, k, 1, 1024)
    assert call.shapes == ((4, 1024, 2, 64), (4, 1024, 1, 64))
    assert windows.shapes == ((16, 12, 12, 8, 128), (16, 24, 24, 8, 128))
    assert windows.kind == "window 1, keys projected from 1024"
    long = ATTENTION.call(*arrays(4096, heads=32, key_heads=32, rows=8), by_segments(8, 4096))
    assert long.shapes[0][0] == 1  # so many rows of scores as fit


def test_the_calls_of_a_program_are_recorded_however_often_it_was_traced():
    planted.plant(planted.right)
    q = jnp.zeros((2, 16, 4, 8))
    program = jax.jit(lambda q: attention(attention(q, q, q), q[:, :4], q[:, :4], of_cache(16, 4)))
    for _ in range(2):
        with registry.recording() as found:
            program.trace(q)
        assert found.calls == {
            Call("attention", ((2, 16, 4, 8), (2, 16, 4, 8)), "float32", "all keys"): ATTENTION,
            Call("attention", ((2, 16, 4, 8), (2, 4, 4, 8)), "float32", "any mask"): ATTENTION,
        }
        with registry.recording() as found, registry.forced(ModelConfig(attention="xla"), ordered=True):
            program.trace(q)
        assert not found.calls
    planted.uproot()
    with registry.recording() as found:
        program.trace(q)
    assert not found.calls  # nothing to choose

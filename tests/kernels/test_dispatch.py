"""Which implementation is chosen, what is logged, and what is refused."""

import inspect

import jax
import numpy as np
import pytest

from deltallava_jax.kernels import devices, registry
from deltallava_jax.kernels.windowed_attention import dispatch, local_attention, reference, windowed_attention
from tests.kernels.windows import draw


@pytest.fixture
def arrays():
    return draw(2, 2, 2, 2, 128, "float32")[:3]


@pytest.fixture
def on(monkeypatch):
    """Gives the dispatch a device; the reference stands in for the kernels and records the calls."""
    calls = []

    def attend(backend, q, k, v, window):
        calls.append((backend.__name__.split(".")[-1], q.shape))
        return reference.windowed_attention(q, k, v, window=window)

    def device(platform, kind):
        monkeypatch.setattr(devices, "device", lambda: (platform, kind))
        monkeypatch.setattr(dispatch, "attend", attend)
        devices.log_once.cache_clear()
        return calls

    yield device
    registry.use("", {})


def test_xla_on_a_cpu_logs_nothing(arrays, caplog):
    expected = reference.windowed_attention(*arrays)
    for implementation in (None, "xla"):
        np.testing.assert_array_equal(windowed_attention(*arrays, implementation=implementation), expected)
    assert not caplog.records


@pytest.mark.parametrize("platform, kind", [("tpu", "TPU v5 lite"), ("gpu", "NVIDIA H100 80GB HBM3")])
def test_pallas_is_taken_where_forced(arrays, on, platform, kind):
    calls = on(platform, kind)
    windowed_attention(*arrays, implementation="pallas")
    assert calls == [(platform, arrays[0].shape)]


def test_measured_calls_take_the_kernel_where_it_was_faster(arrays, on, caplog):
    call = str(dispatch.OPERATION.call(arrays[0], arrays[1], 1))
    calls = on("gpu", "NVIDIA H100 80GB HBM3")
    windowed_attention(*arrays)
    assert not calls
    registry.use("NVIDIA H100 80GB HBM3", {call: "pallas"})
    windowed_attention(*arrays)
    assert len(calls) == 1
    windowed_attention(*draw(2, 2, 3, 2, 128, "float32")[:3])  # 9 keys per query
    windowed_attention(*arrays, window=2)
    assert len(calls) == 1 and not caplog.records


@pytest.mark.parametrize("scale", [1, 2])
@pytest.mark.parametrize("window", [1, 2])
def test_projected_keys_and_values_are_attended_to_in_either_form(on, scale, window):
    """In XLA the matrices move to the queries' side; a kernel takes keys by heads."""
    rng = np.random.default_rng(0)
    new = lambda *shape: jax.numpy.asarray(rng.standard_normal(shape), "float32")
    q, k, v = new(2, 2, 2, 12), new(2, 2 * scale, 2 * scale, 20), new(2, 2 * scale, 2 * scale, 20)
    matrices = new(20, 12) / 5, new(20, 12) / 5
    split = lambda x: x.reshape(*x.shape[:3], 3, 4)
    expected = reference.windowed_attention(split(q), split(k @ matrices[0]), split(v @ matrices[1]), window=window)
    attend = lambda name: local_attention(q, k, v, *matrices, head_dim=4, window=window, implementation=name)
    np.testing.assert_allclose(split(attend("xla")), expected, atol=1e-5)
    registered = dispatch.OPERATION.kernels["pallas"]
    calls = on("tpu", "TPU v5")
    dispatch.OPERATION.kernels["pallas"] = {"tpu": "tests.kernels.windows"}
    try:
        np.testing.assert_allclose(split(attend("pallas")), expected, atol=1e-5)
    finally:
        dispatch.OPERATION.kernels["pallas"] = registered
    assert len(calls) == (scale * window > 1)


def test_under_a_mesh_each_device_takes_its_rows(on):
    calls = on("gpu", "NVIDIA H100 80GB HBM3")
    arrays = draw(4, 2, 2, 2, 128, "float32")[:3]
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    with jax.set_mesh(mesh):
        out = jax.jit(lambda *x: windowed_attention(*x, implementation="pallas"))(*arrays)
        with pytest.raises(ValueError, match="a batch of 3 does not divide over 4 devices"):
            windowed_attention(*(x[:3] for x in arrays), implementation="pallas")
    assert calls == [("gpu", (1, 2, 2, 2, 128))]
    np.testing.assert_allclose(out, reference.windowed_attention(*arrays), atol=1e-6)


@pytest.mark.parametrize(
    "platform, kind, change, message",
    [
        ("cpu", "cpu", {}, "runs on tpu or gpu, not on cpu"),
        ("gpu", "NVIDIA A100-SXM4-80GB", {}, "needs a GPU from Hopper on, not NVIDIA A100"),
        ("gpu", "NVIDIA H200", {"window": 2}, "windows of one query, not 2 x 2"),
        ("gpu", "NVIDIA H200", {"width": 64}, "heads of 128, not 64"),
        ("tpu", "TPU v5", {"heads": 1}, "one dtype and with as many heads"),
        ("tpu", "TPU v5", {"width": 64}, "heads of a multiple of 128, not 64"),
        ("tpu", "TPU v5", {"dtype": "float16"}, "float32 or bfloat16, not float16"),
    ],
)
def test_what_cannot_run_is_refused(on, platform, kind, change, message):
    on(platform, kind)
    q, k, v = draw(2, 2, 2, 2, change.get("width", 128), change.get("dtype", "float32"))[:3]
    heads = slice(change.get("heads"))
    arrays = q, k[:, :, :, heads], v[:, :, :, heads]
    with pytest.raises(ValueError, match=f'implementation="pallas": .*{message}') as error:
        windowed_attention(*arrays, window=change.get("window", 1), implementation="pallas")
    assert "\n" not in str(error.value)


def test_unknown_implementations_and_shapes_are_refused(arrays):
    (q, k, v), windowed_attention = (
        arrays,
        inspect.unwrap(dispatch.windowed_attention),
    )  # without the tests' type checks
    with pytest.raises(ValueError, match="expected xla, pallas or None"):
        windowed_attention(q, k, v, implementation="triton")
    with pytest.raises(ValueError, match=r"expected q \[B, gq, gq, H, D\]"):
        windowed_attention(q[0], k, v)
    with pytest.raises(ValueError, match="do not fit: .* a multiple of G heads"):
        windowed_attention(q, k, v[:1])

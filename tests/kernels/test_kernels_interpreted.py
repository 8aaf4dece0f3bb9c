"""The TPU and GPU kernels on a CPU, forward and derivative, against float64 and the reference."""

import jax
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu

from deltallava_jax.config import ModelConfig, system_config
from deltallava_jax.kernels import devices, registry
from deltallava_jax.kernels.windowed_attention import dispatch, gpu, tpu
from deltallava_jax.kernels.windowed_attention.vjp import attend
from deltallava_jax.models import systems
from tests import golden
from tests.kernels.windows import assert_same, draw

needs_gpu_interpreter = pytest.mark.skipif(
    not hasattr(plgpu, "InterpretGPUParams"), reason="JAX interprets Mosaic GPU's kernels from 0.11 on"
)
DTYPES = st.sampled_from(["float32", "bfloat16"])


def interpreted(backend, window, interpret):
    return lambda q, k, v: attend(backend, q, k, v, window, interpret)


@settings(max_examples=4, deadline=None, derandomize=True, database=None)
@given(
    windows=st.integers(1, 4),
    window=st.integers(1, 3),
    scale=st.integers(1, 4),
    batch=st.integers(1, 3),
    heads=st.integers(1, 2),
    dtype=DTYPES,
)
@example(windows=1, window=1, scale=6, batch=2, heads=2, dtype="float32")  # s = g: one query attends to everything
@example(windows=6, window=1, scale=1, batch=1, heads=2, dtype="bfloat16")  # s = 1: one key per query
@example(windows=8, window=1, scale=2, batch=1, heads=1, dtype="float32")  # several steps per image
def test_tpu_kernel(windows, window, scale, batch, heads, dtype):
    arrays = draw(batch, windows * window, scale, heads, 8, dtype)
    assert_same(interpreted(tpu, window, True), arrays, window, dtype)


def test_tpu_kernel_has_no_race(capfd):
    arrays = draw(2, 8, 2, 1, 8, "float32")
    assert tpu._step(8, 16, 1, "float32") == (32, 128)
    assert_same(interpreted(tpu, 1, pltpu.InterpretParams(detect_races=True)), arrays, 1, "float32")
    assert "RACE" not in "".join(capfd.readouterr())


@needs_gpu_interpreter
@settings(max_examples=1, deadline=None, derandomize=True, database=None)
@given(gq=st.integers(1, 3), scale=st.integers(1, 3), batch=st.integers(1, 40), dtype=DTYPES)
@example(gq=1, scale=4, batch=2, dtype="float32")  # s = g, its keys divided among blocks
@example(gq=2, scale=1, batch=17, dtype="bfloat16")  # s = 1; rows of windows over two blocks
def test_gpu_kernel(gq, scale, batch, dtype):
    arrays = draw(batch, gq, scale, 1, gpu.WIDTH, dtype)
    assert_same(interpreted(gpu, 1, plgpu.InterpretGPUParams()), arrays, 1, dtype)


@needs_gpu_interpreter
def test_gpu_kernel_has_no_race(capfd, monkeypatch):
    monkeypatch.setattr(gpu, "BLOCKS", 1)  # one block takes all keys of a window, so its buffers are reused
    arrays = draw(2, 2, 3, 1, gpu.WIDTH, "float32")
    assert_same(interpreted(gpu, 1, plgpu.InterpretGPUParams(detect_races=True)), arrays, 1, "float32")
    assert "RACE" not in "".join(capfd.readouterr())


def test_golden_projector_through_the_tpu_kernel(monkeypatch):
    assert_golden(monkeypatch, tpu, True, scale_factor=4)


@needs_gpu_interpreter
def test_golden_projector_through_the_gpu_kernel(monkeypatch):
    monkeypatch.setattr(gpu, "BLOCKS", 1)
    assert_golden(monkeypatch, gpu, plgpu.InterpretGPUParams(), scale_factor=2)


def assert_golden(monkeypatch, backend, interpret, scale_factor):
    """The release's output for its golden inputs, windowed attention by a kernel."""
    monkeypatch.setattr(devices, "device", lambda: (backend.__name__.split(".")[-1], "a kind"))
    monkeypatch.setattr(backend, "refusal", lambda *arguments: None)  # the golden heads are narrow
    monkeypatch.setattr(dispatch, "attend", lambda module, *arrays: attend(module, *arrays, interpret))
    cfg = system_config(out_width=64, scale_factor=scale_factor)
    params = systems.from_torch(golden.state_dict("delta"), cfg)
    with registry.forced(ModelConfig(attention="xla", windowed_attention="pallas"), ordered=True):
        project = jax.jit(lambda params, features: systems.project(params, cfg, features))
        program = project.trace(params, golden.features(cfg))
        out = project(params, golden.features(cfg))
    assert "windowed_attention_forward" in str(program.jaxpr) or backend is gpu
    np.testing.assert_allclose(out, golden.outputs("delta")[f"y_s{scale_factor}"], atol=1e-4)

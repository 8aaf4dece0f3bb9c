"""The choice by measuring, on a CPU, with planted candidates: what is left out and why, what is taken, what is kept."""

import dataclasses

import jax
import numpy as np
import pytest

from deltallava_jax.kernels import devices, registry, tuning
from deltallava_jax.kernels.registry import Call, Trial
from deltallava_jax.kernels.tuning import ATTENTION, WINDOWED_ATTENTION, Result
from deltallava_jax.kernels.windowed_attention import reference
from tests.kernels import planted


@pytest.fixture(autouse=True)
def clean():
    yield
    planted.uproot()


def call(kind="causal segments", dtype="float32", length=64):
    return Call("attention", ((2, length, 4, 16), (2, length, 2, 16)), dtype, kind)


REASONS = {
    "wrong": "differs from XLA by ",
    "wrong_gradient": "differs from XLA by 0.",
    "raising": "raises NotImplementedError: no plan found",
    "nan": "gives NaN or infinite values",
}


@pytest.mark.parametrize("kind", ["causal segments", "all keys", "any mask"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_faulty_candidates_are_left_out_and_named(kind, dtype):
    planted.plant(*planted.FAULTS, planted.right)
    result = tuning.measure(ATTENTION, call(kind, dtype))
    assert result.left_out.keys() == REASONS.keys()
    assert all(reason.startswith(REASONS[name]) for name, reason in result.left_out.items()), result
    assert result.seconds.keys() - {"blocks"} == {"xla", "right", "slow"}
    assert result.choice in ("xla", "right", "blocks") and result.seconds["slow"] > 3 * result.seconds["xla"]
    lines = tuning.describe(str(call(kind, dtype)), result)
    warnings = [line for line in lines if line.startswith("warning: ")]
    assert len(warnings) == 4 == len(lines) - 1 and not any("\n" in line for line in lines)
    assert f"warning: attention 2x64x4x16, keys 2x64x2x16 {dtype}, {kind}: nan is left out, it gives NaN" in lines[-2]
    assert lines[-1].endswith(f" -> {result.choice}") and "slow " in lines[-1]


def operation(xla, *kernels):
    """One whose form in XLA is ``xla``, of a square matrix."""
    forms = {function.__name__: function for function in (xla, *kernels)} | {"xla": xla}

    def trial(call):
        x = jax.random.normal(jax.random.key(0), call.shapes[0])
        return Trial((x, x, None), (x,), lambda name, x: forms[name](x))

    modules = {function.__name__: planted.module(function) for function in kernels}
    return dataclasses.replace(ATTENTION, kernels=modules, refusal_of_all=lambda *_: None, trial=trial)


def slow_square(x):
    return jax.lax.scan(lambda y, _: (x @ x + 0 * y, None), x, length=50)[0]


def square(x):
    return x @ x


def identity(x):
    return x


def out_of_memory(x):
    raise MemoryError("64 GiB\nare not there")


MATRIX = Call("matrix", ((64, 64), (64, 64)), "float32", "square")


def test_the_fastest_correct_candidate_is_taken():
    result = tuning.measure(operation(slow_square, square, identity), MATRIX)
    assert result.choice == "square" and result.left_out.keys() == {"identity"}
    assert result.seconds.keys() == {"xla", "square"} and result.seconds["square"] < result.seconds["xla"]


def test_without_a_reference_nothing_is_taken():
    result = tuning.measure(operation(out_of_memory, square), MATRIX)
    reason = "raises MemoryError in float32, so that nothing can be compared: 64 GiB"
    assert result == Result("xla", {}, {"xla": reason})


@pytest.mark.parametrize("kind, keys", [("window 2", (2, 8, 8, 3, 16)), ("window 1, keys projected from 24", None)])
def test_windowed_attention_is_measured_as_it_runs(kind, keys):
    shapes = (2, 4, 4, 3, 16), keys or (2, 8, 8, 3, 16)
    trial = WINDOWED_ATTENTION.trial(Call("windowed_attention", shapes, "float32", kind))
    assert WINDOWED_ATTENTION.call(*trial.arguments) == Call("windowed_attention", shapes, "float32", kind)
    in_xla = trial.run("xla", *trial.arrays)
    if keys is None:
        q, k, v, k_matrix, v_matrix = trial.arrays
        split = lambda x: x.reshape(*x.shape[:3], 3, 16)
        expected = reference.windowed_attention(split(q), split(k @ k_matrix), split(v @ v_matrix), window=1)
        expected = expected.reshape(q.shape)
    else:
        expected = reference.windowed_attention(*trial.arrays, window=2)
    np.testing.assert_allclose(in_xla, expected, atol=1e-5)
    result = tuning.measure(WINDOWED_ATTENTION, Call("windowed_attention", shapes, "bfloat16", kind))
    assert result.choice == "xla" and not result.left_out and result.seconds["xla"] > 0


@pytest.mark.parametrize("kind", ["causal segments", "all keys", "any mask"])
def test_a_call_is_that_of_its_trial(kind):
    trial = ATTENTION.trial(call(kind, "bfloat16"))
    assert ATTENTION.call(*trial.arguments) == call(kind, "bfloat16")
    mask = trial.arguments[2]
    if kind == "causal segments":
        assert all(len(set(row.tolist())) > 3 and 0 in row for row in np.asarray(mask.segments))


# ---------------------------------------------------------------- what is kept


def test_the_table_is_read_as_it_was_written(tmp_path):
    table = {"a device": {str(call()): Result("cudnn", {"xla": 0.5, "cudnn": 0.25}, {"pallas": "gives NaN"})}}
    file = tuning.file(tmp_path)
    assert tuning.read(file) == {}
    file.write_text(tuning.text(table))
    assert tuning.read(file) == table


@pytest.mark.parametrize("contents", ["{", "[]", '{"a": 3}', '{"a": {"b": {"choice": "xla"}}}', '{"a": {"b": 3}}'])
def test_a_broken_table_is_one_line(tmp_path, contents):
    file = tuning.file(tmp_path)
    file.write_text(contents)
    with pytest.raises(ValueError, match="kernels.json: ") as error:
        tuning.read(file)
    assert "\n" not in str(error.value)
    tuning.recall(file)  # nothing is raised


def test_the_environment_changes_with_the_versions(monkeypatch):
    now = tuning.environment()
    assert now.startswith("cpu, jax ") and "jaxlib " in now and "precision highest" in now
    monkeypatch.setattr(tuning.metadata, "version", lambda name: "99")
    assert "jax 99" in tuning.environment() != now


def test_what_was_measured_before_is_taken_unless_the_run_has_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "_measured", None)
    planted.plant(planted.slow)
    trial = ATTENTION.trial(call())
    file = tuning.file(tmp_path)
    file.write_text(tuning.text({tuning.environment(): {str(call()): Result("slow", {}, {})}}))
    tuning.recall(file)
    assert ATTENTION.choose(*trial.arguments) == "slow"
    registry.use(devices.device()[1], {})
    tuning.recall(file)
    assert ATTENTION.choose(*trial.arguments) == "xla"

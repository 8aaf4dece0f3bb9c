"""The parsed text of programs: shapes, memory spaces, instructions of several lines, how often computations run."""

import jax
import jax.numpy as jnp
import pytest

from deltallava_jax.analysis import hlo


@pytest.mark.parametrize(
    ("shape", "bytes", "in_main_memory"),
    [
        ("f32[]", 4, 4),
        ("pred[3,5]{1,0}", 15, 15),
        ("s4[6]{0}", 3, 3),
        ("f8e4m3fn[10]{0}", 10, 10),
        ("bf16[<=8,4]{1,0:T(8,128)(2,1)}", 64, 64),
        ("bf16[2,3]{1,0:T(8,128)(2,1)S(1)}", 12, 0),
        ("(bf16[4,2]{1,0}, /*index=1*/(f32[8]{0:S(5)}, token[]))", 16 + 32, 16),
    ],
)
def test_bytes_of_shapes(shape, bytes, in_main_memory):
    assert hlo.size(shape) == bytes and hlo.size(shape, 0) == in_main_memory


def test_elements_of_tuples():
    assert hlo.elements("((f32[2]{0}, s8[]), bf16[4]{0:T(8,128)(2,1)}, u32[])") == [
        "(f32[2]{0}, s8[])", "bf16[4]{0:T(8,128)(2,1)}", "u32[]",
    ]  # fmt: skip


TEXT = """HloModule step, is_scheduled=true

%inner (x: f32[8]) -> f32[8] {
  ROOT %s = f32[8]{0} sine(%x), metadata={op_name="jit(f)/a[\\'b\\']/sin"}
}

ENTRY %main (p: f32[8], q: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  %k = (f32[8]{0}, f32[2]{0}) custom-call((f32[8]{0}, f32[8]{0}) %p, /*index=1*/%q), custom_call_target="kernel", frontend_attributes={note={
"lines": "two"
}}, metadata={op_name="jit(f)/kernel"}
  ROOT %r = f32[8]{0} fusion(%k), kind=kLoop, calls=%inner
}
"""  # noqa: E501


def test_instructions_with_operands_sources_and_what_they_call():
    program = hlo.parse(TEXT)
    entry = program.computations[program.entry]
    assert program.entry == "main" and list(entry) == ["p", "k", "r"]
    kernel = entry["k"]
    assert (kernel.opcode, kernel.operands, kernel.source) == ("custom-call", ("p", "q"), "jit(f)/kernel")
    assert hlo.root(entry) is entry["r"] and entry["r"].called == ["inner"]
    assert program.computations["inner"]["s"].source == "jit(f)/a[\\'b\\']/sin"
    assert program.runs() == {"main": 1, "inner": 1}


def test_the_body_of_a_compiled_loop_runs_as_often_as_it_says():
    body = lambda x, _: (jnp.tanh(x @ x), None)
    loop = lambda x: jax.lax.scan(lambda x, _: (jax.lax.scan(body, x, length=3)[0] + 1, None), x, length=5)[0]
    program = hlo.parse(jax.jit(loop).lower(jnp.ones((64, 64))).compile().as_text())
    products = [
        program.runs()[name]
        for name, computation in program.computations.items()
        for each in computation.values()
        if each.opcode == "dot"
    ]
    assert products == [15]

"""Collectives parsed from HLO: programs with known collectives, and the forms that compilers write."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from deltallava_jax.analysis.collectives import collectives, received_bytes, summary

LAYERS, WIDTH, ROWS = 5, 64, 16
SIZE = WIDTH * WIDTH * 4


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))


def compiled(mesh, function, *shapes_and_specs):
    arguments = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec)) for shape, spec in shapes_and_specs
    ]
    with jax.set_mesh(mesh):
        return jax.jit(function).lower(*arguments).compile().as_text()


def test_gathered_weights_of_scanned_layers_count_once_a_layer(mesh):
    def forward(x, weights):
        def layer(x, weight):
            whole = jax.lax.with_sharding_constraint(weight, P(None, None))
            return jax.lax.with_sharding_constraint(jnp.tanh(x @ whole), P("x", None)), None

        return jax.lax.scan(layer, x, weights)[0]

    found = collectives(compiled(mesh, forward, ((ROWS, WIDTH), P("x")), ((LAYERS, WIDTH, WIDTH), P(None, "x"))), 8)
    assert summary(found) == [dict(kind="all-gather", count=LAYERS, bytes=LAYERS * SIZE)]
    (one,) = found
    assert one.group == 8 and received_bytes(one) == SIZE * 7 // 8


def test_loops_in_loops_multiply(mesh):
    def forward(x, weight):
        total = lambda x: jax.lax.with_sharding_constraint(x @ weight, P())
        inner = lambda x, _: (jnp.sin(jax.lax.with_sharding_constraint(total(x), P(None, "x"))), None)
        outer = lambda x, _: (jnp.cos(jax.lax.scan(inner, x, length=3)[0]), None)
        return jax.lax.scan(outer, x, length=4)[0]

    found = collectives(compiled(mesh, forward, ((ROWS, WIDTH), P(None, "x")), ((WIDTH, WIDTH), P("x", None))), 8)
    reduced = [one for one in found if one.kind in ("all-reduce", "reduce-scatter")]
    assert [one.count for one in reduced] == [12]


def test_a_product_over_a_shared_dimension_is_one_all_reduce(mesh):
    product = lambda a, b: jax.lax.with_sharding_constraint(a @ b, P())
    found = collectives(compiled(mesh, product, ((ROWS, WIDTH), P(None, "x")), ((WIDTH, WIDTH), P("x", None))), 8)
    (one,) = found
    assert (one.kind, one.count, one.bytes, one.group) == ("all-reduce", 1, ROWS * WIDTH * 4, 8)
    assert received_bytes(one) == 2 * ROWS * WIDTH * 4 * 7 // 8


def program(*entry: str, more: str = "") -> str:
    lines = "\n".join(f"  {line}" for line in entry)
    return f"HloModule step\n{more}\nENTRY %main (p: f32[8]) -> f32[8] {{\n{lines}\n}}\n"


def test_an_asynchronous_pair_is_one_collective_with_the_results_bytes():
    text = program(
        "%p = f32[8]{0} parameter(0)",
        "%g = (f32[8]{0}, f32[32]{0}) all-gather-start(f32[8]{0} %p), replica_groups=[2,4]<=[8], dimensions={0}",
        "%gd = f32[32]{0:T(8,128)(2,1)} all-gather-done((f32[8]{0}, f32[32]{0}) %g)",
        "%r = (bf16[4,2]{1,0}, /*index=1*/f32[8]{0}) all-reduce-start(%a, %p), replica_groups={{0,1},{2,3}}",
        "%rd = (bf16[4,2]{1,0}, f32[8]{0}) all-reduce-done(%r)",
        "%c = (bf16[64]{0:T(256)(128)(2,1)}, bf16[64]{0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%b)",
        "ROOT %cd = bf16[64]{0} collective-permute-done(%c)",
        more="%add (x: f32[], y: f32[]) -> f32[] {\n  ROOT %s = f32[] add(%x, %y)\n}\n",
    )
    found = {one.kind: one for one in collectives(text, 8)}
    assert {kind: (one.count, one.bytes, one.group) for kind, one in found.items()} == {
        "all-gather": (1, 32 * 4, 4),
        "all-reduce": (1, 8 * 2 + 8 * 4, 2),
        "collective-permute": (1, 64 * 2, 8),
    }


def test_a_wrapped_asynchronous_collective_is_counted_where_it_is():
    wrapped = (
        "%wrapped (q: f32[32]) -> f32[4] {\n  %q = f32[32]{0} parameter(0)\n"
        "  ROOT %rs = f32[4]{0} reduce-scatter(%q), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add\n}\n"
    )
    text = program(
        "%s = ((f32[32]{0}), f32[4]{0}, u32[]) async-start(%p), calls=%wrapped",
        "ROOT %d = f32[4]{0} async-done(%s), calls=%wrapped",
        more=wrapped,
    )
    (one,) = collectives(text, 8)
    assert (one.kind, one.count, one.bytes) == ("reduce-scatter", 1, 16) and received_bytes(one) == 7 * 16


LOOP = """%body (t: (s32[], f32[8])) -> (s32[], f32[8]) {
  %fa = (f32[8]{0}, f32[64]{0}) fusion(%x), kind=kOutput, calls=%start
  %fb = f32[64]{0} fusion(%y), kind=kOutput, calls=%end
  %t = (s32[], f32[8]) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %step = s32[]{:T(128)} constant(1)
  %next = s32[] add(%i, %step)
  ROOT %o = (s32[], f32[8]) tuple(%next, %z)
}

%start (x: f32[8]) -> (f32[8], f32[64]) {
  %ag.1 = f32[64]{0} all-gather(%x), channel_id=7, replica_groups=mesh['a'=2,'b'=4] {'a','b':(1)2}, dimensions={0}, frontend_attributes={chain_id="3"}
}

%end (y: f32[64]) -> f32[64] {
  %ag.2 = f32[64]{0} all-gather(%y), channel_id=7, replica_groups=mesh['a'=2,'b'=4] {'a','b':(1)2}, dimensions={0}, frontend_attributes={chain_id="3"}
}

%all-reduce-scatter.1 (g: f32[64]) -> f32[8] {
  %ar = f32[64]{0} all-reduce(%g), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  ROOT %ds = f32[8]{0} dynamic-slice(%ar, %i), dynamic_slice_sizes={8}
}

%condition (t: (s32[], f32[8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(24)
  %i = s32[] get-tuple-element(%t), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %limit), direction=LT
}
"""  # noqa: E501


def test_the_tpu_compilers_forms():
    text = program(
        "%w = (s32[]{:T(128)}, f32[8]{0}) while(%t), condition=%condition, body=%body",
        "ROOT %f = f32[8]{0} fusion(%g), kind=kCustom, calls=%all-reduce-scatter.1",
        more=LOOP,
    )
    found = {one.kind: one for one in collectives(text, 8)}
    gather, scatter = found["all-gather"], found["reduce-scatter"]
    assert (gather.count, gather.bytes, gather.group) == (24, 256, 4)  # spread over two fusions, yet one
    assert (scatter.count, scatter.bytes) == (1, 32) and len(found) == 2
    known = text.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"3"}}')
    assert [one.count for one in collectives(known, 8) if one.kind == "all-gather"] == [3]
    double = text.replace("constant(1)", "constant(2)")  # as in loops over the shards of a product
    assert [one.count for one in collectives(double, 8) if one.kind == "all-gather"] == [12]
    for unknown in (text.replace("constant(24)", "parameter(0)"), text.replace("constant(1)", "parameter(1)")):
        with pytest.raises(ValueError, match="number of iterations of loop .* is unknown"):
            collectives(unknown, 8)

"""The time of schedules whose seconds are worked out by hand, and what the estimate's parts add up to."""

import jax
import jax.numpy as jnp
import pytest

from deltallava_jax.analysis import estimate
from deltallava_jax.analysis.costs import costs
from deltallava_jax.analysis.estimate import Efficiency, Rates, Timeline, attention_bytes, part
from deltallava_jax.analysis.hlo import parse
from deltallava_jax.analysis.targets import CHIPS, Chip, Target

# A machine of round numbers: 1000 operations, 100 bytes, 10 received bytes a second.
CHIP = Chip("slow", 0, "", peak_flops=1000, float32_flops=500, bandwidth=100, link=10, per_host=4, network=1)
RATES = Rates(CHIP, Efficiency(1.0, 0.5, 1.0, 0.0, 0.0, "none"))


def program(*entry: str, more: str = "") -> str:
    lines = "\n".join(f"  {line}" for line in entry)
    return f"HloModule step, is_scheduled=true\n{more}\nENTRY %main () -> f32[] {{\n{lines}\n}}\n"


def timeline(text: str, rates=RATES, devices: int = 2) -> Timeline:
    return Timeline(parse(text), rates, devices)


def seconds_by(line: Timeline) -> dict[str, float]:
    found = {}
    for one in line.timed:
        found[one.bound] = found.get(one.bound, 0) + one.total
    return {name: value for name, value in found.items() if value}


OPERANDS = ("%a = bf16[10,10]{1,0} parameter(0)", "%b = bf16[10,10]{1,0} parameter(1)")
DOT = "%d = bf16[10,10]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}"


def test_an_instruction_takes_what_its_operations_or_its_bytes_need():
    assert timeline(program(*OPERANDS, DOT)).seconds == 600 / 100  # 2,000 operations take 2 s, 600 bytes take 6
    fast = Rates(Chip("", 0, "", 100, 50, 100, 10), RATES.efficiency)
    assert timeline(program(*OPERANDS, DOT), fast).seconds == 2000 / 100
    line = timeline(program(*OPERANDS, DOT).replace("bf16", "f32"), fast)
    assert line.seconds == 2000 / 50 and seconds_by(line) == {"products": 40}


# 20 bytes from one other device: 1 s on the link. 800 bytes: 8 s of memory.
GATHER = "(s8[10]{0}, s8[20]{0}) all-gather-start(%x), replica_groups={{0,1}}, dimensions={0}"
WORK = "%w{} = s8[400]{{0}} negate(%y)"
GIVEN = ("%x = s8[10]{0} parameter(0)", "%y = s8[400]{0} parameter(1)")


def test_a_collective_is_hidden_behind_what_is_scheduled_before_its_done():
    done = "%e = s8[20]{0} all-gather-done(%s)"
    hidden = timeline(program(*GIVEN, f"%s = {GATHER}", WORK.format(1), done))
    assert (hidden.seconds, hidden.link) == (8, 1) and seconds_by(hidden) == {"memory": 8}
    bare = timeline(program(*GIVEN, f"%s = {GATHER}", done, WORK.format(1)))
    assert (bare.seconds, bare.link) == (9, 1) and seconds_by(bare) == {"memory": 8, "collectives": 1}
    synchronous = hidden_text = program(*GIVEN, f"%s = {GATHER}", WORK.format(1), done)
    synchronous = synchronous.replace("dimensions={0}", 'dimensions={0}, backend_config={"is_sync":true}')
    assert timeline(synchronous).seconds == 9 and timeline(hidden_text).seconds == 8
    plain = program(*GIVEN, "%s = s8[20]{0} all-gather(%x), replica_groups={{0,1}}, dimensions={0}", WORK.format(1))
    assert timeline(plain).seconds == 9


def test_collectives_share_the_link_and_cross_hosts_slowly():
    two = program(
        *GIVEN, f"%s = {GATHER}", f"%t = {GATHER}", "%w = s8[50]{0} negate(%z)",
        "%e = s8[20]{0} all-gather-done(%s)", "%f = s8[20]{0} all-gather-done(%t)",
    )  # fmt: skip
    line = timeline(two)  # 50 bytes written: half a second; the link has two seconds of work
    assert line.seconds == 2 and seconds_by(line) == {"memory": 0.5, "collectives": 1.5}
    across = timeline(two.replace("{{0,1}}", "{{0,1,2,3,4,5,6,7}}"), devices=8)
    assert across.link == 2 * 18  # 20 * 7 / 8 bytes each, at 1 a second


LOOP = """%body (t: (s32[], s8[400])) -> (s32[], s8[400]) {
  %t = (s32[], s8[400]{0}) parameter(0)
  %x = s8[10]{0} get-tuple-element(%t), index=0
  %y = s8[400]{0} get-tuple-element(%t), index=1
  %s = (s8[10]{0}, s8[20]{0}) all-gather-start(%x), replica_groups={{0,1}}, dimensions={0}
  %n = s8[400]{0} negate(%y), metadata={op_name="jit(step)/decoder_layers_0_2/attention/neg"}
  %e = s8[20]{0} all-gather-done(%s)
  ROOT %o = (s32[], s8[400]{0}) tuple(%x, %n)
}
%condition (t: (s32[], s8[400])) -> pred[] {
  ROOT %p = pred[] parameter(0)
}
"""


def test_loops_multiply_and_their_parts_add_up():
    text = program(
        "%t = (s32[], s8[400]{0}) parameter(0)",
        '%w = (s32[], s8[400]{0}) while(%t), condition=%condition, body=%body, backend_config={"known_trip_count":'
        '{"n":"5"}}',
        more=LOOP,
    )
    line = timeline(text)
    assert (line.seconds, line.link) == (40, 5)
    found = estimate.estimate(parse(text), RATES, 2, layers=2)
    assert found["estimate"] == sum(found[key] for key in ("products", "memory", "collectives", "overhead"))
    assert found["estimate"] == sum(row["seconds"] for row in found["parts"])
    assert found["bytes"] == sum(row["bytes"] for row in found["parts"]) == 5 * (800 + 30)
    assert found["bytes"] == sum(one.count * one.bytes for one in costs(text))
    # Five runs of 800 bytes, of two layers; the collective of the same scope moves nothing of attention's.
    assert found["attention_bytes_per_layer"] == {"forward": 2000, "backward": 0, "recompute": 0}


def test_a_collective_spread_over_fusions_is_waited_for_at_the_last():
    more = """%first (x: s8[10]) -> s8[20] {
  ROOT %g = s8[20]{0:T(128)} all-gather(%x), channel_id=1, replica_groups={{0,1}}, dimensions={0}, frontend_attributes={chain_id="3"}
}
%last (x: s8[20]) -> s8[20] {
  ROOT %h = s8[20]{0:T(128)} all-gather(%x), channel_id=1, replica_groups={{0,1}}, dimensions={0}, frontend_attributes={chain_id="3"}
}
"""  # noqa: E501
    for work, bare in ((1, 0), (0, 1)):
        between = ["%n = s8[400]{0:T(128)} negate(%y)"] * work
        text = program(
            *GIVEN, "%f = s8[20]{0:T(128)S(1)} fusion(), kind=kCustom, calls=%first", *between,
            "%l = s8[20]{0:T(128)S(1)} fusion(), kind=kCustom, calls=%last", more=more,
        ).replace("f32[]", "f32[]{:T(128)}")  # fmt: skip
        line = timeline(text)
        assert line.link == 1 and line.seconds == 8 * work + bare


def test_copies_into_on_chip_memory_run_beside_products():
    copy = (
        "%s = (s8[400]{0:T(128)S(1)}, s8[400]{0:T(128)}, u32[]{:S(2)}) copy-start(%y)",
        "%z = s8[400]{0:T(128)S(1)} copy-done(%s)",
    )
    given = ("%a = bf16[100,10]{1,0:T(8)S(1)} parameter(0)", "%b = bf16[10,2]{1,0:T(8)S(1)} parameter(1)",
             "%y = s8[400]{0:T(128)} parameter(2)")  # fmt: skip
    dot = "%d = bf16[100,2]{1,0:T(8)S(1)} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}"
    assert timeline(program(*given, copy[0], dot, copy[1])).seconds == 4  # 4,000 operations, 4 s; 400 bytes, 4 s
    assert timeline(program(*given, dot, *copy)).seconds == 8
    # Beside an instruction that needs the memory itself, they share it: 400 bytes and 800.
    both = ("%y = s8[400]{0:T(128)} parameter(2)", copy[0], "%n = s8[400]{0:T(128)} negate(%y)", copy[1])
    assert timeline(program(*both)).seconds == 12


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("jit(_step)/transpose(jvp(loss))/while/body/closed_call/checkpoint/logits/dot_general", "logits, loss"),
        ("jit(_step)/jvp(loss)/while/body/closed_call/reduce_max", "logits, loss"),
        ("jit(_step)/jvp(tower_layers_0_12)/while/body/closed_call/attention/dot_general", "tower"),
        ("jit(_step)/jvp(projector_delta)/block/mlp/mul", "projector"),
        ("jit(_step)/jvp(decoder_layers_0_3)/while/body/closed_call/attention/dot_general", "decoder: attention"),
        ("jit(_step)/jvp(decoder_layers_0_3)/while/body/closed_call/mlp/add", "decoder: mlp"),
        ("jit(_step)/jvp(decoder_layers_0_3)/while/body/dynamic_slice", "decoder: other"),
        ("jit(_step)/optimizer/mul", "optimizer"),
        ("jit(_step)/convert_element_type", "other"),
    ],
)
def test_parts_of_the_model_by_scope(source, expected):
    assert part(source) == expected


@pytest.fixture(scope="module")
def layer():
    """A layer with a product with weights and one of scores, with its gradients."""

    def loss(weight, x):
        with jax.named_scope("decoder_layers_0_1"), jax.named_scope("attention"):
            y = x @ weight
            with jax.named_scope("scores"):
                scores = jax.nn.softmax(jnp.einsum("bqd,bkd->bqk", y, y))
                out = jnp.einsum("bqk,bkd->bqd", scores, y)
            return jnp.square(out).sum()

    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((64, 64), (4, 128, 64))]
    # A cached program has the scopes of the one that was compiled first: the cache does not look at them.
    cached = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        return jax.jit(jax.grad(loss)).lower(*shapes).compile().as_text()
    finally:
        jax.config.update("jax_enable_compilation_cache", cached)


def test_attention_bytes_leave_out_the_products_with_weights(layer):
    line = timeline(layer)
    weights = sum(t.cost.count * t.cost.bytes for t in line.timed if t.cost.products.weights)
    every = sum(t.cost.count * t.cost.bytes for t in line.timed if part(t.cost.source) == "decoder: attention")
    moved = attention_bytes(line.timed, 1)
    assert weights > 0 and sum(moved.values()) == every - weights
    assert moved["forward"] > 4 * 4 * 128 * 128 and moved["backward"] > moved["forward"] and not moved["recompute"]
    assert attention_bytes(line.timed, 2)["forward"] == moved["forward"] // 2
    inner = attention_bytes(line.timed, 1, estimate.SCORES)
    assert 2 * 4 * 4 * 128 * 128 < inner["forward"] < moved["forward"]
    assert inner["backward"] <= moved["backward"]


def test_the_dearest_are_scopes_of_the_model(layer):
    found = estimate.estimate(parse(layer), RATES, 1, 1)
    assert found["dearest"] == sorted(found["dearest"], key=lambda row: -row["seconds"])
    assert {row["scope"] for row in found["dearest"][:3]} <= {
        "decoder_layers_0_1/attention", "decoder_layers_0_1/attention/scores"
    }  # fmt: skip
    assert {row["pass"] for row in found["dearest"]} == {"forward", "backward"}
    assert sum(row["operations"] for row in found["parts"]) == 2 * 4 * 128 * 64 * (2 * 64 + 6 * 128)


def test_rates_are_those_of_the_target():
    h100 = estimate.rates(Target("h100", (8,)))
    assert h100.chip is CHIPS["h100"] and "989 TFLOP/s" in h100.assumption and "450 GB/s" in h100.assumption
    assert estimate.rates(Target("v5e", (2, 2))).efficiency is estimate.TPU
    assert estimate.rates(Target("cpu", (1,)), CHIP).chip is CHIP

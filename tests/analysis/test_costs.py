"""Operations and bytes: snippets of the forms that compilers write, with numbers worked out by hand, and programs that
are compiled here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deltallava_jax.analysis.costs import Counter, costs
from deltallava_jax.analysis.hlo import parse


def program(*entry: str, more: str = "") -> str:
    lines = "\n".join(f"  {line}" for line in entry)
    return f"HloModule step, is_scheduled=true\n{more}\nENTRY %main () -> f32[] {{\n{lines}\n}}\n"


def only(text: str):
    (one,) = costs(text)
    return one


GEMM = (
    "%c = (bf16[128,256]{1,0}, s8[33554432]{0}) custom-call(%a, %b), "
    'custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{"dot_dimension_numbers":'
    '{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"],"lhs_batch_dimensions":[],'
    '"rhs_batch_dimensions":[]}}}'
)


def test_a_product_of_cublas_without_its_working_space():
    one = only(program("%a = bf16[128,64]{1,0} parameter(0)", "%b = bf16[64,256]{1,0} parameter(1)", GEMM))
    assert (one.operations, one.products.dtype, one.products.weights) == (2 * 128 * 256 * 64, "bf16", True)
    assert one.bytes == 2 * (128 * 64 + 64 * 256 + 128 * 256)


def test_a_batched_product_is_not_one_of_weights():
    one = only(program(
        "%a = f32[4,8,16]{2,1,0} parameter(0)", "%b = f32[4,16,32]{2,1,0} parameter(1)",
        "ROOT %d = f32[4,8,32]{2,1,0} dot(%a, %b), lhs_batch_dims={0}, lhs_contracting_dims={2}, rhs_batch_dims={0}, "
        "rhs_contracting_dims={1}",
    ))  # fmt: skip
    assert one.operations == 2 * 4 * 8 * 32 * 16 and not one.products.weights


def attention(target: str, mask: str) -> str:
    shape = "bf16[2,384,4,64]{3,2,1,0}"
    return program(
        *[f"%{name} = {shape} parameter({i})" for i, name in enumerate("qkv")],
        f'%a = ({shape}, f32[2,4,384]{{2,1,0}}, u8[512]{{0}}) custom-call(%q, %k, %v), custom_call_target="{target}", '
        'backend_config={"cudnn_fmha_backend_config": {"intermediate_tensor_shape": {"element_type": "BF16", '
        f'"dimensions": ["2", "4", "384", "384"]}}, "mask_type": "{mask}"}}}}',
    )


@pytest.mark.parametrize(
    ("target", "mask", "products"),
    [("__cudnn$fmhaSoftmax", "NO_MASK", 2), ("__cudnn$fmhaScaleBiasSoftmax", "CAUSAL", 1),
     ("__cudnn$fmhaSoftmaxBackward", "PADDING_CAUSAL", 2.5)],
)  # fmt: skip
def test_attention_of_cudnn(target, mask, products):
    one = only(attention(target, mask))
    assert one.operations == products * 2 * 2 * 4 * 384 * 384 * 64 and one.products.attention
    assert one.bytes == 4 * 2 * 2 * 384 * 4 * 64 + 4 * 2 * 4 * 384


def test_splash_attention_by_its_shapes_and_a_kernel_that_states_its_operations():
    shape = "bf16[2,4,384,64]{3,2,1,0:T(8,128)(2,1)}"
    call = 'custom-call({}), custom_call_target="tpu_custom_call", metadata={{op_name="jit(f)/{}/pallas_call"}}'
    text = program(
        "%m = s8[1,3,3]{2,1,0:T(8,128)} parameter(3)",
        *[f"%{name} = {shape} parameter({i})" for i, name in enumerate("qkv")],
        f"%causal = {shape} {call.format('%m, %m, %q, %k, %v', 'splash_mha_fwd_segmented')}",
        f"%whole = {shape} {call.format('%q, %k, %v', 'splash_mha_dkv_no_residuals')}",
        f"%other = {shape} {call.format('%q', 'mine')}, "
        'backend_config={"custom_call_config":{"cost_estimate":{"flops":"77","bytes_accessed":"5"}}}',
        f"%unknown = {shape} {call.format('%q', 'theirs')}",
    )
    counter = Counter(parse(text))
    found = {one.name: one for one in counter.walk("main", 1)}
    whole = 2 * 2 * 4 * 384 * 384 * 64
    assert found["causal"].operations == round(2 * whole * 2 / 3)  # 6 of 9 blocks
    assert found["whole"].operations == 4 * whole and found["other"].operations == 77
    assert found["unknown"].operations == 0 and counter.uncounted == {"tpu_custom_call"}


def test_the_tpu_compilers_products_are_convolutions():
    text = program(
        "%x = bf16[2,16,64]{2,1,0:T(8,128)(2,1)} parameter(0)", "%w = bf16[64,32,1]{2,1,0:T(8,128)} parameter(1)",
        "%y = bf16[2,16,32]{2,1,0:T(8,128)(2,1)} convolution(%x, %w), window={size=1}, dim_labels=0bf_io0->0bf",
        # A batch of 6 products [16, 64] x [64, 32]: only one of the window's positions falls on a number.
        "%q = bf16[6,16,64]{2,1,0:T(8,128)} parameter(2)", "%k = bf16[6,64,32]{2,1,0:T(8,128)} parameter(3)",
        "%s = bf16[6,16,32]{2,1,0:T(8,128)} convolution(%q, %k), window={size=6 stride=5 lhs_dilate=6}, "
        "dim_labels=0bf_0io->0bf",
    )  # fmt: skip
    weights, batch = costs(text)
    assert (weights.operations, weights.products.weights) == (2 * 2 * 16 * 32 * 64, True)
    assert (batch.operations, batch.products.weights) == (2 * 6 * 16 * 32 * 64, False)


def test_a_real_convolution_counts_what_falls_on_the_image():
    text = program(
        "%x = f32[1,5,5,3]{3,2,1,0} parameter(0)", "%w = f32[3,3,3,4]{3,2,1,0} parameter(1)",
        "%y = f32[1,5,5,4]{3,2,1,0} convolution(%x, %w), window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f",
    )  # fmt: skip
    assert only(text).operations == 2 * 4 * 3 * (3 * 5 - 2) ** 2  # the borders see two of three


FUSED = """%body (p0: f32[12,8,8], p1: s32[], p2: f32[12,8,8], p3: f32[8,8]) -> f32[12,8,8] {
  %p0 = f32[12,8,8]{2,1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %z = s32[] constant(0)
  %one = f32[1,8,8]{2,1,0} dynamic-slice(%p0, %p1, %z, %z), dynamic_slice_sizes={1,8,8}
  %p2 = f32[12,8,8]{2,1,0} parameter(2)
  %p3 = f32[8,8]{1,0} parameter(3)
  %wide = f32[1,8,8]{2,1,0} bitcast(%p3)
  %sum = f32[1,8,8]{2,1,0} add(%one, %wide)
  ROOT %new = f32[12,8,8]{2,1,0} dynamic-update-slice(%p2, %sum, %p1, %z, %z)
}
"""


def test_a_fusion_reads_slices_and_updates_in_place():
    text = program(
        "%a = f32[12,8,8]{2,1,0} parameter(0)", "%i = s32[] parameter(1)", "%b = f32[12,8,8]{2,1,0} parameter(2)",
        "%c = f32[8,8]{1,0} parameter(3)",
        "ROOT %f = f32[12,8,8]{2,1,0} fusion(%a, %i, %b, %c), kind=kLoop, calls=%body", more=FUSED,
    )  # fmt: skip
    slice = 4 * 8 * 8
    assert only(text).bytes == slice + 4 + slice + slice  # of a, the index, c, and what is written
    whole = text.replace("add(%one, %wide)", "add(%one, %wide), note=%p0")  # a comment changes nothing
    assert only(whole).bytes == only(text).bytes
    fresh = text.replace("%p2 = f32[12,8,8]{2,1,0} parameter(2)", "%p2 = f32[12,8,8]{2,1,0} broadcast(%z)")
    fresh = fresh.replace("f32[] parameter(3)", "")
    fresh = fresh.replace("%p3 = f32[8,8]{1,0} parameter(3)", "%p3 = f32[8,8]{1,0} parameter(2)")
    fresh = fresh.replace("fusion(%a, %i, %b, %c)", "fusion(%a, %i, %c)")
    assert only(fresh).bytes == slice + 4 + slice + 12 * slice  # a new array is written whole


def test_what_lies_in_a_tpus_on_chip_memory_is_not_moved():
    text = program(
        "%a = f32[64]{0:T(128)} parameter(0)",
        "%s = (f32[64]{0:T(128)S(1)}, f32[64]{0:T(128)}, u32[]{:S(2)}) copy-start(%a)",
        "%d = f32[64]{0:T(128)S(1)} copy-done(%s)",
        "%n = f32[64]{0:T(128)S(1)} negate(%d)",
        "ROOT %e = f32[64]{0:T(128)} exponential(%n)",
    )
    assert {one.name: one.bytes for one in costs(text)} == {"s": 256, "e": 256}


def test_a_source_that_the_compiler_dropped_is_that_of_the_user():
    text = program(
        '%a = f32[64]{0} parameter(0), metadata={op_name="state.trained[0]"}', "%n = f32[64]{0} negate(%a)",
        '%e = f32[64]{0} exponential(%n), metadata={op_name="jit(f)/mlp/exp"}', "ROOT %m = f32[64]{0} copy(%e)",
    )  # fmt: skip
    assert {one.name: one.source for one in costs(text)} == dict.fromkeys("nem", "jit(f)/mlp/exp")


# ------------------------------------------------------------------ programs that are compiled here

LAYERS, ROWS, WIDTH = 6, 128, 256


@pytest.fixture(scope="module")
def scanned():
    def forward(x, weights):
        with jax.named_scope("layers"):
            layer = lambda x, weight: (jnp.tanh(x @ weight), None)
            return jax.lax.scan(layer, x, weights)[0]

    shapes = [jax.ShapeDtypeStruct(shape, np.float32) for shape in ((ROWS, WIDTH), (LAYERS, WIDTH, WIDTH))]
    return costs(jax.jit(forward).lower(*shapes).compile().as_text())


def test_operations_of_a_compiled_loop(scanned):
    assert sum(one.count * one.operations for one in scanned) == LAYERS * 2 * ROWS * WIDTH * WIDTH
    assert all("layers" in one.source for one in scanned if one.operations)


def test_weights_sliced_in_a_loop_are_read_once_a_layer(scanned):
    weights, hidden = 4 * WIDTH * WIDTH, 4 * ROWS * WIDTH
    moved = sum(one.count * one.bytes for one in scanned)
    # Each layer's weights are read once, and written and read once more where they are sliced out first; never all.
    assert LAYERS * (weights + 2 * hidden) <= moved <= LAYERS * (3 * weights + 8 * hidden)


def test_of_a_choice_among_programs_the_one_with_most_work_counts():
    branches = [lambda x, n=n: (x[:, :n] @ x[:n]).sum() for n in (8, 32, 16)]
    run = jax.jit(lambda which, x: jax.lax.switch(which, branches, x))
    text = run.lower(jnp.int32(0), jnp.ones((64, 64))).compile().as_text()
    assert "conditional(" in text
    assert sum(one.count * one.operations for one in costs(text)) == 2 * 64 * 32 * 64

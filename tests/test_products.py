"""Products of activations with parameters: gradients in float32 beside values in bfloat16."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from deltallava_jax.products import contract, gradient_dtype, matmul, plus

SPECS = [
    ("rc,cd->rd", (64, 12), (12, 20)),
    ("nhwgi,gio->nhwgo", (4, 3, 3, 2, 18), (2, 18, 5)),
    ("nhwad,cad->nhwac", (4, 2, 2, 3, 8), (10, 3, 8)),
    ("nhwpqc,pqc->nhwc", (4, 2, 2, 3, 3, 6), (3, 3, 6)),
]


def draw(x_shape, kernel_shape):
    x, kernel = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate((x_shape, kernel_shape)))
    return x.astype(jnp.bfloat16), kernel


def in_float64(spec, x, kernel, d_y):
    """The gradients, from the factors as they are rounded to bfloat16."""
    x, kernel, d_y = (np.asarray(a.astype(jnp.bfloat16), np.float64) for a in (x, kernel, d_y))
    (of_x, of_kernel), of_y = spec.split("->")[0].split(","), spec.split("->")[1]
    return np.einsum(f"{of_y},{of_kernel}->{of_x}", d_y, kernel), np.einsum(f"{of_x},{of_y}->{of_kernel}", x, d_y)


@pytest.mark.parametrize("spec, x_shape, kernel_shape", SPECS)
def test_values_are_of_the_activations_and_gradients_of_the_kernel(spec, x_shape, kernel_shape):
    x, kernel = draw(x_shape, kernel_shape)
    y, pull = jax.vjp(lambda x, kernel: contract(spec, x, kernel), x, kernel)
    np.testing.assert_array_equal(y, jnp.einsum(spec, x, kernel.astype(jnp.bfloat16)))
    d_y = jax.random.normal(jax.random.key(2), y.shape).astype(jnp.bfloat16)
    d_x, d_kernel = pull(d_y)
    expected = in_float64(spec, x, kernel, d_y)
    assert (d_x.dtype, d_kernel.dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_allclose(np.asarray(d_x, float), expected[0], atol=0.05, rtol=0.01)
    np.testing.assert_allclose(d_kernel, expected[1], atol=1e-4, rtol=1e-5)


def test_gradients_in_bfloat16_if_asked():
    x, kernel = draw((64, 12), (12, 20))
    grad = jax.jit(jax.grad(lambda kernel: matmul(x, kernel).astype(jnp.float32).sum()))
    whole = grad(kernel)
    with gradient_dtype("bfloat16"):  # the same function: the context is part of its key
        rounded = grad(kernel)
    assert jnp.array_equal(rounded, rounded.astype(jnp.bfloat16)) and not jnp.array_equal(whole, rounded)


def test_devices_shares_are_added_in_float32():
    """One row a device: shares of 1 and of 2^-12, which a bfloat16 sum loses."""
    mesh = jax.make_mesh((8,), ("rows",), axis_types=(AxisType.Auto,), devices=jax.devices()[:8])
    x = jnp.array([1.0] + [2.0**-12] * 7, jnp.bfloat16)[:, None]
    x = jax.device_put(x, NamedSharding(mesh, P("rows")))
    loss = lambda kernel, bias: plus(matmul(x, kernel), bias * 2.0**-12).astype(jnp.float32).sum()
    kernel, bias = jnp.ones((1, 1)), jnp.ones(1)
    d_kernel, d_bias = jax.jit(jax.grad(loss, (0, 1)))(kernel, bias)
    assert d_kernel.item() == 1 + 7 * 2.0**-12
    assert d_bias.item() == 8 * 2.0**-12


def test_equal_dtypes_are_a_plain_product():
    x, kernel = draw((64, 12), (12, 20))
    for a, b in ((x, kernel.astype(jnp.bfloat16)), (x.astype(jnp.float32), kernel)):
        assert "custom_vjp" not in str(jax.make_jaxpr(matmul)(a, b))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_products_that_a_policy_saves_are_not_computed_again(dtype):
    kernels = jnp.ones((2, 8, 8))
    x = jnp.ones((4, 8), dtype)
    body = lambda kernels: jnp.tanh(matmul(jnp.tanh(matmul(x, kernels[0])), kernels[1])).astype(jnp.float32).sum()
    saving = jax.checkpoint(body, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable)
    products = str(jax.make_jaxpr(jax.grad(saving))(kernels)).count("dot_general")
    assert products == 2 + 3  # forward; of both kernels and of what is between them

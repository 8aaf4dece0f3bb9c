"""Activations with parameters: products and sums in the activations' dtype, gradients of parameters in a wider one.

By jax's own rule the gradient of a bfloat16 copy of a parameter is rounded on each device, and the devices' shares are
added in bfloat16. Here they are made and added in ``gradient_dtype``; the factors of products are bfloat16 all the
same."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Float

from deltallava_jax.arrays import Array

# The dtype of the gradients of parameters that are wider than the activations; part of the keys of jax's caches.
gradient_dtype = jax.make_user_context(default_value="float32")


def contract(spec: str, x: Float[Array, ...], kernel: Float[Array, ...]) -> Float[Array, ...]:
    """jnp.einsum(spec, x, kernel) in the dtype of x. Each index of the kernel is one of x or of the result."""
    if kernel.dtype.itemsize <= x.dtype.itemsize or gradient_dtype.value == x.dtype:
        return jnp.einsum(spec, x, kernel.astype(x.dtype))
    return _contract(spec, x, kernel)


def matmul(x: Float[Array, "... C"], kernel: Float[Array, "C D"]) -> Float[Array, "... D"]:
    """``contract`` over the last axis."""
    # Rows in one dimension: XLA's CPU compiler then takes far fewer transposed copies in the backward pass.
    return contract("rc,cd->rd", x.reshape(-1, x.shape[-1]), kernel).reshape(*x.shape[:-1], kernel.shape[1])


def plus(x: Array, parameter: Array) -> Array:
    """x + parameter in the dtype of x, added in the wider dtype, in which the parameter's gradient is summed."""
    return (x + parameter).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _contract(spec, x, kernel):
    return jnp.einsum(spec, x, kernel.astype(x.dtype))


def _contract_forward(spec, x, kernel):
    return _contract(spec, x, kernel), (x, kernel)


def _contract_backward(spec, saved, gradient):
    x, kernel = saved
    (of_x, of_kernel), result = spec.split("->")[0].split(","), spec.split("->")[1]
    d_x = jnp.einsum(f"{result},{of_kernel}->{of_x}", gradient, kernel.astype(x.dtype))
    product = jnp.einsum(f"{of_x},{result}->{of_kernel}", x, gradient, preferred_element_type=kernel.dtype)
    return d_x, product


_contract.defvjp(_contract_forward, _contract_backward)

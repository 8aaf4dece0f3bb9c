"""Activations with parameters: products and sums in the activations' dtype, gradients of parameters in a wider one.

By jax's own rule the gradient of a bfloat16 copy of a parameter is rounded on each device, and the devices' shares are
added in bfloat16. Here they are made and added in ``gradient_dtype``; the factors of products are bfloat16 all the
same."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Float

from deltallava_jax.arrays import Array

# The dtype of the gradients of parameters that are wider than the activations; part of the keys of jax's caches.
gradient_dtype = jax.make_user_context(default_value="float32")


def contract(spec: str, x: Float[Array, ...], kernel: Float[Array, ...]) -> Float[Array, ...]:
    """jnp.einsum(spec, x, kernel) in the dtype of x. Each index of the kernel is one of x or of the result."""
    plain = kernel.dtype.itemsize <= x.dtype.itemsize or gradient_dtype.value == x.dtype
    return (_product if plain else _contract)(spec, x, kernel)


def matmul(x: Float[Array, "... C"], kernel: Float[Array, "C D"]) -> Float[Array, "... D"]:
    """``contract`` over the last axis."""
    # Rows in one dimension: XLA's CPU compiler then takes far fewer transposed copies in the backward pass.
    return contract("rc,cd->rd", x.reshape(-1, x.shape[-1]), kernel).reshape(*x.shape[:-1], kernel.shape[1])


def plus(x: Array, parameter: Array) -> Array:
    """x + parameter in the dtype of x, added in the wider dtype, in which the parameter's gradient is summed."""
    return (x + parameter).astype(x.dtype)


def _product(spec, x, kernel):
    return jnp.einsum(spec, x, kernel.astype(x.dtype))


_contract = jax.custom_vjp(_product, nondiff_argnums=(0,))


def _forward(spec, x, kernel):
    """Keeps what the gradients that are asked for need."""
    kept = x.value if kernel.perturbed else None, kernel.value if x.perturbed else None
    return _product(spec, x.value, kernel.value), kept


def _backward(spec, kept, d_y):
    x, kernel = kept
    inputs, of_y = spec.split("->")
    of_x, of_kernel = inputs.split(",")
    d_x = d_kernel = None
    if kernel is not None:
        d_x = _product(f"{of_y},{of_kernel}->{of_x}", d_y, kernel)
    if x is not None:
        d_kernel = jnp.einsum(f"{of_x},{of_y}->{of_kernel}", x, d_y, preferred_element_type=jnp.float32)
    return d_x, d_kernel


_contract.defvjp(_forward, _backward, symbolic_zeros=True)

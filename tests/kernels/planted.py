"""Kernels of dense attention for a CPU, most with a fault of their own, to plant among the candidates."""

import sys
from types import ModuleType

import jax
import jax.numpy as jnp

from deltallava_jax.kernels import registry
from deltallava_jax.kernels.attention import attention
from deltallava_jax.kernels.attention.dispatch import OPERATION

TIMES = 23  # that the slow one computes the same


def right(q, k, v, mask):
    return attention(q, k, v, mask, implementation="xla")


def wrong(q, k, v, mask):
    """Without the mask's newest key."""
    allowed = jnp.ones((1, 1, q.shape[1], k.shape[1]), bool) if mask is None else mask.allowed
    return jax.nn.dot_product_attention(q, k, v, mask=allowed & (jnp.arange(k.shape[1]) != k.shape[1] // 2))


@jax.custom_vjp
def steeper(x):
    return x


steeper.defvjp(lambda x: (x, None), lambda _, gradient: (1.2 * gradient,))


def wrong_gradient(q, k, v, mask):
    return right(q, steeper(k), v, mask)


def raising(q, k, v, mask):
    raise NotImplementedError("no plan found\nfor this graph")


def nan(q, k, v, mask):
    third = (jnp.arange(q.shape[1]) == 3)[:, None, None]
    return jnp.where(third, jnp.nan, right(q, k, v, mask))


def slow(q, k, v, mask):
    again = lambda out, _: (right(q + 0 * out, k, v, mask), None)
    return jax.lax.scan(again, q, length=TIMES)[0]


FAULTS = (wrong, wrong_gradient, raising, nan, slow)


def module(function):
    """A kernel's module."""
    made = ModuleType(f"planted_{function.__name__}")
    made.attend, made.refusal = function, lambda *arguments: None
    sys.modules[made.__name__] = made
    return {"cpu": made.__name__}


def plant(*functions):
    """Adds them to dense attention's kernels, until ``uproot``."""
    OPERATION.settled.discard("cpu")
    OPERATION.kernels.update({function.__name__: module(function) for function in functions})


def uproot():
    OPERATION.settled.add("cpu")
    for name in [name for name, modules in OPERATION.kernels.items() if modules.get("cpu", "").startswith("planted")]:
        del OPERATION.kernels[name]
    registry.use("", {})

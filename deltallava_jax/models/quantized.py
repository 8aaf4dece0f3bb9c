"""Frozen matrices in 4 or 8 bits, in blocks along their input axis.

nf4: 16 levels that are equally likely for normally distributed weights (QLoRA, Dettmers et al. 2023, arXiv:2305.14314),
two codes a byte; int8: 255 equal steps. Each block of 64 weights of an output has its largest magnitude as bfloat16
scale, a quarter of a bit a weight, in place of QLoRA's second quantisation. A matrix is dequantised where it is used,
one layer at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from deltallava_jax.arrays import Array
from deltallava_jax.models.layers import Params
from deltallava_jax.products import matmul

BLOCK = 64
# QLoRA's appendix E: quantiles of a standard normal distribution, scaled to -1..1, with an exact zero.
NF4 = np.array([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
], np.float32)  # fmt: skip
LARGEST = 127  # of the codes of int8


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Quantized:
    """A matrix [in, out], or a stack of them, as codes (two a byte for nf4) and the scales of blocks of inputs."""

    codes: Array
    scale: Array

    def product(self, x: Float[Array, "... C"]) -> Float[Array, "... D"]:
        return matmul(x, self.whole(x.dtype))

    def whole(self, dtype) -> Float[Array, "... C D"]:
        """The matrix that the codes stand for."""
        if self.codes.dtype == jnp.uint8:
            pair = jnp.stack([self.codes & 15, self.codes >> 4], axis=-2)  # of neighbouring inputs
            values = jnp.asarray(NF4)[pair.reshape(*self.codes.shape[:-2], -1, self.codes.shape[-1])]
        else:
            values = self.codes.astype(jnp.float32) / LARGEST
        blocks = values.reshape(*self.scale.shape[:-1], -1, values.shape[-1])
        return (blocks * self.scale[..., None, :].astype(jnp.float32)).reshape(values.shape).astype(dtype)


def quantize(kernel: Float[Array, "... C D"], kind: str) -> Params:
    """{kind: codes, "scale"} of a matrix or a stack of them, of an even number of inputs; kind: nf4 or int8."""
    width = kernel.shape[-2]
    block = math.gcd(BLOCK, width)
    if block % 2:
        raise ValueError(f"a matrix of {width} inputs cannot be quantised in pairs")

    def one(kernel):
        blocks = kernel.astype(jnp.float32).reshape(width // block, block, -1)
        scale = jnp.abs(blocks).max(1).astype(jnp.bfloat16)
        parts = blocks / jnp.where(scale == 0, 1, scale)[:, None].astype(jnp.float32)
        parts = parts.reshape(width, -1)
        if kind == "int8":
            return jnp.round(parts * LARGEST).clip(-LARGEST, LARGEST).astype(jnp.int8), scale
        nearest = jnp.searchsorted(jnp.asarray((NF4[1:] + NF4[:-1]) / 2), parts, method="compare_all")
        pair = nearest.astype(jnp.uint8).reshape(width // 2, 2, -1)
        return pair[:, 0] | (pair[:, 1] << 4), scale

    codes, scale = one(kernel) if kernel.ndim == 2 else jax.lax.map(one, kernel)  # one layer's float32 at a time
    return {kind: codes, "scale": scale}


def assembled(leaf: Params) -> Quantized:
    """The matrix of ``quantize``'s result."""
    return Quantized(leaf["nf4"] if "nf4" in leaf else leaf["int8"], leaf["scale"])

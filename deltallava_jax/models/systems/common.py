"""Parts of several systems: torch's packed attention, attention within cells, grids and their positions."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Float

from deltallava_jax.arrays import Array
from deltallava_jax.config import ProjectorConfig
from deltallava_jax.kernels.attention import attention
from deltallava_jax.kernels.windowed_attention import local_attention
from deltallava_jax.models.layers import Linear, resize_grid, sincos_table, trunc_normal, xavier_uniform
from deltallava_jax.models.names import Entry, linear
from deltallava_jax.products import matmul, plus

EPS = 1e-6  # of most projectors' LayerNorms


class PackedAttention(nnx.Module):
    """torch's MultiheadAttention: one packed input matrix for queries, keys and values, and an output matrix."""

    def __init__(self, width: int, cfg: ProjectorConfig, *, rngs: nnx.Rngs):
        self.inputs = Linear(width, 3 * width, kernel_init=xavier_uniform, rngs=rngs)
        self.o = Linear(width, width, kernel_init=trunc_normal(cfg.initializer_range), rngs=rngs)
        self.head_dim = cfg.head_dim

    def heads(self, q, k, v):
        """Each [..., C] through its third of the packed matrix, split into heads."""
        kernels, biases = (jnp.split(x[...], 3, axis=-1) for x in (self.inputs.kernel, self.inputs.bias))
        split = lambda t: rearrange(t, "... (a d) -> ... a d", d=self.head_dim)
        made = zip((q, k, v), kernels, biases, strict=True)
        return tuple(split(plus(matmul(x, kernel), bias)) for x, kernel, bias in made)

    def __call__(self, q: Float[Array, "n Q C"], k: Float[Array, "n K C"], v: Float[Array, "n K C"]):
        return self.o(rearrange(attention(*self.heads(q, k, v)), "n q a d -> n q (a d)"))


class LocalAttention(PackedAttention):
    """The same over grids, each query with the s x s patches of its own cell."""

    def __call__(self, q: Float[Array, "n Q Q C"], k: Float[Array, "n g g C"], v: Float[Array, "n g g C"]):
        kernels = jnp.split(self.inputs.kernel[...], 3, axis=1)
        q_bias, _, v_bias = jnp.split(self.inputs.bias[...], 3)
        # The keys' bias shifts all scores of a query alike, which softmax ignores; the weights sum to one.
        q = plus(matmul(q, kernels[0]), q_bias)
        y = local_attention(q, k, v, kernels[1], kernels[2], head_dim=self.head_dim)
        return self.o(plus(y, v_bias))


def attention_names(torch: str, path: str) -> list[Entry]:
    """Names of a torch MultiheadAttention."""
    inputs = [
        Entry(f"{torch}.in_proj_weight", f"{path}/inputs/kernel", "linear"),
        Entry(f"{torch}.in_proj_bias", f"{path}/inputs/bias"),
    ]
    return inputs + linear(f"{torch}.out_proj", f"{path}/o")


def as_grid(x: Float[Array, "n N C"], grid: int) -> Float[Array, "n g g C"]:
    return rearrange(x, "n (h w) c -> n h w c", h=grid)


def pool_grid(x: Float[Array, "n g g C"], side: int) -> Float[Array, "n s s C"]:
    """Averages of equal cells."""
    return rearrange(x, "n (h p) (w q) c -> n h w (p q) c", h=side, w=side).mean(3)


def half_table(side: int, width: int) -> jax.Array:
    """The sine-cosine table as published checkpoints hold it: rounded to half precision, kept in float32."""
    return jnp.asarray(sincos_table(side, width)).astype(jnp.float16).astype(jnp.float32)


def resize_table(table: Float[Array, "S2 C"], grid: int) -> Float[Array, "N C"]:
    """A square table of positions for a grid of another side (torch's bicubic)."""
    side = round(table.shape[0] ** 0.5)
    resized = resize_grid(table.reshape(1, side, side, -1).astype(jnp.float32), grid, "bicubic")
    return resized.reshape(grid * grid, -1)

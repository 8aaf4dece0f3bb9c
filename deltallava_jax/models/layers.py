"""Building blocks, and the bridge from NNX modules to pure functions over nested dicts.

An NNX class defines parameters and forward code. ``init`` makes its parameters as a nested dict of arrays; ``bind``
attaches such a dict (the whole, or one layer of a stack) to the class for one call inside a traced function.
Matrices are cast to the activations' dtype where they are used (products.py), so parameters can stay float32 while the
compute is bfloat16; norms and softmax are computed in float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Float

from deltallava_jax.arrays import Array
from deltallava_jax.config import ROW_AXES
from deltallava_jax.kernels.attention import kernel_outputs_saveable
from deltallava_jax.products import matmul, plus

Params = dict  # nested dict of jax.Array


# ------------------------------------------------------------------ NNX <-> nested dicts


@functools.lru_cache(maxsize=256)
def _graphdef(cls: type, config) -> nnx.GraphDef:
    return nnx.split(nnx.eval_shape(lambda: cls(config, rngs=nnx.Rngs(0))))[0]


def init(cls: type, config, key: Array) -> Params:
    """Fresh float32 parameters of ``cls(config, rngs=...)`` as a nested dict."""
    return nnx.to_pure_dict(nnx.split(cls(config, rngs=nnx.Rngs(params=key)))[1])


def init_stack(cls: type, config, key: Array, count: int) -> Params:
    """Parameters of ``count`` equal layers, stacked on axis 0."""
    return jax.vmap(lambda k: init(cls, config, k))(jax.random.split(key, count))


def bind(cls: type, config, params: Params) -> nnx.Module:
    """``cls(config)`` holding ``params``: ``bind(Layer, config, params)(x)``."""
    return nnx.merge(_graphdef(cls, config), nnx.State(params))


_policies = jax.checkpoint_policies
ADAPTED = "adapted"  # the name of products with an adapter, of which "dots" saves the sum alone
# model.remat -> a layer's body whose backward pass recomputes so much. A forward pass alone recomputes nothing, so
# "auto" stands for itself there; training replaces it (training/remat.py).
REMAT: dict[str, Callable] = {
    "auto": lambda body: body,
    "none": lambda body: body,
    "dots": functools.partial(
        jax.checkpoint,
        policy=_policies.save_from_both_policies(
            _policies.save_from_both_policies(_policies.dots_with_no_batch_dims_saveable, kernel_outputs_saveable),
            _policies.save_only_these_names(ADAPTED),
        ),
    ),
    "attention": functools.partial(jax.checkpoint, policy=kernel_outputs_saveable),
    "full": jax.checkpoint,
}


# ------------------------------------------------------------------ sharding


def by_rows(x: Float[Array, "B ..."]) -> Float[Array, "B ..."]:
    """Activations between blocks: rows divided over the mesh, the rest whole. The identity without a mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, P(ROW_AXES, *(None,) * (x.ndim - 1)))


# ------------------------------------------------------------------ initialisers


def trunc_normal(std: float):
    """Normal of that standard deviation, truncated to -2..2, as torch's trunc_normal_ with its default bounds."""
    bound = 2.0 / std
    return lambda key, shape: std * jax.random.truncated_normal(key, -bound, bound, shape)


def normal(std: float):
    return lambda key, shape: std * jax.random.normal(key, shape)


xavier_uniform = jax.nn.initializers.xavier_uniform()


def torch_default(fan_in: int):
    """torch's default for the weights and biases of Linear and convolutions: uniform within fan_in**-0.5."""
    bound = fan_in**-0.5
    return lambda key, shape: jax.random.uniform(key, shape, minval=-bound, maxval=bound)


# ------------------------------------------------------------------ layers


class Linear(nnx.Module):
    """x @ kernel + bias over the last axis; kernel [in, out]."""

    def __init__(
        self, in_width: int, out_width: int, *, bias: bool = True, kernel_init, bias_init=None, rngs: nnx.Rngs
    ):
        bias_init = bias_init or jax.nn.initializers.zeros
        self.kernel = nnx.Param(kernel_init(rngs.params(), (in_width, out_width)))
        self.bias = nnx.Param(bias_init(rngs.params(), (out_width,))) if bias else None

    def __call__(self, x: Float[Array, "... C"]) -> Float[Array, "... D"]:
        kernel = self.kernel.get_value()  # an array; or a matrix of models/lora.py, which knows its product
        y = matmul(x, kernel) if isinstance(kernel, jax.Array) else kernel.product(x)
        return y if self.bias is None else plus(y, self.bias[...])


def output_major(kernel: Float[Array, "D C"], rows: Float[Array, "R C"], dtype=None) -> Float[Array, "R D"]:
    """rows @ kernel.T as kernel @ rows.T: for a few rows XLA's CPU matmul is then about twice as fast. The barriers
    keep the compiler from transposing it back, and on GPUs from concatenating the kernels of products that share
    ``rows``, at every token. dtype: of the result, by default that of the rows."""
    kind = dtype or rows.dtype
    if len(rows) == 1 and kind != rows.dtype:  # GPUs have no such product of a vector: they would widen the kernel
        return (kernel.astype(kind) * rows.astype(kind)).sum(1)[None]
    kernel, rows = jax.lax.optimization_barrier((kernel, rows))
    product = jnp.matmul(kernel.astype(rows.dtype), rows.T, preferred_element_type=kind)
    return (product if len(rows) == 1 else jax.lax.optimization_barrier(product)).T


class OutputMajor(Linear):
    """Linear with its kernel transposed to [out, in]."""

    def __call__(self, x: Float[Array, "... C"]) -> Float[Array, "... D"]:
        y = output_major(self.kernel[...], x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)
        return y if self.bias is None else plus(y, self.bias[...])


class LayerNorm(nnx.Module):
    """LayerNorm over the last axis, computed in float32."""

    def __init__(self, width: int, *, eps: float):
        self.scale = nnx.Param(jnp.ones(width))
        self.bias = nnx.Param(jnp.zeros(width))
        self.eps = eps

    def __call__(self, x: Float[Array, "... C"]) -> Float[Array, "... C"]:
        y = x.astype(jnp.float32)
        y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt((y * y).mean(-1, keepdims=True) + self.eps)
        return (y * self.scale[...] + self.bias[...]).astype(x.dtype)


class RMSNorm(nnx.Module):
    """Root-mean-square norm over the last axis, computed in float32."""

    def __init__(self, width: int, *, eps: float):
        self.scale = nnx.Param(jnp.ones(width))
        self.eps = eps

    def __call__(self, x: Float[Array, "... C"]) -> Float[Array, "... C"]:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt((y * y).mean(-1, keepdims=True) + self.eps)
        return (y * self.scale[...]).astype(x.dtype)


def masked_attention(
    q: Float[Array, "B T H D"], k: Float[Array, "B T H D"], v: Float[Array, "B T H D"], kept: Float[Array, "B T"]
) -> Float[Array, "B T H D"]:
    """Self-attention in which ``kept`` (0 to 1) weights each token as a key, fully for itself; gradients reach
    ``kept`` (raoyongming/DynamicViT, softmax_with_policy)."""
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    itself = jnp.eye(q.shape[1])
    counts = kept[:, None, None, :] * (1 - itself) + itself
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True))) * counts
    weights = (weights + 1e-6 / q.shape[1]) / (weights.sum(-1, keepdims=True) + 1e-6)
    return jnp.einsum("bhqk,bkhd->bqhd", weights.astype(v.dtype), v)


def gelu(x):
    """The exact (erf) GELU, torch's default."""
    return jax.nn.gelu(x, approximate=False)


def quick_gelu(x):
    """CLIP's approximation x * sigmoid(1.702 x)."""
    return x * jax.nn.sigmoid(1.702 * x)


def drop_path(x: Float[Array, "B ..."], rate: float, key: Array | None) -> Float[Array, "B ..."]:
    """Stochastic depth: drops a residual branch for a whole sample; the identity without a key."""
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, (x.shape[0],) + (1,) * (x.ndim - 1))
    return jnp.where(keep, x / (1.0 - rate), 0.0).astype(x.dtype)


# ------------------------------------------------------------------ grids


def resize_matrix(n_in: int, n_out: int, kind: str) -> np.ndarray:
    """[n_out, n_in] weights of torch's 1-D interpolation: half-pixel centres, clamped borders, no antialiasing.

    kind: "bilinear", or "bicubic" with torch's a = -0.75 (jax.image.resize's cubic has a = -0.5)."""
    centres = (np.arange(n_out) + 0.5) * n_in / n_out - 0.5
    if kind == "bilinear":
        centres = np.maximum(centres, 0.0)
        taps = (0, 1)
        weight = _linear
    else:
        taps = (-1, 0, 1, 2)
        weight = _cubic
    first = np.floor(centres).astype(int)
    matrix = np.zeros((n_out, n_in))
    for tap in taps:
        index = np.clip(first + tap, 0, n_in - 1)
        np.add.at(matrix, (np.arange(n_out), index), weight(np.abs(centres - (first + tap))))
    return matrix


def _linear(distance: np.ndarray) -> np.ndarray:
    return 1 - distance


def _cubic(distance: np.ndarray) -> np.ndarray:
    """Keys' cubic convolution kernel: one polynomial up to a distance of 1, another up to 2."""
    a, d = -0.75, distance
    near = (a + 2) * d**3 - (a + 3) * d**2 + 1
    far = a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
    return np.where(d <= 1, near, far)


def resize_grid(x: Float[Array, "B h w C"], side: int, kind: str) -> Float[Array, "B s s C"]:
    """Interpolates a grid of features to side x side as torch's interpolate does (see resize_matrix)."""
    rows = jnp.asarray(resize_matrix(x.shape[1], side, kind), x.dtype)
    cols = jnp.asarray(resize_matrix(x.shape[2], side, kind), x.dtype)
    return jnp.einsum("oh,bhwc,pw->bopc", rows, x, cols)


@functools.lru_cache(maxsize=32)
def sincos_table(side: int, width: int) -> np.ndarray:
    """Fixed 2-D sine-cosine table [side * side, width]: columns in the first half, rows in the second."""
    frequencies = 10000.0 ** -(np.arange(width // 4) / (width / 4))
    angles = np.arange(side)[:, None] * frequencies
    axis = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)  # [side, width / 2]
    columns = np.broadcast_to(axis[None, :], (side, side, width // 2))
    rows = np.broadcast_to(axis[:, None], (side, side, width // 2))
    return np.concatenate([columns, rows], axis=-1).reshape(side * side, width).astype(np.float32)

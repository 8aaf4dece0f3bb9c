"""A Llama-architecture decoder: RMSNorm, rotary positions, grouped key heads, gated MLP.

Training stacks the layers and scans over them; ``unstacked`` gives them one by one, as inference takes them. Any slice
of the layers can be applied alone, with or without a key-value cache, so that a system may select or pool hidden
states in between. The layout decides the attention: a token attends to itself and the tokens before it of its own
segment (and of its own branch or the shared part, where the rounds of a conversation are independent); nothing attends
to segment 0 (padding, visual tokens that do not exist).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Bool, Float, Int, Shaped

from deltallava_jax.arrays import Array
from deltallava_jax.config import DecoderConfig
from deltallava_jax.kernels.attention import AttentionMask, attention, causal
from deltallava_jax.models.layers import (
    REMAT,
    Linear,
    OutputMajor,
    Params,
    RMSNorm,
    bind,
    by_rows,
    init,
    init_stack,
    normal,
    output_major,
)
from deltallava_jax.sequence import Layout

MATRICES = ("kernel", "embedding")  # the last names of matrices' paths; the rest are norms and biases


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """Keys and values of a slice of the layers, one array per layer; of a row's C positions the first ``length`` are
    written. Heads come before positions: the products of attention then read the cache as it lies, where CPUs would
    first copy it.

    live: the written positions that hold a token; padding and missing visual tokens are not attended to."""

    k: tuple[Float[Array, "B G C D"], ...]
    v: tuple[Float[Array, "B G C D"], ...]
    live: Bool[Array, "B C"]
    length: Int[Array, " B"]


class Embedding(nnx.Module):
    def __init__(self, cfg: DecoderConfig, *, rngs: nnx.Rngs):
        self.embedding = nnx.Param(normal(cfg.initializer_range)(rngs.params(), (cfg.vocab_size, cfg.width)))

    def __call__(self, tokens: Int[Array, "B T"], dtype) -> Float[Array, "B T d"]:
        return self.embedding[...][tokens].astype(dtype)


class Layer(nnx.Module):
    linear = Linear

    def __init__(self, cfg: DecoderConfig, *, rngs: nnx.Rngs):
        init = normal(cfg.initializer_range)

        def make(inputs: int, outputs: int, bias: bool = False) -> Linear:
            return self.linear(inputs, outputs, bias=bias, kernel_init=init, rngs=rngs)

        width = cfg.width
        kv_width = cfg.kv_heads * cfg.head_dim
        self.attention_norm = RMSNorm(width, eps=cfg.norm_eps)
        self.q = make(width, width, cfg.qkv_bias)
        self.k = make(width, kv_width, cfg.qkv_bias)
        self.v = make(width, kv_width, cfg.qkv_bias)
        self.o = make(width, width)
        self.mlp_norm = RMSNorm(width, eps=cfg.norm_eps)
        self.gate = make(width, cfg.mlp_width)
        self.up = make(width, cfg.mlp_width)
        self.down = make(cfg.mlp_width, width)
        self.head_dim = cfg.head_dim

    def __call__(
        self, x: Float[Array, "B S d"], rotary: tuple[Array, Array], mask: AttentionMask
    ) -> Float[Array, "B S d"]:
        return self.feed(self.attend(x, *self.heads(x, rotary), mask))

    def heads(self, x: Float[Array, "B Q d"], rotary: tuple[Array, Array]) -> tuple[Array, Array, Array]:
        """(queries [B, Q, H, D], keys and values [B, Q, G, D]); queries and keys are rotated."""
        with jax.named_scope("attention"):
            y = self.attention_norm(x)
            q = split_heads(self.q(y), self.head_dim)
            k = split_heads(self.k(y), self.head_dim)
            v = split_heads(self.v(y), self.head_dim)
            k = rotate(k, rotary)
            return rotate(q, rotary), k, v

    def attend(
        self,
        x: Float[Array, "B Q d"],
        q: Float[Array, "B Q H D"],
        k: Float[Array, "B C G D"],
        v: Float[Array, "B C G D"],
        mask: AttentionMask,
    ) -> Float[Array, "B Q d"]:
        """The attention half, with its residual: these queries over these keys and values."""
        with jax.named_scope("attention"):
            with jax.named_scope("scores"):
                y = attention(q, k.astype(q.dtype), v.astype(q.dtype), mask)
            return x + self.o(rearrange(y, "b t h d -> b t (h d)"))

    def feed(self, x: Float[Array, "B Q d"]) -> Float[Array, "B Q d"]:
        """The MLP half, with its residual."""
        with jax.named_scope("mlp"):
            y = self.mlp_norm(x)
            return x + self.down(jax.nn.silu(self.gate(y)) * self.up(y))


class UnstackedLayer(Layer):
    """A layer as ``unstacked`` gives it."""

    linear = OutputMajor


class Head(nnx.Module):
    """Final norm and, unless tied to the embedding, the output matrix."""

    def __init__(self, cfg: DecoderConfig, *, rngs: nnx.Rngs):
        self.norm = RMSNorm(cfg.width, eps=cfg.norm_eps)
        init = normal(cfg.initializer_range)
        self.out = None if cfg.tied_head else Linear(cfg.width, cfg.vocab_size, bias=False, kernel_init=init, rngs=rngs)


def init_params(cfg: DecoderConfig, key: Array) -> Params:
    """{"embed", "layers" (stacked on axis 0), "head"}, float32."""
    keys = jax.random.split(key, 3)
    return {
        "embed": init(Embedding, cfg, keys[0]),
        "layers": init_stack(Layer, cfg, keys[1], cfg.layers),
        "head": init(Head, cfg, keys[2]),
    }


def embed(params: Params, cfg: DecoderConfig, tokens: Int[Array, "B T"], dtype=jnp.float32) -> Float[Array, "B T d"]:
    with jax.named_scope("embed"):
        return bind(Embedding, cfg, params["embed"])(tokens, dtype)


def rotary_angles(positions: Int[Array, "B S"], cfg: DecoderConfig) -> tuple[Array, Array]:
    """(cosine, sine), each [B, S, 1, D / 2], float32."""
    angles = positions[..., None, None] * jnp.asarray(rotary_frequencies(cfg), jnp.float32)
    return jnp.cos(angles), jnp.sin(angles)


def rotary_frequencies(cfg: DecoderConfig) -> np.ndarray:
    """[D / 2] radians a position. Llama 3's scaling divides the frequencies whose wavelength exceeds the original
    context over low_freq_factor, keeps those below it over high_freq_factor, and blends in between (Hugging Face
    transformers, modeling_rope_utils)."""
    half = cfg.head_dim // 2
    frequencies = cfg.rope_base ** -(np.arange(half) / half)
    if cfg.rope_scaling is None:
        return frequencies
    scaling = cfg.rope_scaling
    turns = scaling.original_length * frequencies / (2 * np.pi)  # in the original context
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = np.clip(kept, 0.0, 1.0)
    return frequencies * (kept + (1 - kept) / scaling.factor)


def split_heads(x: Float[Array, "B S HD"], head_dim: int) -> Float[Array, "B S H D"]:
    return rearrange(x, "b t (h d) -> b t h d", d=head_dim)


def rotate(x: Float[Array, "B S H D"], rotary: tuple[Array, Array]) -> Float[Array, "B S H D"]:
    """Rotary positions in the half-split convention of the Hugging Face checkpoints, in float32."""
    cosine, sine = rotary
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1).astype(x.dtype)


def unstacked(params: Params, cfg: DecoderConfig, dtype=None, *, donate: bool = False) -> Params:
    """The same decoder for inference: ``layers`` a tuple, matrices [out, in] and in ``dtype`` (their own for None).

    A scan loads each layer's weights twice, once to slice them from the stack. Every function here takes either form;
    training needs the stacked one. donate: delete each stack once its layers are copied out, so that memory holds
    little more than one decoder."""
    if isinstance(params["layers"], tuple):
        return params

    def leaf(path, x):
        matrix = path[-1].key in MATRICES
        kind = dtype if matrix and dtype else x.dtype
        turn = path[-1].key == "kernel"
        if path[0].key != "layers":
            return jnp.swapaxes(x, -1, -2).astype(kind) if turn else x.astype(kind)
        found = [_taken(x, index, turn, jnp.dtype(kind)) for index in range(cfg.layers)]
        if donate:
            jax.block_until_ready(found)
            x.delete()
        return found

    turned = jax.tree_util.tree_map_with_path(leaf, params)

    def taken(index: int) -> Params:
        return jax.tree.map(lambda found: found[index], turned["layers"], is_leaf=lambda x: isinstance(x, list))

    return {**turned, "layers": tuple(taken(index) for index in range(cfg.layers))}


@functools.partial(jax.jit, static_argnames=("turn", "dtype"))
def _taken(stack: Array, index: int | Int[Array, ""], turn: bool, dtype) -> Array:
    x = jax.lax.dynamic_index_in_dim(stack, index, keepdims=False)
    return (jnp.swapaxes(x, -1, -2) if turn else x).astype(dtype)


def layer(params: Params, cfg: DecoderConfig, index: int) -> Layer:
    """One layer, ready to call."""
    if isinstance(params["layers"], tuple):
        return bind(UnstackedLayer, cfg, params["layers"][index])
    return bind(Layer, cfg, jax.tree.map(lambda x: x[index], params["layers"]))


def init_cache(cfg: DecoderConfig, rows: int, capacity: int, dtype=jnp.float32, layers: int | None = None) -> Cache:
    """An empty cache for ``rows`` rows of at most ``capacity`` tokens, for that many layers (all by default)."""
    shape = (rows, cfg.kv_heads, capacity, cfg.head_dim)
    count = cfg.layers if layers is None else layers
    return Cache(
        k=tuple(jnp.zeros(shape, dtype) for _ in range(count)),
        v=tuple(jnp.zeros(shape, dtype) for _ in range(count)),
        live=jnp.zeros((rows, capacity), bool),
        length=jnp.zeros(rows, jnp.int32),
    )


def append(cache: Array, new: Array, at: Int[Array, " B"] | None, axis: int = 1) -> Array:
    """new [B, Q, ...] written into cache, whose positions are on ``axis``, in each row from its own position ``at``, or
    from the start for None. In place: a scatter would copy the cache on CPUs, slices would be a kernel a row on GPUs.
    """
    new = new.astype(cache.dtype)
    rows = jnp.arange(cache.shape[0])[:, None]
    turned = jnp.moveaxis(new, 1, axis)
    if at is None or len(cache) == 1:
        return jax.lax.dynamic_update_slice_in_dim(cache, turned, 0 if at is None else at[0], axis)

    def slices(cache):
        def write(row, cache):  # in a loop: the compiler would fuse readers with unrolled writes, and copy the cache
            start = [row] + [0] * (cache.ndim - 1)
            start[axis] = at[row]
            return jax.lax.dynamic_update_slice(cache, jax.lax.dynamic_slice_in_dim(turned, row, 1), start)

        return jax.lax.fori_loop(0, len(cache), write, cache)

    def scatter(cache):
        place = (rows, *[slice(None)] * (axis - 1), at[:, None] + jnp.arange(new.shape[1]))
        return cache.at[place].set(new, mode="drop")

    return jax.lax.platform_dependent(cache, cpu=slices if new.shape[1] == 1 else scatter, default=scatter)


def forward(
    params: Params,
    cfg: DecoderConfig,
    hidden: Float[Array, "B Q d"],
    layout: Layout,
    *,
    layers: tuple[int, int] | None = None,
    cache: Cache | None = None,
    fresh: bool = False,
    read: int | None = None,
    remat: str = "none",
) -> tuple[Float[Array, "B Q d"], Cache | None]:
    """Hidden state ``layers[0]`` -> hidden state ``layers[1]`` (all layers by default), without the final norm.

    layout: rotary positions and segments of the Q tokens. With a cache of this slice of layers, the tokens are appended
    to it and attend to what it holds; it must have the capacity, and the next call overwrites padding at the end of
    the Q. fresh: the cache is empty, so the tokens attend to each other alone. read: positions of the cache that are
    read, at least those that are used after this call in rows whose result matters; by default all. remat: what the
    backward pass recomputes, without a cache. Returns (hidden, the cache or None)."""
    first, last = layers or (0, cfg.layers)
    with jax.named_scope(f"decoder_layers_{first}_{last}"):
        if cache is None:
            return _forward_rows(params, cfg, hidden, layout, range(first, last), remat), None
        return _forward_cached(params, cfg, hidden, layout, range(first, last), cache, fresh, read)


def _forward_rows(
    params: Params, cfg: DecoderConfig, hidden: Float[Array, "B S d"], layout: Layout, layers: range, remat: str
) -> Float[Array, "B S d"]:
    """Whole rows through these layers: a scan over stacked layers, a loop over unstacked ones."""
    rotary = rotary_angles(layout.positions, cfg)
    mask = causal(layout.segments)
    if layout.branches is not None:
        own = layout.branches[:, :, None]
        keys = layout.branches[:, None, :]
        mask = AttentionMask(mask.allowed & ((keys == 0) | (keys == own))[:, None])
    if isinstance(params["layers"], tuple):
        for index in layers:
            hidden = layer(params, cfg, index)(hidden, rotary, mask)
        return hidden

    def body(x, weights):
        return by_rows(bind(Layer, cfg, weights)(by_rows(x), rotary, mask)), None

    stack = jax.tree.map(lambda x: x[layers.start : layers.stop], params["layers"])
    return jax.lax.scan(REMAT[remat](body), hidden, stack)[0]


def _forward_cached(
    params: Params,
    cfg: DecoderConfig,
    hidden: Float[Array, "B Q d"],
    layout: Layout,
    layers: range,
    cache: Cache,
    fresh: bool,
    read: int | None,
) -> tuple[Float[Array, "B Q d"], Cache]:
    """The next tokens of each row through these layers: prefill (``fresh``), or continue what the cache holds."""
    if layout.branches is not None:
        raise ValueError(
            "a layout with branches is for whole rows without a cache: a cache holds one continuous text per row"
        )
    rotary = rotary_angles(layout.positions, cfg)
    start = cache.length
    count = hidden.shape[1]
    new = layout.segments > 0
    at = None if fresh else start
    live = append(cache.live, new, at)
    if fresh:
        mask = causal(new.astype(jnp.int32))
    else:
        seen = live[:, :read]
        before = jnp.arange(seen.shape[1]) <= start[:, None, None] + jnp.arange(count)[:, None]
        mask = AttentionMask((seen[:, None] & before)[:, None])
    keys, values = list(cache.k), list(cache.v)
    for place, index in enumerate(layers):
        block = layer(params, cfg, index)
        q, k, v = block.heads(hidden, rotary)
        keys[place] = append(keys[place], k, at, axis=2)
        values[place] = append(values[place], v, at, axis=2)
        if not fresh:
            k, v = (jnp.swapaxes(x[place][:, :, :read], 1, 2) for x in (keys, values))
        hidden = block.feed(block.attend(hidden, q, k, v, mask))
    used = jnp.where(new.any(1), count - jnp.argmax(new[:, ::-1], axis=1), 0).astype(jnp.int32)
    return hidden, Cache(tuple(keys), tuple(values), live, start + used)


def attention_row(
    params: Params,
    cfg: DecoderConfig,
    hidden: Float[Array, "B S d"],
    layout: Layout,
    index: int,
    position: Int[Array, " B"],
) -> Float[Array, "B S"]:
    """Attention of one token per row in one layer, averaged over the heads.

    hidden: that layer's input. position: the token's row position."""
    block = layer(params, cfg, index)
    rotary = rotary_angles(layout.positions, cfg)
    y = block.attention_norm(hidden)

    def at(x: Shaped[Array, "B S ..."]) -> Shaped[Array, "B 1 ..."]:
        return jnp.take_along_axis(x, position.reshape(-1, *[1] * (x.ndim - 1)), axis=1)

    q = rotate(split_heads(block.q(at(y)), cfg.head_dim), jax.tree.map(at, rotary))
    k = rotate(split_heads(block.k(y), cfg.head_dim), rotary)
    q = rearrange(q, "b 1 (g r) d -> b g r d", g=cfg.kv_heads)
    scores = jnp.einsum("bgrd,bsgd->bgrs", q, k, preferred_element_type=jnp.float32) * cfg.head_dim**-0.5
    before = jnp.arange(layout.segments.shape[1]) <= position[:, None]
    mask = (before & (layout.segments == at(layout.segments)))[:, None, None]
    return jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1).mean((1, 2))


def finish(params: Params, cfg: DecoderConfig, hidden: Float[Array, "... d"]) -> Float[Array, "... d"]:
    """The final norm."""
    return bind(Head, cfg, params["head"]).norm(hidden)


def output_matrix(params: Params, cfg: DecoderConfig) -> Float[Array, "d vocab"]:
    """That of the logits, of a decoder in either form."""
    turned = cfg.tied_head or isinstance(params["layers"], tuple)
    matrix = params["embed"]["embedding"] if cfg.tied_head else params["head"]["out"]["kernel"]
    return matrix.T if turned else matrix


def logits(params: Params, cfg: DecoderConfig, normed: Float[Array, "... d"]) -> Float[Array, "... vocab"]:
    """Float32 logits of hidden states that ``finish`` has normed."""
    matrix = output_matrix(params, cfg)
    with jax.named_scope("logits"):
        if isinstance(params["layers"], tuple):
            rows = normed.reshape(-1, normed.shape[-1])
            return output_major(matrix.T, rows, jnp.float32).reshape(*normed.shape[:-1], -1)
        return jnp.matmul(normed, matrix.astype(normed.dtype), preferred_element_type=jnp.float32)

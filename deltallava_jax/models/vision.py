"""Vision towers of the CLIP and SigLIP architectures, applied up to the last layer that a projector needs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Float, Int, UInt8

from deltallava_jax.arrays import Array
from deltallava_jax.config import VisionConfig
from deltallava_jax.errors import ConfigError
from deltallava_jax.kernels.attention import attention
from deltallava_jax.models.layers import (
    REMAT,
    LayerNorm,
    Linear,
    Params,
    bind,
    by_rows,
    init,
    init_stack,
    masked_attention,
    normal,
    quick_gelu,
    sincos_table,
)
from deltallava_jax.products import plus


@dataclass(frozen=True)
class Needs:
    """What a system needs from the tower. Hidden-state index i is the output of layer i; 0 is the embedding.

    cls_attention: (layer, "head_mean" | "one_head"): attention of the CLS token to the patches in layer ``layer``
    (1-based), averaged over the heads, or as one head over the full width with scale width**-0.5 (PruMerge).
    keys: layer whose keys, before the head split, are returned.
    pruned: layers, by index from 0, that the system applies itself and that drop patches (see Prune)."""

    last: int
    levels: tuple[int, ...] = ()
    cls_attention: tuple[int, str] | None = None
    keys: int | None = None
    pruned: tuple[int, ...] = ()


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class VisionFeatures:
    """Features of n images; patches in row-major order over ``grid``, the CLS token left out.

    last: [n, N, C]; levels: [n, N, L * C], several layers concatenated on channels, or None;
    cls_attention: [n, N] or None; keys: [n, N, C] or None.
    A pruned tower returns the N patches that are left, with
    places: [n, N], the index of each patch in the grid, grid^2 for a fused token; None without pruning;
    kept: [n, N], in training, 1 for a patch that is kept and 0 for one that is masked out; else None;
    penalty: a term of the loss."""

    last: Float[Array, "n N C"]
    levels: Float[Array, "n N LC"] | None = None
    cls_attention: Float[Array, "n N"] | None = None
    keys: Float[Array, "n N C"] | None = None
    places: Int[Array, "n N"] | None = None
    kept: Float[Array, "n N"] | None = None
    penalty: Float[Array, ""] | float = 0.0
    grid: tuple[int, int] = field(default=(24, 24), metadata={"static": True})


class Embeddings(nnx.Module):
    def __init__(self, cfg: VisionConfig, *, rngs: nnx.Rngs):
        clip = cfg.family == "clip"
        pixels = cfg.patch_size**2 * 3
        # A fresh tower starts with a 2-D sine-cosine table, in which neighbours are similar.
        table = jnp.asarray(sincos_table(cfg.grid, cfg.width))
        self.patch = Linear(pixels, cfg.width, bias=not clip, kernel_init=normal(pixels**-0.5), rngs=rngs)
        self.cls = nnx.Param(normal(cfg.width**-0.5)(rngs.params(), (cfg.width,))) if clip else None
        self.position = nnx.Param(jnp.pad(table, ((int(clip), 0), (0, 0))))
        self.pre_norm = LayerNorm(cfg.width, eps=cfg.norm_eps) if clip else None
        self.patch_size = cfg.patch_size
        self.grid = cfg.grid

    def __call__(self, pixels: Float[Array, "n H W 3"]) -> Float[Array, "n N C"]:
        side = self.grid * self.patch_size
        patches = rearrange(
            pixels[:, :side, :side],
            "n (h p) (w q) c -> n (h w) (p q c)",
            p=self.patch_size,
            q=self.patch_size,
        )
        x = self.patch(patches)
        if self.cls is not None:
            cls = jnp.broadcast_to(self.cls[...], (x.shape[0], 1, x.shape[2])).astype(x.dtype)
            x = jnp.concatenate([cls, x], axis=1)
        x = plus(x, self.position[...])
        return x if self.pre_norm is None else self.pre_norm(x)


class Layer(nnx.Module):
    def __init__(self, cfg: VisionConfig, *, rngs: nnx.Rngs):

        def make(inputs: int, outputs: int, std: float) -> Linear:
            return Linear(inputs, outputs, kernel_init=normal(std), rngs=rngs)

        width = cfg.width
        depth = (2 * cfg.layers) ** -0.5
        self.attention_norm = LayerNorm(width, eps=cfg.norm_eps)
        self.q = make(width, width, width**-0.5)
        self.k = make(width, width, width**-0.5)
        self.v = make(width, width, width**-0.5)
        self.o = make(width, width, width**-0.5 * depth)
        self.mlp_norm = LayerNorm(width, eps=cfg.norm_eps)
        self.up = make(width, cfg.mlp_width, (2 * width) ** -0.5)
        self.down = make(cfg.mlp_width, width, width**-0.5 * depth)
        self.heads = cfg.heads
        self.activation = quick_gelu if cfg.family == "clip" else jax.nn.gelu  # SigLIP: the tanh form

    def __call__(self, x: Float[Array, "n N C"], kept: Float[Array, "n P"] | None = None) -> Float[Array, "n N C"]:
        return self.feed(self.attend(x, kept))

    def attend(self, x: Float[Array, "n N C"], kept: Float[Array, "n P"] | None = None) -> Float[Array, "n N C"]:
        """The attention half, with its residual. kept: the weight of each patch as a key."""
        with jax.named_scope("attention"):
            y = self.attention_norm(x)
            split = lambda t: rearrange(t, "n t (h d) -> n t h d", h=self.heads)
            heads = split(self.q(y)), split(self.k(y)), split(self.v(y))
            if kept is None:
                y = attention(*heads)
            else:
                y = masked_attention(*heads, jnp.pad(kept, ((0, 0), (1, 0)), constant_values=1.0))
            return x + self.o(rearrange(y, "n t h d -> n t (h d)"))

    def feed(self, x: Float[Array, "n N C"]) -> Float[Array, "n N C"]:
        """The MLP half, with its residual."""
        with jax.named_scope("mlp"):
            return x + self.down(self.activation(self.up(self.mlp_norm(x))))

    def keys(self, x: Float[Array, "n N C"]) -> Float[Array, "n N C"]:
        return self.k(self.attention_norm(x))

    def cls_attention(self, x: Float[Array, "n N C"], how: str) -> Float[Array, "n P"]:
        """The CLS row of this layer's attention, CLS column dropped after the softmax."""
        heads = {"head_mean": self.heads, "one_head": 1}[how]
        y = self.attention_norm(x)
        q = rearrange(self.q(y[:, 0]), "n (h d) -> n h d", h=heads)
        k = rearrange(self.k(y), "n t (h d) -> n t h d", h=heads)
        scores = jnp.einsum("nhd,nthd->nht", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
        return jax.nn.softmax(scores, axis=-1).mean(1)[:, 1:]


class FinalNorm(nnx.Module):
    """CLIP's post-LayerNorm applies to the pooled CLS alone, kept for exports; SigLIP's follows the last layer."""

    def __init__(self, cfg: VisionConfig, *, rngs: nnx.Rngs):
        self.norm = LayerNorm(cfg.width, eps=cfg.norm_eps)

    def __call__(self, x):
        return self.norm(x)


def init_params(cfg: VisionConfig, key: Array) -> Params:
    """{"embeddings", "layers" (stacked on axis 0), "final"}, float32."""
    keys = jax.random.split(key, 3)
    return {
        "embeddings": init(Embeddings, cfg, keys[0]),
        "layers": init_stack(Layer, cfg, keys[1], cfg.layers),
        "final": init(FinalNorm, cfg, keys[2]),
    }


def normalize(images: UInt8[Array, "n H W 3"], cfg: VisionConfig) -> Float[Array, "n H W 3"]:
    """uint8 pixels -> float32, rescaled by 1/255, the tower's mean and standard deviation."""
    pixels = images.astype(jnp.float32) / 255.0
    return (pixels - jnp.asarray(cfg.image_mean)) / jnp.asarray(cfg.image_std)


def embed(params: Params, cfg: VisionConfig, pixels: Float[Array, "n H W 3"]) -> Float[Array, "n N C"]:
    """Hidden state 0: patches (and CLS) with positions, in the dtype of ``pixels``."""
    with jax.named_scope("tower_embed"):
        return bind(Embeddings, cfg, params["embeddings"])(pixels)


def forward(
    params: Params,
    cfg: VisionConfig,
    hidden: Float[Array, "n N C"],
    layers: tuple[int, int],
    remat: str = "none",
    kept: Float[Array, "n P"] | None = None,
) -> Float[Array, "n N C"]:
    """Hidden state ``layers[0]`` -> hidden state ``layers[1]``, scanned. kept: the weight of each patch as a key."""
    first, last = layers
    stack = jax.tree.map(lambda x: x[first:last], params["layers"])
    body = REMAT[remat](lambda x, layer: (by_rows(bind(Layer, cfg, layer)(by_rows(x), kept)), None))
    with jax.named_scope(f"tower_layers_{first}_{last}"):
        return jax.lax.scan(body, hidden, stack)[0]


class PruningStep(NamedTuple):
    """The result of a layer that a system applies itself.

    stay: indices of the patches that stay among those before, their number for a fused token; None: all stay.
    kept: the weight of each patch as a key in the later layers, in training, where patches are masked, not dropped.
    penalty: a term of the loss."""

    stay: Int[Array, "n P"] | None = None
    kept: Float[Array, "n P"] | None = None
    penalty: Float[Array, ""] | float = 0.0


# (number of the pruning step, layer, its input [n, 1 + N, C], ``kept`` so far, None before the first step)
# -> (its output, CLS and the patches that are left, PruningStep)
Prune = Callable[[int, Layer, Array, Array | None], tuple[Array, PruningStep]]


def check_needs(cfg: VisionConfig, needs: Needs) -> None:
    """ConfigError where a tower of this family lacks what is needed."""
    if (needs.cls_attention or needs.pruned) and cfg.family != "clip":
        raise ConfigError(f"the projector needs the CLS token's attention; a {cfg.family} tower has no CLS token")


def encode(
    params: Params,
    cfg: VisionConfig,
    images: UInt8[Array, "n H W 3"] | Float[Array, "n H W 3"],
    needs: Needs,
    *,
    prune: Prune | None = None,
    dtype=jnp.float32,
    remat: str = "none",
) -> VisionFeatures:
    """The features that ``needs`` names, from the tower up to the last layer needed.

    images: uint8 pixels, or floats already normalised. prune: applies the layers ``needs.pruned``."""
    check_needs(cfg, needs)
    pixels = normalize(images, cfg) if images.dtype == jnp.uint8 else images
    hidden = by_rows(embed(params, cfg, by_rows(pixels.astype(dtype))))
    skip = 1 if cfg.family == "clip" else 0
    wanted = {needs.last, *needs.levels}
    if needs.cls_attention is not None:
        wanted.add(needs.cls_attention[0] - 1)  # a layer's attention and keys come from its input
    if needs.keys is not None:
        wanted.add(needs.keys - 1)
    states = {}
    at = 0
    kept = places = None
    penalty = 0.0
    if needs.pruned:
        places = jnp.broadcast_to(jnp.arange(cfg.grid**2), (hidden.shape[0], cfg.grid**2))
    layer = lambda index: bind(Layer, cfg, jax.tree.map(lambda x: x[index - 1], params["layers"]))
    for stop in sorted(wanted | set(needs.pruned)):
        if stop > at:
            hidden = forward(params, cfg, hidden, (at, stop), remat, kept)
            at = stop
        if stop in wanted:
            states[stop] = hidden
        if stop in needs.pruned:
            with jax.named_scope(f"tower_pruned_{stop}"):
                body = REMAT[remat](functools.partial(prune, needs.pruned.index(stop), layer(stop + 1)))
                hidden, done = body(hidden, kept)
            at = stop + 1
            kept = done.kept
            penalty = penalty + done.penalty
            if done.stay is not None:
                with_fused = jnp.pad(places, ((0, 0), (0, 1)), constant_values=cfg.grid**2)
                places = jnp.take_along_axis(with_fused, done.stay, axis=1)
    patches = {index: state[:, skip:] for index, state in states.items()}
    cls_attention = keys = None
    if needs.cls_attention is not None:
        index, how = needs.cls_attention
        cls_attention = layer(index).cls_attention(states[index - 1], how)
    if needs.keys is not None:
        keys = layer(needs.keys).keys(states[needs.keys - 1])[:, skip:]
    return VisionFeatures(
        last=patches[needs.last],
        levels=jnp.concatenate([patches[i] for i in needs.levels], axis=-1) if needs.levels else None,
        cls_attention=cls_attention,
        keys=keys,
        places=places,
        kept=kept,
        penalty=penalty,
        grid=(cfg.grid, cfg.grid),
    )

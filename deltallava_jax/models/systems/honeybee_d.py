"""Honeybee's D-Abstractor (kakaobrain/honeybee, dabs.py): deformable attention of queries around points of a grid.

The layers refine a learned table of queries; pooled features are the queries' positions. It uses the tower's last layer
(select_layer -1), and the table has one row per token, so the weights serve one scale factor."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Float

from deltallava_jax.arrays import Array
from deltallava_jax.config.checks import require_at_least, require_positive
from deltallava_jax.kernels.attention import attention
from deltallava_jax.models.layers import LayerNorm, Linear, normal, trunc_normal, xavier_uniform
from deltallava_jax.models.names import Entry, linear, norm
from deltallava_jax.models.systems import common
from deltallava_jax.models.systems.base import OnGrid, ScaleConfig
from deltallava_jax.models.vision import VisionFeatures
from deltallava_jax.products import plus

EPS = 1e-5
DEPTH, POINTS = 6, 4


@dataclass(frozen=True)
class HoneybeeDConfig(ScaleConfig):
    name: str = "honeybee_d"
    select_layer: int = -1  # the tower's hidden state, from the end: -1 is the last
    depth: int = 0  # layers; 0: as published, 6
    head_dim: int = 128  # width of a head
    mlp_width: int = 1024  # hidden width of a layer's MLP
    initializer_range: float = 0.02  # standard deviation of fresh Linear weights; small widths want more

    def __post_init__(self):
        super().__post_init__()
        self.require_one_scale()
        require_at_least(1, "projector", self, "head_dim", "mlp_width")
        require_at_least(0, "projector", self, "depth")
        require_positive("projector", self, "initializer_range")


class DeformableLayer(nnx.Module):
    """A layer of Deformable DETR's decoder, post-norm: self-attention, sampling from the image, ReLU MLP."""

    def __init__(self, cfg: HoneybeeDConfig, *, rngs: nnx.Rngs):
        width = cfg.in_width
        make = lambda a, b, init=xavier_uniform, bias=None: Linear(a, b, kernel_init=init, bias_init=bias, rngs=rngs)
        self.q, self.k, self.v, self.o = (make(width, width) for _ in range(4))
        self.heads, self.head_dim = width // cfg.head_dim, cfg.head_dim
        zeros = jax.nn.initializers.zeros
        self.offsets = make(width, self.heads * POINTS * 2, zeros, _directions)
        self.weights = make(width, self.heads * POINTS, zeros)
        self.value, self.sampled = make(width, width), make(width, width)
        small = trunc_normal(cfg.initializer_range)
        self.up, self.down = make(width, cfg.mlp_width, small), make(cfg.mlp_width, width, small)
        self.norm1, self.norm2, self.norm3 = (LayerNorm(width, eps=EPS) for _ in range(3))

    def __call__(self, x, positions, image, points):
        """x, positions [n, V, E]; image [n, g, g, E]; points [V, 2] as (x, y) in 0..1."""
        split = lambda t: rearrange(t, "n t (h d) -> n t h d", d=self.head_dim)
        y = x + positions
        y = attention(split(self.q(y)), split(self.k(y)), split(self.v(x)))
        x = self.norm1(x + self.o(rearrange(y, "n t h d -> n t (h d)")))
        x = self.norm2(x + self._sample(x + positions, image, points))
        return self.norm3(x + self.down(jax.nn.relu(self.up(x))))

    def _sample(self, q, image, points):
        """Bilinear samples of the image around each query's point, weighted; what lies outside counts as zero."""
        grid = image.shape[1]
        values = rearrange(self.value(image), "n y x (h d) -> n (y x) h d", d=self.head_dim)
        offsets = rearrange(self.offsets(q), "n t (h p c) -> n t p h c", h=self.heads, c=2).astype(jnp.float32)
        weights = rearrange(self.weights(q), "n t (h p) -> n t p h", h=self.heads).astype(jnp.float32)
        weights = jax.nn.softmax(weights, axis=2)
        places = points[:, None, None] * grid + offsets - 0.5  # in cells, (x, y); an offset of 1 is one cell
        corner = jnp.floor(places)
        total = 0.0
        for dx in (0, 1):
            for dy in (0, 1):
                x, y = corner[..., 0] + dx, corner[..., 1] + dy
                inside = (x >= 0) & (x < grid) & (y >= 0) & (y < grid)
                share = (1 - jnp.abs(places[..., 0] - x)) * (1 - jnp.abs(places[..., 1] - y)) * inside * weights
                index = jnp.clip(y, 0, grid - 1) * grid + jnp.clip(x, 0, grid - 1)
                index = rearrange(index.astype(jnp.int32), "n t p h -> n (t p) h 1")
                found = rearrange(jnp.take_along_axis(values, index, axis=1), "n (t p) h d -> n t p h d", p=POINTS)
                total = total + jnp.einsum("ntph,ntphd->nthd", share.astype(found.dtype), found)
        return self.sampled(rearrange(total, "n t h d -> n t (h d)"))


def _directions(key, shape) -> Array:
    """Initial offsets: each head has its own direction, its points 1, 2, ... cells away."""
    heads = shape[0] // (2 * POINTS)
    angles = 2 * np.pi * np.arange(heads) / heads
    ray = np.stack([np.cos(angles), np.sin(angles)], axis=-1)
    ray /= np.abs(ray).max(-1, keepdims=True)
    return jnp.asarray(ray[:, None] * np.arange(1, POINTS + 1)[:, None], jnp.float32).reshape(shape)


class HoneybeeD(OnGrid):
    Config = HoneybeeDConfig
    torch_code = "projector_honeybee_d.py"
    prefix = "abstractor."

    def __init__(self, cfg: HoneybeeDConfig, *, rngs: nnx.Rngs):
        side = cfg.grid // cfg.scale_factors[0]
        init = normal(cfg.initializer_range)
        self.position = nnx.Param(init(rngs.params(), (1, cfg.grid**2, cfg.in_width)))
        self.queries = nnx.Param(init(rngs.params(), (side * side, cfg.in_width)))
        self.points = nnx.Param(jnp.asarray(reference_points(side, cfg.grid))[None])  # fixed: it gets no gradient
        for layer in range(cfg.depth or DEPTH):
            setattr(self, f"layer{layer}", DeformableLayer(cfg, rngs=rngs))
        self.out = Linear(cfg.in_width, cfg.out_width, kernel_init=trunc_normal(cfg.initializer_range), rngs=rngs)
        self.cfg = cfg

    def __call__(self, features: VisionFeatures, text, budget: int, key: Array | None) -> Float[Array, "n V d"]:
        image = plus(features.last, self.position[...])
        image = common.as_grid(image, self.cfg.grid)
        positions = common.pool_grid(image, round(budget**0.5)).reshape(image.shape[0], budget, -1)
        points = jax.lax.stop_gradient(self.points[...])[0]
        x = jnp.broadcast_to(self.queries[...], positions.shape).astype(image.dtype)
        for layer in range(self.cfg.depth or DEPTH):
            x = getattr(self, f"layer{layer}")(x, positions, image, points)
        return self.out(x)

    @staticmethod
    def name_table(cfg: HoneybeeDConfig) -> list[Entry]:
        table = [
            Entry("v_pos_emb", "position"),
            Entry("query_position_embeddings.weight", "queries"),
            Entry("reference_points", "points"),
        ]
        for layer in range(cfg.depth or DEPTH):
            torch, path = f"layers.{layer}", f"layer{layer}"
            for theirs, ours in (("q_proj", "q"), ("k_proj", "k"), ("v_proj", "v"), ("out_proj", "o")):
                table += linear(f"{torch}.self_attn.{theirs}", f"{path}/{ours}")
            inner = ("sampling_offsets", "offsets"), ("attention_weights", "weights"), ("value_proj", "value")
            for theirs, ours in (*inner, ("output_proj", "sampled")):
                table += linear(f"{torch}.encoder_attn.{theirs}", f"{path}/{ours}")
            table += linear(f"{torch}.fc1", f"{path}/up") + linear(f"{torch}.fc2", f"{path}/down")
            norms = "self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"
            for number, name in enumerate(norms, 1):
                table += norm(f"{torch}.{name}", f"{path}/norm{number}")
        return table + linear("output_proj", "out")

    @staticmethod
    def infer(shapes: dict[str, tuple[int, ...]]) -> dict | None:
        if "v_pos_emb" not in shapes:
            return None
        tokens, width = shapes["query_position_embeddings.weight"]
        grid = round(shapes["v_pos_emb"][1] ** 0.5)
        heads = shapes["layers.0.encoder_attn.attention_weights.weight"][0] // POINTS
        depth = sum(name.endswith("fc1.weight") for name in shapes)
        return dict(
            name="honeybee_d", in_width=width, out_width=shapes["output_proj.weight"][0], grid=grid, depth=depth,
            head_dim=width // heads, mlp_width=shapes["layers.0.fc1.weight"][0], select_layer=-1,
            scale_factor=grid // round(tokens**0.5),
        )  # fmt: skip


def reference_points(side: int, grid: int) -> np.ndarray:
    """[side^2, 2]: (x, y) in 0..1, evenly from half a cell of the patch grid to half a cell before its end."""
    line = np.linspace(0.5, grid - 0.5, side, dtype=np.float32) / grid
    y, x = np.meshgrid(line, line, indexing="ij")
    return np.stack([x.reshape(-1), y.reshape(-1)], axis=-1)

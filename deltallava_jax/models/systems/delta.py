"""The Delta projector of Delta-LLaVA (WACV 2026): align with a low-rank projection, then specialise.

Two variants. "release" is the public code (mzamini92/Delta-LLaVA, multimodal_projector/builder.py), which produced
the published numbers: block, position, projection, local attention, MLP. "paper" follows the paper's equations 3 to
11: refinement, position, linear projection, block, windowed attention, residual feed-forward. No parameter's shape
depends on the scale factor s, so one set of weights serves every budget (grid / s)^2. At s = 1 the release's queries
have one key each: the output then depends on the values alone, and the query branch gets no gradient.

Where windowed attention runs in XLA, keys and values by heads are never in memory (local_attention): the paper's
variant attends to the tower's layers directly, the release's to k and v after their GELU and LayerNorm.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Float

from deltallava_jax.arrays import Array
from deltallava_jax.config.checks import require, require_at_least
from deltallava_jax.kernels.attention import attention
from deltallava_jax.kernels.windowed_attention import local_attention
from deltallava_jax.models.layers import (
    LayerNorm,
    Linear,
    drop_path,
    gelu,
    resize_grid,
    sincos_table,
    torch_default,
    trunc_normal,
    xavier_uniform,
)
from deltallava_jax.models.names import Entry, linear, norm
from deltallava_jax.models.systems import common
from deltallava_jax.models.systems.base import LevelsConfig, MultiLevel
from deltallava_jax.models.vision import VisionFeatures
from deltallava_jax.products import contract, matmul

BLOCK_EPS = 1e-5


ABLATIONS = ("none", "no_emhsa", "no_delta", "no_tb")


@dataclass(frozen=True)
class DeltaConfig(LevelsConfig):
    name: str = "delta"
    block_head_dim: int = 32  # width of a head and of a convolution's group in the block
    rank: int = 16  # of the low-rank update of each projection
    mix_ratio: float = 0.75  # share of the block's channels that attend; the rest is convolved
    drop_path: float = 0.1  # the rate of stochastic depth in the block, at most
    reduction: int = 1  # EMHSA's spatial reduction sr
    window: int = 1  # paper variant: query windows of window x window
    mlp_width: int = 4096  # paper variant: hidden width of equation 11
    variant: str = "release"  # the public code, or "paper": its equations
    ablation: str = "none"  # the part that is left out: no_emhsa, no_delta, no_tb

    def __post_init__(self):
        super().__post_init__()
        require_at_least(1, "projector", self, "rank", "mlp_width", "block_head_dim", "window", "reduction")
        require(0 <= self.drop_path < 1, f"projector.drop_path={self.drop_path}; expected 0 to below 1")
        require(0 < self.mix_ratio < 1, f"projector.mix_ratio={self.mix_ratio}; expected between 0 and 1")
        for name, known in (("variant", ("release", "paper")), ("ablation", ABLATIONS)):
            value = getattr(self, name)
            require(value in known, f"projector.{name} is {value!r}; known: {', '.join(known)}")
        self._check_widths()
        for side in (self.grid // s for s in self.scale_factors):
            require(
                side % self.window == 0, f"projector.window={self.window} does not divide the {side}x{side} query grid"
            )
            require(
                self.reduction <= side,
                f"projector.reduction={self.reduction} leaves no keys of a {side}x{side} query grid",
            )

    def _check_widths(self):
        heads = self.block_head_dim
        for width in (self.width, self.in_width):
            require(
                width % heads == 0, f"projector.block_head_dim={heads} does not divide the projector's width {width}"
            )
        require(
            self.width >= 2 * heads,
            f"projector.block_head_dim={heads}; the block's two branches need two heads in width {self.width}",
        )
        require(self.in_width % 4 == 0, f"projector.in_width={self.in_width}; the position table needs a multiple of 4")
        require(
            self.variant == "paper" or self.width == self.in_width,
            f"projector.embed_width={self.embed_width}; the release variant keeps in_width={self.in_width}",
        )


class DeltaProjection(nnx.Module):
    """x (W_s + U V): a shared base and a rank-r update; the release adds GELU and LayerNorm."""

    def __init__(self, in_width: int, cfg: DeltaConfig, *, rngs: nnx.Rngs):
        low_rank = cfg.ablation != "no_delta"
        self.base = nnx.Param(trunc_normal(cfg.initializer_range)(rngs.params(), (in_width, cfg.width)))
        self.U = nnx.Param(xavier_uniform(rngs.params(), (in_width, cfg.rank))) if low_rank else None
        self.V = nnx.Param(xavier_uniform(rngs.params(), (cfg.rank, cfg.width))) if low_rank else None
        self.norm = LayerNorm(cfg.width, eps=common.EPS) if cfg.variant == "release" else None

    @property
    def matrix(self) -> Float[Array, "C E"]:
        """W_s + U V. One product with the patches costs less than a product with W_s and narrow ones with U and V."""
        return self.base[...] if self.U is None else self.base[...] + self.U[...] @ self.V[...]

    def __call__(self, x: Float[Array, "... C"]) -> Float[Array, "... E"]:
        y = matmul(x, self.matrix)
        return y if self.norm is None else self.norm(gelu(y))


class SelfAttention(nnx.Module):
    """EMHSA: LayerNorm, then self-attention over all tokens, keys and values pooled for reduction > 1."""

    def __init__(self, width: int, cfg: DeltaConfig, *, rngs: nnx.Rngs):
        self.norm = LayerNorm(width, eps=BLOCK_EPS)
        init = trunc_normal(cfg.initializer_range)
        self.q, self.k, self.v, self.o = (Linear(width, width, kernel_init=init, rngs=rngs) for _ in range(4))
        self.head_dim, self.reduction = cfg.block_head_dim, cfg.reduction

    def __call__(self, x: Float[Array, "n g g C"]) -> Float[Array, "n g g C"]:
        side = x.shape[1]
        y = self.norm(rearrange(x, "n h w c -> n (h w) c"))
        pooled = y
        if self.reduction > 1:  # an average over reduction^2 consecutive tokens, a remainder dropped
            count = self.reduction**2
            pooled = y[:, : y.shape[1] // count * count]
            pooled = rearrange(pooled, "n (t r) c -> n t r c", r=count).mean(2)
        split = lambda t: rearrange(t, "n t (h d) -> n t h d", d=self.head_dim)
        y = attention(split(self.q(y)), split(self.k(pooled)), split(self.v(pooled)))
        return rearrange(self.o(rearrange(y, "n t h d -> n t (h d)")), "n (h w) c -> n h w c", h=side)


class ConvAttention(nnx.Module):
    """MHCA: grouped 3x3 convolution, LayerNorm, ReLU, 1x1 convolution; no biases.

    Release: groups of block_head_dim channels; paper: depthwise."""

    def __init__(self, width: int, cfg: DeltaConfig, *, rngs: nnx.Rngs):
        group = cfg.block_head_dim if cfg.variant == "release" else 1
        self.kernel = nnx.Param(torch_default(9 * group)(rngs.params(), (3, 3, group, width)))
        self.norm = LayerNorm(width, eps=BLOCK_EPS)
        self.projection = Linear(width, width, bias=False, kernel_init=torch_default(width), rngs=rngs)

    def __call__(self, x: Float[Array, "n g g C"]) -> Float[Array, "n g g C"]:
        y = grouped_convolution(x, self.kernel[...])
        return self.projection(jax.nn.relu(self.norm(y)))


def grouped_convolution(x: Float[Array, "n h w C"], kernel: Float[Array, "3 3 i C"]) -> Float[Array, "n h w C"]:
    """A 3x3 convolution over groups of i channels, zeros around the grid: one matrix product per group over the
    nine shifted copies. XLA's grouped convolution is far slower on CPUs (benchmarks/measure/projector_parts.py)."""
    (n, h, w, width), group = x.shape, kernel.shape[2]
    kernel = rearrange(kernel, "p q i (g o) -> g (p q i) o", g=width // group)
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    shifted = jnp.stack([padded[:, p : p + h, q : q + w] for p in range(3) for q in range(3)])
    patches = rearrange(shifted, "t n h w (g i) -> n h w g (t i)", i=group)
    return contract("nhwgi,gio->nhwgo", patches, kernel).reshape(n, h, w, width)


class Block(nnx.Module):
    """NTB: EMHSA on a share of the channels, MHCA on the rest, an MLP over both (Next-ViT's block)."""

    def __init__(self, cfg: DeltaConfig, *, rngs: nnx.Rngs):
        conv = lambda a, b, bias=False: Linear(
            a, b, bias=bias, kernel_init=torch_default(a), bias_init=torch_default(a), rngs=rngs
        )
        attended, convolved = split_channels(cfg)
        emhsa = cfg.ablation != "no_emhsa"
        self.reduce = conv(cfg.width, attended)
        # The release norms twice in a row: here and inside EMHSA.
        release = cfg.variant == "release"
        self.attention_norm = LayerNorm(attended, eps=BLOCK_EPS) if emhsa and release else None
        self.attention = SelfAttention(attended, cfg, rngs=rngs) if emhsa else None
        self.branch = conv(attended, convolved)
        self.convolution = ConvAttention(convolved, cfg, rngs=rngs)
        self.up = conv(cfg.width, 2 * cfg.width, bias=True)
        self.down = conv(2 * cfg.width, cfg.width, bias=True)
        rate = cfg.drop_path
        self.rates = (rate * cfg.mix_ratio, rate * (1 - cfg.mix_ratio), rate)

    def __call__(self, x: Float[Array, "n g g C"], key: Array | None) -> Float[Array, "n g g C"]:
        keys = (None,) * 3 if key is None else jax.random.split(key, 3)
        x = self.reduce(x)
        if self.attention is not None:
            with jax.named_scope("emhsa"):
                y = x if self.attention_norm is None else self.attention_norm(x)
                x = x + drop_path(self.attention(y), self.rates[0], keys[0])
        with jax.named_scope("mhca"):
            y = self.branch(x)
            y = y + drop_path(self.convolution(y), self.rates[1], keys[1])
        with jax.named_scope("mlp"):
            x = jnp.concatenate([x, y], axis=-1)
            return x + drop_path(self.down(jax.nn.relu(self.up(x))), self.rates[2], keys[2])


class Refine(nnx.Module):
    """The paper's refinement of the queries (section 4.1): MHCA, then EMHSA, both residual."""

    def __init__(self, cfg: DeltaConfig, *, rngs: nnx.Rngs):
        self.convolution = ConvAttention(cfg.in_width, cfg, rngs=rngs)
        self.attention = SelfAttention(cfg.in_width, cfg, rngs=rngs) if cfg.ablation != "no_emhsa" else None

    def __call__(self, x: Float[Array, "n g g C"]) -> Float[Array, "n g g C"]:
        x = x + self.convolution(x)
        return x if self.attention is None else x + self.attention(x)


class Delta(MultiLevel):
    Config = DeltaConfig
    torch_code = "projector_delta.py"

    def __init__(self, cfg: DeltaConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        levels = cfg.level_count * cfg.in_width
        self.q = DeltaProjection(cfg.in_width if cfg.variant == "paper" else cfg.width, cfg, rngs=rngs)
        self.k = DeltaProjection(levels, cfg, rngs=rngs)
        self.v = DeltaProjection(levels, cfg, rngs=rngs)
        self.block = Block(cfg, rngs=rngs) if cfg.ablation != "no_tb" else None
        make = lambda a, b: Linear(a, b, kernel_init=trunc_normal(cfg.initializer_range), rngs=rngs)
        if cfg.variant == "release":
            self.attention = common.LocalAttention(cfg.width, cfg, rngs=rngs)
            self.up, self.down = make(cfg.width, cfg.out_width), make(cfg.out_width, cfg.out_width)
        else:
            self.refine = Refine(cfg, rngs=rngs)
            self.head = make(cfg.width, cfg.out_width)
            self.norm = LayerNorm(cfg.out_width, eps=common.EPS)
            self.up, self.down = make(cfg.out_width, cfg.mlp_width), make(cfg.mlp_width, cfg.out_width)

    def __call__(self, features: VisionFeatures, text, budget: int, key: Array | None) -> Float[Array, "n V d"]:
        side = round(budget**0.5)
        with jax.named_scope("resize"):
            q = resize_grid(common.as_grid(features.last, self.cfg.grid), side, "bilinear")
        levels = common.as_grid(features.levels, self.cfg.grid)
        forward = self._release if self.cfg.variant == "release" else self._paper
        return rearrange(forward(q, levels, key), "n h w d -> n (h w) d")

    def _release(self, q, levels, key):
        with jax.named_scope("keys_values"):
            k, v = self.k(levels), self.v(levels)
        if self.block is not None:
            with jax.named_scope("block"):
                q = self.block(q, key)
        with jax.named_scope("query"):
            q = self.q(q + self._positions(q))
        with jax.named_scope("local_attention"):
            y = self.attention(q, k, v)
        with jax.named_scope("mlp"):
            return self.down(gelu(self.up(y)))

    def _paper(self, q, levels, key):
        with jax.named_scope("refine"):
            q = self.refine(q)
        with jax.named_scope("query"):
            q = self.q(q + self._positions(q))
        if self.block is not None:
            with jax.named_scope("block"):
                q = self.block(q, key)
        with jax.named_scope("windowed_attention"):
            sizes = dict(head_dim=self.cfg.head_dim, window=self.cfg.window)
            y = local_attention(q, levels, levels, self.k.matrix, self.v.matrix, **sizes)
        with jax.named_scope("mlp"):
            y = self.head(y)
            return y + self.down(gelu(self.up(self.norm(y))))

    def _positions(self, q: Float[Array, "n h w C"]) -> Float[Array, "1 h w C"]:
        """The fixed sine-cosine table of the patch grid, resized to the query grid (torch's bicubic)."""
        side, grid, width = q.shape[1], self.cfg.grid, q.shape[-1]
        table = jnp.asarray(sincos_table(grid, width).reshape(1, grid, grid, width))
        return resize_grid(table, side, "bicubic").astype(q.dtype)

    @staticmethod
    def name_table(cfg: DeltaConfig) -> list[Entry]:
        table = []
        for name in "qkv":
            table += [Entry(f"{name}_proj_1.shared_weight.weight", f"{name}/base", "linear")]
            if cfg.ablation != "no_delta":
                table += [Entry(f"{name}_proj_1.{matrix}", f"{name}/{matrix}") for matrix in "UV"]
            if cfg.variant == "release":
                table += norm(f"{name}_proj_1.norm", f"{name}/norm")
        if cfg.ablation != "no_tb":
            table += _block_names(cfg)
        if cfg.variant == "release":
            table += [
                *common.attention_names("clip_attn", "attention"),
                *linear("mlp.0", "up"),
                *linear("mlp.2", "down"),
            ]
        else:
            table += _convolution_names("refine.mhca", "refine/convolution")
            if cfg.ablation != "no_emhsa":
                table += _attention_names("refine.e_mhsa", "refine/attention")
            table += linear("head", "head") + norm("ffn.norm", "norm") + linear("ffn.0", "up") + linear("ffn.2", "down")
        return table

    @staticmethod
    def left_out(cfg: DeltaConfig) -> list[Entry]:
        return Delta.name_table(dataclasses.replace(cfg, ablation="none"))

    @staticmethod
    def infer(shapes: dict[str, tuple[int, ...]]) -> dict | None:
        if "q_proj_1.shared_weight.weight" not in shapes:
            return None
        width, in_width = shapes["q_proj_1.shared_weight.weight"]
        out = shapes["mlp.2.weight"] if "mlp.2.weight" in shapes else shapes["head.weight"]
        settings = dict(
            name="delta",
            variant="release" if "mlp.2.weight" in shapes else "paper",
            in_width=in_width,
            out_width=out[0],
            embed_width=width,
            level_count=shapes["k_proj_1.shared_weight.weight"][1] // in_width,
            ablation="none",
        )
        if "q_proj_1.U" in shapes:
            settings["rank"] = shapes["q_proj_1.U"][1]
        else:
            settings["ablation"] = "no_delta"
        block = "combined_block.ntb"
        if f"{block}.patch_embed.conv.weight" not in shapes:
            return {**settings, "ablation": "no_tb"}
        if f"{block}.e_mhsa.q.weight" not in shapes:
            settings["ablation"] = "no_emhsa"
        settings["mix_ratio"] = shapes[f"{block}.patch_embed.conv.weight"][0] / width
        if settings["variant"] == "release":
            settings["block_head_dim"] = shapes[f"{block}.mhca.group_conv3x3.weight"][1]
        else:
            settings["mlp_width"] = shapes["ffn.0.weight"][0]
        return settings


def split_channels(cfg: DeltaConfig) -> tuple[int, int]:
    """Channels of the block's attention and convolution branches: whole heads, mix_ratio to the attention."""
    heads = cfg.width // cfg.block_head_dim
    attended = min(max(1, round(heads * cfg.mix_ratio)), heads - 1) * cfg.block_head_dim
    return attended, cfg.width - attended


def _block_names(cfg: DeltaConfig) -> list[Entry]:
    ntb = "combined_block.ntb"
    table = linear(f"{ntb}.patch_embed.conv", "block/reduce", bias=False, kind="conv1x1")
    if cfg.ablation != "no_emhsa":
        table += _attention_names(f"{ntb}.e_mhsa", "block/attention")
        if cfg.variant == "release":
            table += norm(f"{ntb}.norm_mhsa", "block/attention_norm")
    table += linear(f"{ntb}.projection.conv", "block/branch", bias=False, kind="conv1x1")
    table += _convolution_names(f"{ntb}.mhca", "block/convolution")
    table += linear(f"{ntb}.mlp.conv1", "block/up", kind="conv1x1")
    return table + linear(f"{ntb}.mlp.conv2", "block/down", kind="conv1x1")


def _attention_names(torch: str, path: str) -> list[Entry]:
    pairs = (("q", "q"), ("k", "k"), ("v", "v"), ("proj", "o"))
    return norm(f"{torch}.norm", f"{path}/norm") + [
        entry for theirs, ours in pairs for entry in linear(f"{torch}.{theirs}", f"{path}/{ours}")
    ]


def _convolution_names(torch: str, path: str) -> list[Entry]:
    return [
        Entry(f"{torch}.group_conv3x3.weight", f"{path}/kernel", "conv"),
        *norm(f"{torch}.norm", f"{path}/norm"),
        *linear(f"{torch}.projection", f"{path}/projection", bias=False, kind="conv1x1"),
    ]

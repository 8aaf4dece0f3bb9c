"""Qwen-VL's resampler: learned queries cross-attend to the patches, both with positions.

closing: the LayerNorm and output matrix of Qwen-VL's visual part (transformer.visual) after it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float

from deltallava_jax.arrays import Array
from deltallava_jax.models.layers import LayerNorm, Linear, normal, sincos_table, trunc_normal
from deltallava_jax.models.names import Entry, linear, norm
from deltallava_jax.models.systems import common
from deltallava_jax.models.systems.base import QueriesConfig, System
from deltallava_jax.models.vision import VisionFeatures
from deltallava_jax.products import matmul


@dataclass(frozen=True)
class ResamplerConfig(QueriesConfig):
    name: str = "resampler"
    closing: bool = False  # with Qwen-VL's LayerNorm and output matrix after it


class Resampler(System):
    Config = ResamplerConfig
    torch_code = "projector_resampler.py"
    prefix = "transformer.visual."

    def __init__(self, cfg: ResamplerConfig, *, rngs: nnx.Rngs):
        width, init = cfg.out_width, trunc_normal(cfg.initializer_range)
        self.queries = nnx.Param(init(rngs.params(), (cfg.queries, width)))
        table = sincos_table(round(cfg.queries**0.5), width)
        self.position = nnx.Param(jnp.asarray(table))  # fixed: it gets no gradient
        self.kv = Linear(cfg.in_width, width, bias=False, kernel_init=init, rngs=rngs) if _projects(cfg) else None
        self.q_norm, self.kv_norm = LayerNorm(width, eps=common.EPS), LayerNorm(width, eps=common.EPS)
        self.attention = common.PackedAttention(width, cfg, rngs=rngs)
        self.norm = LayerNorm(width, eps=common.EPS) if cfg.closing else None
        self.out = nnx.Param(normal(width**-0.5)(rngs.params(), (width, width))) if cfg.closing else None
        self.grid = cfg.grid

    def __call__(self, features: VisionFeatures, text, budget: int, key: Array | None) -> Float[Array, "n V d"]:
        position = jax.lax.stop_gradient(self.position[...])
        x = self.kv_norm(features.last if self.kv is None else self.kv(features.last))
        q = self.q_norm(self.queries[...]) + position
        same = self.grid**2 == position.shape[0]
        k = x + (position if same else common.resize_table(position, self.grid)).astype(x.dtype)
        y = self.attention(jnp.broadcast_to(q, (x.shape[0], *q.shape)).astype(x.dtype), k, x)
        return y if self.norm is None else matmul(self.norm(y), self.out[...])

    @staticmethod
    def budgets(cfg: ResamplerConfig) -> tuple[int, ...]:
        return (cfg.queries,)

    @staticmethod
    def at(cfg: ResamplerConfig, budget: int) -> ResamplerConfig:
        return dataclasses.replace(cfg, queries=budget)

    @staticmethod
    def name_table(cfg: ResamplerConfig) -> list[Entry]:
        inner = "attn_pool." if cfg.closing else ""
        table = [Entry(f"{inner}pos_embed", "position"), Entry(f"{inner}query", "queries")]
        table += linear(f"{inner}kv_proj", "kv", bias=False) if _projects(cfg) else []
        table += common.attention_names(f"{inner}attn", "attention")
        table += norm(f"{inner}ln_q", "q_norm") + norm(f"{inner}ln_kv", "kv_norm")
        return table + (norm("ln_post", "norm") + [Entry("proj", "out")] if cfg.closing else [])

    @staticmethod
    def infer(shapes: dict[str, tuple[int, ...]]) -> dict | None:
        inner = "attn_pool." if "attn_pool.query" in shapes else ""
        if f"{inner}ln_kv.weight" not in shapes:
            return None
        queries, width = shapes[f"{inner}query"]
        in_width = shapes.get(f"{inner}kv_proj.weight", (width, width))[1]
        return dict(name="resampler", in_width=in_width, out_width=width, queries=queries, closing=bool(inner))


def _projects(cfg: ResamplerConfig) -> bool:
    return cfg.in_width != cfg.out_width

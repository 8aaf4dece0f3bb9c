"""Matryoshka Query Transformer (gordonhu608/MQT-LLaVA, multimodal_projector/builder.py).

Learned queries cross-attend to the patches; the first m of them serve for m tokens. The keys are positions alone, so
the attention does not depend on the image."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float

from deltallava_jax.arrays import Array
from deltallava_jax.config.checks import require
from deltallava_jax.models.layers import LayerNorm, normal, trunc_normal
from deltallava_jax.models.names import Entry, norm
from deltallava_jax.models.systems import common
from deltallava_jax.models.systems.base import QueriesConfig, System
from deltallava_jax.models.vision import VisionFeatures
from deltallava_jax.products import matmul

TOKENS = (256, 144, 64, 36, 16, 4, 2, 1)


@dataclass(frozen=True)
class MqtConfig(QueriesConfig):
    name: str = "mqt"
    head_dim: int = 64  # width of a head
    tokens: tuple[int, ...] = ()  # the budgets; empty: 256, 144, 64, 36, 16, 4, 2 and 1, as far as there are queries

    def __post_init__(self):
        super().__post_init__()
        require(min(self.tokens, default=1) >= 1, f"projector.tokens={self.tokens}; expected 1 or more")
        require(
            max(self.tokens, default=1) <= self.queries,
            f"projector.tokens={self.tokens}; mqt makes 1 to projector.queries={self.queries} tokens",
        )


class Mqt(System):
    Config = MqtConfig
    torch_code = "projector_mqt.py"
    prefix = "query_abstractor."

    def __init__(self, cfg: MqtConfig, *, rngs: nnx.Rngs):
        width = cfg.in_width
        self.queries = nnx.Param(trunc_normal(cfg.initializer_range)(rngs.params(), (cfg.queries, width)))
        self.position = nnx.Param(common.half_table(round(cfg.queries**0.5), width))  # fixed: it gets no gradient
        self.q_norm, self.k_norm, self.v_norm = (LayerNorm(width, eps=common.EPS) for _ in "qkv")
        self.attention = common.PackedAttention(width, cfg, rngs=rngs)
        self.out = nnx.Param(normal(cfg.out_width**-0.5)(rngs.params(), (width, cfg.out_width)))
        self.grid = cfg.grid

    def __call__(self, features: VisionFeatures, text, budget: int, key: Array | None) -> Float[Array, "n V d"]:
        x = features.last
        position = jax.lax.stop_gradient(self.position[...])
        q = self.q_norm((self.queries[...] + position)[:budget])
        k = self.k_norm(common.resize_table(position, self.grid))
        q, k = (jnp.broadcast_to(t, (x.shape[0], *t.shape)).astype(x.dtype) for t in (q, k))
        return matmul(self.attention(q, k, self.v_norm(x)), self.out[...])

    @staticmethod
    def budgets(cfg: MqtConfig) -> tuple[int, ...]:
        tokens = cfg.tokens or tuple(m for m in TOKENS if m <= cfg.queries)
        return tuple(sorted(tokens, reverse=True))

    @staticmethod
    def at(cfg: MqtConfig, budget: int) -> MqtConfig:
        return dataclasses.replace(cfg, tokens=(budget,))

    @staticmethod
    def name_table(cfg: MqtConfig) -> list[Entry]:
        table = [Entry("pos_embed", "position"), Entry("query", "queries"), Entry("proj", "out")]
        table += common.attention_names("attn", "attention")
        return table + [entry for name in "qkv" for entry in norm(f"ln_{name}", f"{name}_norm")]

    @staticmethod
    def infer(shapes: dict[str, tuple[int, ...]]) -> dict | None:
        if not {"query", "proj", "ln_v.weight"} <= set(shapes):
            return None
        queries, width = shapes["query"]
        return dict(name="mqt", in_width=width, out_width=shapes["proj"][1], queries=queries)

"""Matryoshka Query Transformer (gordonhu608/MQT-LLaVA, multimodal_projector/builder.py).

Learned queries cross-attend to the patches; the first m of them serve for m tokens. The keys are positions alone, so
the attention does not depend on the image."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float

from deltallava_jax.arrays import Array
from deltallava_jax.config import ProjectorConfig
from deltallava_jax.errors import ConfigError
from deltallava_jax.models.layers import LayerNorm, normal, trunc_normal
from deltallava_jax.models.names import Entry, norm
from deltallava_jax.models.projectors import common
from deltallava_jax.models.vision import Needs, VisionFeatures

TOKENS = (256, 144, 64, 36, 16, 4, 2, 1)


class Mqt(nnx.Module):
    prefix = "query_abstractor."

    def __init__(self, cfg: ProjectorConfig, *, rngs: nnx.Rngs):
        width = cfg.width
        self.queries = nnx.Param(trunc_normal(cfg.initializer_range)(rngs.params(), (cfg.queries, width)))
        self.position = nnx.Param(common.half_table(round(cfg.queries**0.5), width))  # fixed: it gets no gradient
        self.q_norm, self.k_norm, self.v_norm = (LayerNorm(width, eps=common.EPS) for _ in "qkv")
        self.attention = common.PackedAttention(width, cfg, rngs=rngs)
        self.out = nnx.Param(normal(cfg.out_width**-0.5)(rngs.params(), (width, cfg.out_width)))
        self.grid = cfg.grid

    def __call__(self, features: VisionFeatures, text, budget: int, key: Array | None) -> Float[Array, "n V d"]:
        x, position = features.last, jax.lax.stop_gradient(self.position[...])
        q = self.q_norm((self.queries[...] + position)[:budget].astype(x.dtype))
        k = self.k_norm(common.resize_table(position, self.grid).astype(x.dtype))
        q, k = (jnp.broadcast_to(t, (x.shape[0], *t.shape)) for t in (q, k))
        return self.attention(q, k, self.v_norm(x)) @ self.out[...].astype(x.dtype)

    @staticmethod
    def budgets(cfg: ProjectorConfig) -> tuple[int, ...]:
        if round(cfg.queries**0.5) ** 2 != cfg.queries:
            raise ConfigError(f"projector.queries={cfg.queries}; mqt needs a square, for its positions")
        if cfg.width != cfg.in_width:
            raise ConfigError(f"projector.embed_width={cfg.embed_width}; mqt keeps in_width={cfg.in_width}")
        tokens = cfg.tokens or tuple(m for m in TOKENS if m <= cfg.queries)
        if not all(1 <= m <= cfg.queries for m in tokens):
            raise ConfigError(f"projector.tokens={tokens}; mqt makes 1 to projector.queries={cfg.queries} tokens")
        return tuple(sorted(tokens, reverse=True))

    @staticmethod
    def needs(cfg: ProjectorConfig, layers: int) -> Needs:
        return Needs(last=common.last_layer(cfg, layers))

    @staticmethod
    def name_table(cfg: ProjectorConfig) -> list[Entry]:
        table = [Entry("pos_embed", "position"), Entry("query", "queries"), Entry("proj", "out")]
        table += common.attention_names("attn", "attention")
        return table + [entry for name in "qkv" for entry in norm(f"ln_{name}", f"{name}_norm")]

    @staticmethod
    def infer(shapes: dict[str, tuple[int, ...]]) -> dict | None:
        if not {"query", "proj", "ln_v.weight"} <= set(shapes):
            return None
        queries, width = shapes["query"]
        return dict(name="mqt", in_width=width, out_width=shapes["proj"][1], queries=queries)

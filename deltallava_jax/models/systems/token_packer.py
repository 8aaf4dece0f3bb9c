"""TokenPacker (CircleRadon/TokenPacker, multimodal_projector/builder.py): Delta-LLaVA's ancestor.

Queries from the resized last features, keys and values from several layers, each query attends to its own cell."""

from __future__ import annotations

from dataclasses import dataclass

from flax import nnx
from jaxtyping import Float

from deltallava_jax.arrays import Array
from deltallava_jax.models.layers import LayerNorm, Linear, gelu, resize_grid, trunc_normal
from deltallava_jax.models.names import Entry, linear, norm
from deltallava_jax.models.systems import common
from deltallava_jax.models.systems.base import LevelsConfig, MultiLevel
from deltallava_jax.models.vision import VisionFeatures


@dataclass(frozen=True)
class TokenPackerConfig(LevelsConfig):
    name: str = "token_packer"


class TokenPacker(MultiLevel):
    Config = TokenPackerConfig
    torch_code = "projector_token_packer.py"

    def __init__(self, cfg: TokenPackerConfig, *, rngs: nnx.Rngs):
        make = lambda a, b, bias=True: Linear(
            a, b, bias=bias, kernel_init=trunc_normal(cfg.initializer_range), rngs=rngs
        )
        width, levels = cfg.width, cfg.level_count * cfg.in_width
        self.q = make(cfg.in_width, width, bias=False)
        self.k_up, self.k_down, self.v_up, self.v_down = (make(a, width) for a in (levels, width) * 2)
        self.q_norm, self.k_norm, self.v_norm = (LayerNorm(width, eps=common.EPS) for _ in "qkv")
        self.attention = common.LocalAttention(width, cfg, rngs=rngs)
        self.up, self.down = make(width, cfg.out_width), make(cfg.out_width, cfg.out_width)
        self.grid = cfg.grid

    def __call__(self, features: VisionFeatures, text, budget: int, key: Array | None) -> Float[Array, "n V d"]:
        side = round(budget**0.5)
        levels = common.as_grid(features.levels, self.grid)
        q = self.q_norm(self.q(resize_grid(common.as_grid(features.last, self.grid), side, "bilinear")))
        k = self.k_norm(self.k_down(gelu(self.k_up(levels))))
        v = self.v_norm(self.v_down(gelu(self.v_up(levels))))
        y = self.attention(q, k, v).reshape(q.shape[0], budget, -1)
        return self.down(gelu(self.up(y)))

    @staticmethod
    def name_table(cfg: TokenPackerConfig) -> list[Entry]:
        table = linear("q_proj_1", "q", bias=False) + common.attention_names("clip_attn", "attention")
        for name in "kv":
            table += linear(f"{name}_proj_1.0", f"{name}_up") + linear(f"{name}_proj_1.2", f"{name}_down")
        for name in "qkv":
            table += norm(f"ln_{name}_1", f"{name}_norm")
        return table + linear("mlp.0", "up") + linear("mlp.2", "down")

    @staticmethod
    def infer(shapes: dict[str, tuple[int, ...]]) -> dict | None:
        if "q_proj_1.weight" not in shapes:
            return None
        width, in_width = shapes["q_proj_1.weight"]
        level_count = shapes["k_proj_1.0.weight"][1] // in_width
        return dict(
            name="token_packer", in_width=in_width, embed_width=width, level_count=level_count,
            out_width=shapes["mlp.2.weight"][0],
        )  # fmt: skip

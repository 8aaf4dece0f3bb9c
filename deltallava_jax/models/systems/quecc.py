"""QueCC (locuslab/llava-token-compression, quecc.py): the question's last hidden state is added to every query patch.

Queries are downsampled by a depthwise convolution whose kernel is the cell, so the weights serve one scale factor."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Float

from deltallava_jax.arrays import Array
from deltallava_jax.config.checks import require_at_least
from deltallava_jax.models.layers import LayerNorm, Linear, gelu, torch_default, trunc_normal
from deltallava_jax.models.names import Entry, linear, norm
from deltallava_jax.models.systems import common
from deltallava_jax.models.systems.base import LevelsConfig, MultiLevel
from deltallava_jax.models.vision import VisionFeatures
from deltallava_jax.products import contract, plus

TEXT_EPS = 1e-5  # torch's default


@dataclass(frozen=True)
class QueccConfig(LevelsConfig):
    name: str = "quecc"
    scale_factor: int | tuple[int, ...] = 4  # side of a token's cell in patches, one: the kernel has its size
    text_width: int = 0  # width of the question's hidden state; 0: out_width
    question_length: int = 64  # most tokens of a question, BOS first; a longer one is cut, with a warning

    def __post_init__(self):
        super().__post_init__()
        self.require_one_scale()
        require_at_least(1, "projector", self, "question_length")
        require_at_least(0, "projector", self, "text_width")


class Quecc(MultiLevel):
    Config = QueccConfig
    torch_code = "projector_quecc.py"
    reads_question = True

    def __init__(self, cfg: QueccConfig, *, rngs: nnx.Rngs):
        make = lambda a, b: Linear(a, b, kernel_init=trunc_normal(cfg.initializer_range), rngs=rngs)
        width, levels, s = cfg.width, cfg.level_count * cfg.in_width, cfg.scale_factors[0]
        for name, inputs in (("q", cfg.in_width), ("k", levels), ("v", levels)):
            setattr(self, f"{name}_up", make(inputs, width))
            setattr(self, f"{name}_down", make(width, width))
            setattr(self, f"{name}_norm", LayerNorm(width, eps=common.EPS))
        init = torch_default(s * s)
        self.kernel, self.bias = nnx.Param(init(rngs.params(), (s, s, 1, width))), nnx.Param(jnp.zeros(width))
        self.text = make(cfg.text_width or cfg.out_width, cfg.in_width)
        self.text_norm = LayerNorm(cfg.in_width, eps=TEXT_EPS)
        self.attention = common.LocalAttention(width, cfg, rngs=rngs)
        self.up, self.down = make(width, cfg.out_width), make(cfg.out_width, cfg.out_width)
        self.grid = cfg.grid

    def __call__(
        self, features: VisionFeatures, text: Float[Array, "n t"] | None, budget: int, key: Array | None
    ) -> Float[Array, "n V d"]:
        if text is None:
            raise ValueError("quecc uses each image's question; pass its last hidden state as text, [n, text_width]")
        x = features.last + self.text_norm(self.text(text.astype(features.last.dtype)))[:, None]
        q = common.as_grid(self._embed("q", x), self.grid)
        k, v = (self._embed(name, common.as_grid(features.levels, self.grid)) for name in "kv")
        side = round(budget**0.5)
        cells = rearrange(q, "n (h p) (w q) c -> n h w p q c", h=side, w=side)
        q = plus(contract("nhwpqc,pqc->nhwc", cells, self.kernel[...][:, :, 0]), self.bias[...])
        y = self.attention(q, k, v).reshape(q.shape[0], budget, -1)
        return self.down(gelu(self.up(y)))

    def _embed(self, name: str, x: Float[Array, "... C"]) -> Float[Array, "... E"]:
        up, down, closing = (getattr(self, f"{name}_{part}") for part in ("up", "down", "norm"))
        return closing(down(gelu(up(x))))

    @staticmethod
    def name_table(cfg: QueccConfig) -> list[Entry]:
        table = common.attention_names("0.clip_attn", "attention")
        for name in "qkv":
            table += linear(f"0.{name}_proj.0", f"{name}_up") + linear(f"0.{name}_proj.2", f"{name}_down")
            table += norm(f"0.{name}_proj.3", f"{name}_norm")
        table += [Entry("0.q_downsample.weight", "kernel", "conv"), Entry("0.q_downsample.bias", "bias")]
        table += linear("0.text_projection.0", "text") + norm("0.text_projection.1", "text_norm")
        return table + linear("1", "up") + linear("3", "down")

    @staticmethod
    def infer(shapes: dict[str, tuple[int, ...]]) -> dict | None:
        if "0.q_downsample.weight" not in shapes:
            return None
        width, in_width = shapes["0.q_proj.0.weight"]
        return dict(
            name="quecc", in_width=in_width, embed_width=width, out_width=shapes["3.weight"][0],
            level_count=shapes["0.k_proj.0.weight"][1] // in_width, text_width=shapes["0.text_projection.0.weight"][1],
            scale_factor=shapes["0.q_downsample.weight"][2],
        )  # fmt: skip

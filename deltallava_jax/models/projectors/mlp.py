"""LLaVA-1.5's projector: a two-layer MLP on every patch (haotian-liu/LLaVA, multimodal_projector/builder.py)."""

from __future__ import annotations

from flax import nnx
from jaxtyping import Float

from deltallava_jax.arrays import Array
from deltallava_jax.config import ProjectorConfig
from deltallava_jax.models.layers import Linear, gelu, torch_default
from deltallava_jax.models.names import Entry, linear
from deltallava_jax.models.vision import Needs, VisionFeatures


class Mlp(nnx.Module):
    """Linear in_width -> d, exact GELU, Linear d -> d; one token a patch."""

    def __init__(self, cfg: ProjectorConfig, *, rngs: nnx.Rngs):
        make = lambda width, init: Linear(width, cfg.out_width, kernel_init=init, bias_init=init, rngs=rngs)
        self.up = make(cfg.in_width, torch_default(cfg.in_width))
        self.down = make(cfg.out_width, torch_default(cfg.out_width))
        self.cfg = cfg

    def __call__(self, features: VisionFeatures, text, budget: int, key: Array | None) -> Float[Array, "n V d"]:
        return self.project(features.last)

    def project(self, x: Float[Array, "n V C"]) -> Float[Array, "n V d"]:
        return self.down(gelu(self.up(x)))

    @staticmethod
    def budgets(cfg: ProjectorConfig) -> tuple[int, ...]:
        return (cfg.grid**2,)

    @staticmethod
    def needs(cfg: ProjectorConfig, layers: int) -> Needs:
        return Needs(last=layers + 1 + cfg.select_layer)

    @staticmethod
    def name_table(cfg: ProjectorConfig) -> list[Entry]:
        return linear("0", "up") + linear("2", "down")

    @staticmethod
    def infer(shapes: dict[str, tuple[int, ...]]) -> dict | None:
        if set(shapes) != {"0.weight", "0.bias", "2.weight", "2.bias"}:
            return None
        out_width, in_width = shapes["0.weight"]
        return dict(name="mlp", in_width=in_width, out_width=out_width)

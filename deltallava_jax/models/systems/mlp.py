"""LLaVA-1.5's projector: a two-layer MLP on every patch (haotian-liu/LLaVA, multimodal_projector/builder.py).

Selection is the base of systems that keep some patches and apply the same MLP."""

from __future__ import annotations

import dataclasses

from flax import nnx
from jaxtyping import Float

from deltallava_jax.arrays import Array
from deltallava_jax.config import ProjectorConfig
from deltallava_jax.models.layers import Linear, gelu, torch_default
from deltallava_jax.models.names import Entry, linear
from deltallava_jax.models.systems.base import Places, System, TokensConfig, in_reading_order
from deltallava_jax.models.vision import VisionFeatures

TOKENS = (144, 64, 36, 16, 4, 1)


class PatchMlp(System):
    """Linear in_width -> d, exact GELU, Linear d -> d, on every token; a subclass chooses the tokens."""

    def __init__(self, cfg: ProjectorConfig, *, rngs: nnx.Rngs):
        make = lambda width, init: Linear(width, cfg.out_width, kernel_init=init, bias_init=init, rngs=rngs)
        self.up = make(cfg.in_width, torch_default(cfg.in_width))
        self.down = make(cfg.out_width, torch_default(cfg.out_width))
        self.cfg = cfg

    def project(self, x: Float[Array, "n V C"]) -> Float[Array, "n V d"]:
        return self.down(gelu(self.up(x)))

    @staticmethod
    def name_table(cfg: ProjectorConfig) -> list[Entry]:
        return linear("0", "up") + linear("2", "down")


@dataclasses.dataclass(frozen=True)
class MlpConfig(ProjectorConfig):
    name: str = "mlp"


class Mlp(PatchMlp):
    """Every patch is a token."""

    Config = MlpConfig
    is_llava = True

    def __call__(self, features: VisionFeatures, text, budget: int, key: Array | None) -> Float[Array, "n V d"]:
        return self.project(features.last)

    @staticmethod
    def budgets(cfg: MlpConfig) -> tuple[int, ...]:
        return (cfg.grid**2,)

    def places(self, features: VisionFeatures, budget: int) -> Places:
        return in_reading_order(features, budget)

    @staticmethod
    def infer(shapes: dict[str, tuple[int, ...]]) -> dict | None:
        if set(shapes) != {"0.weight", "0.bias", "2.weight", "2.bias"}:
            return None
        out_width, in_width = shapes["0.weight"]
        return dict(name="mlp", in_width=in_width, out_width=out_width)


class Selection(PatchMlp):
    """Any number of the patches, chosen by the tower's features."""

    @staticmethod
    def budgets(cfg: TokensConfig) -> tuple[int, ...]:
        tokens = cfg.tokens or tuple(count for count in TOKENS if count <= cfg.grid**2)
        return tuple(sorted(tokens, reverse=True))

    @staticmethod
    def at(cfg: TokensConfig, budget: int) -> TokensConfig:
        return dataclasses.replace(cfg, tokens=(budget,))

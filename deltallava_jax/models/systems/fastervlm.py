"""FasterVLM (Theia-4869/FasterVLM, llava_arch.py): the patches that the CLS token attends to most, through
LLaVA's MLP, with its weights: any LLaVA-1.5 projector, any number of tokens."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from deltallava_jax.arrays import Array
from deltallava_jax.models.systems.base import Places, TokensConfig, last_layer
from deltallava_jax.models.systems.mlp import Selection
from deltallava_jax.models.vision import Needs, VisionFeatures


def select(cls_attention: Float[Array, "n N"], count: int) -> Int[Array, "n count"]:
    """Indices of the ``count`` patches with the most attention, in reading order."""
    return jnp.sort(jax.lax.top_k(cls_attention, count)[1], axis=1)


@dataclass(frozen=True)
class FasterVlmConfig(TokensConfig):
    name: str = "fastervlm"


class FasterVlm(Selection):
    Config = FasterVlmConfig
    torch_code = "projector_fastervlm.py"

    def __call__(self, features: VisionFeatures, text, budget: int, key: Array | None) -> Float[Array, "n V d"]:
        kept = select(features.cls_attention, budget)
        return self.project(jnp.take_along_axis(features.last, kept[..., None], axis=1))

    def places(self, features: VisionFeatures, budget: int) -> Places:
        return Places(select(features.cls_attention, budget), self.cfg.grid)

    @staticmethod
    def needs(cfg: FasterVlmConfig, layers: int) -> Needs:
        last = last_layer(cfg, layers)
        return Needs(last=last, cls_attention=(last, "head_mean"))

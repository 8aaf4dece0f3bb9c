"""FasterVLM (Theia-4869/FasterVLM, llava_arch.py): the patches that the CLS token looks at, through LLaVA's MLP.

No weights of its own: any LLaVA-1.5 projector, any number of tokens."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from deltallava_jax.arrays import Array
from deltallava_jax.config import ProjectorConfig
from deltallava_jax.errors import ConfigError
from deltallava_jax.models.projectors import common
from deltallava_jax.models.projectors.mlp import Mlp
from deltallava_jax.models.vision import Needs, VisionFeatures

TOKENS = (144, 64, 36, 16, 4, 1)


def select(cls_attention: Float[Array, "n N"], count: int) -> Int[Array, "n count"]:
    """Indices of the ``count`` patches with the most attention, in reading order."""
    return jnp.sort(jax.lax.top_k(cls_attention, count)[1], axis=1)


class FasterVlm(Mlp):
    def __call__(self, features: VisionFeatures, text, budget: int, key: Array | None) -> Float[Array, "n V d"]:
        kept = select(features.cls_attention, budget)
        return self.project(jnp.take_along_axis(features.last, kept[..., None], axis=1))

    @staticmethod
    def budgets(cfg: ProjectorConfig) -> tuple[int, ...]:
        patches = cfg.grid**2
        tokens = cfg.tokens or tuple(count for count in TOKENS if count <= patches)
        if not all(1 <= count <= patches for count in tokens):
            raise ConfigError(f"projector.tokens={tokens}; {cfg.name} keeps 1 to {patches} patches")
        return tuple(sorted(tokens, reverse=True))

    @staticmethod
    def needs(cfg: ProjectorConfig, layers: int) -> Needs:
        last = common.last_layer(cfg, layers)
        return Needs(last=last, cls_attention=(last, "head_mean"))

    @staticmethod
    def infer(shapes: dict[str, tuple[int, ...]]) -> dict | None:
        return None  # its tensors are an MLP's: name it

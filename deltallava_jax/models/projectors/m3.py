"""Matryoshka Multimodal Models (mu-cai/matryoshka-mm, llava_arch.py): LLaVA's MLP, then average pooling.

One set of weights for every scale factor; the recipe averages the loss of all scales in each step
(training.every_budget)."""

from __future__ import annotations

from jaxtyping import Float

from deltallava_jax.arrays import Array
from deltallava_jax.models.projectors import common
from deltallava_jax.models.projectors.mlp import Mlp
from deltallava_jax.models.vision import VisionFeatures


class M3(Mlp):
    def __call__(self, features: VisionFeatures, text, budget: int, key: Array | None) -> Float[Array, "n V d"]:
        tokens = super().__call__(features, text, budget, key)
        pooled = common.pool_grid(common.as_grid(tokens, features.grid[0]), round(budget**0.5))
        return pooled.reshape(tokens.shape[0], budget, -1)

    budgets = staticmethod(common.scale_budgets)

    @staticmethod
    def infer(shapes: dict[str, tuple[int, ...]]) -> dict | None:
        return None  # its tensors are an MLP's: name it

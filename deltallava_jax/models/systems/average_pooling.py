"""A control for every projector: each cell's patches averaged, then LLaVA's MLP, with its weights.

M3 averages after the MLP, which then runs on every patch; here it runs on the budget's tokens alone."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float

from deltallava_jax.arrays import Array
from deltallava_jax.models.systems import common
from deltallava_jax.models.systems.base import OnGrid, ScaleConfig
from deltallava_jax.models.systems.mlp import PatchMlp
from deltallava_jax.models.vision import VisionFeatures


@dataclass(frozen=True)
class AveragePoolingConfig(ScaleConfig):
    name: str = "average_pooling"


class AveragePooling(OnGrid, PatchMlp):
    Config = AveragePoolingConfig
    torch_code = "projector_average_pooling.py"

    def __call__(self, features: VisionFeatures, text, budget: int, key: Array | None) -> Float[Array, "n V d"]:
        x = common.as_grid(features.last, self.cfg.grid)
        x = common.pool_grid(x, round(budget**0.5))
        return self.project(x.reshape(x.shape[0], budget, -1))

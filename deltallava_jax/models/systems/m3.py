"""Matryoshka Multimodal Models (mu-cai/matryoshka-mm, llava_arch.py): LLaVA's MLP, then average pooling.

One set of weights for every scale factor; the recipe averages the loss of all scales in each step
(training.every_budget)."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float

from deltallava_jax.arrays import Array
from deltallava_jax.models.systems import common
from deltallava_jax.models.systems.base import OnGrid, ScaleConfig
from deltallava_jax.models.systems.mlp import PatchMlp
from deltallava_jax.models.vision import VisionFeatures

SCALES = (1, 2, 4, 8, 24)


@dataclass(frozen=True)
class M3Config(ScaleConfig):
    name: str = "m3"
    scale_factor: int | tuple[int, ...] | None = None  # None: those of 1, 2, 4, 8, 24 that divide the grid

    def __post_init__(self):
        if self.scale_factor is None:
            object.__setattr__(self, "scale_factor", self.published(self.grid)["scale_factor"])
        super().__post_init__()

    @classmethod
    def published(cls, grid: int) -> dict:
        divide = tuple(s for s in SCALES if grid > 0 and grid % s == 0)
        return super().published(grid) | {"scale_factor": divide}


class M3(OnGrid, PatchMlp):
    Config = M3Config
    torch_code = "projector_m3.py"

    def __call__(self, features: VisionFeatures, text, budget: int, key: Array | None) -> Float[Array, "n V d"]:
        tokens = self.project(features.last)
        pooled = common.pool_grid(common.as_grid(tokens, features.grid[0]), round(budget**0.5))
        return pooled.reshape(tokens.shape[0], budget, -1)

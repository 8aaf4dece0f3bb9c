"""A system as a user would write one: the first patch of each cell, through LLaVA's MLP."""

from dataclasses import dataclass
from pathlib import Path

from deltallava_jax.models.systems import common
from deltallava_jax.models.systems.base import OnGrid, ScaleConfig
from deltallava_jax.models.systems.mlp import PatchMlp


@dataclass(frozen=True)
class CornersConfig(ScaleConfig):
    name: str = "corners"
    scale_factor: int | tuple[int, ...] = 4  # side of a cell in patches


class Corners(OnGrid, PatchMlp):
    Config = CornersConfig
    torch_code = Path(__file__).with_name("projector_corners.py")

    def __call__(self, features, text, budget, key):
        step = self.cfg.grid // round(budget**0.5)
        chosen = common.as_grid(features.last, self.cfg.grid)[:, ::step, ::step]
        return self.project(chosen.reshape(len(chosen), budget, -1))

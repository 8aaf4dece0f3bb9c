"""A control for every selection: random patches through LLaVA's MLP, with its weights.

In training each image draws its own patches in each step; otherwise all images keep the patches that ``seed`` draws, so
that an answer depends on its image and question alone. The first m of one order of the patches are kept for m tokens.
Compare with the mean of several seeds."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from deltallava_jax.arrays import Array
from deltallava_jax.config.checks import require
from deltallava_jax.models.systems.base import Places, TokensConfig
from deltallava_jax.models.systems.mlp import Selection
from deltallava_jax.models.vision import VisionFeatures


@dataclass(frozen=True)
class RandomConfig(TokensConfig):
    name: str = "random"
    seed: int = 0  # of the patches kept outside of training, 0 to 2**32 - 1

    def __post_init__(self):
        super().__post_init__()
        require(0 <= self.seed < 2**32, f"projector.seed={self.seed}; expected 0 to 2**32 - 1")


class Random(Selection):
    Config = RandomConfig
    torch_code = "projector_random.py"

    def __call__(self, features: VisionFeatures, text, budget: int, key: Array | None) -> Float[Array, "n V d"]:
        kept = self._kept(features, budget, key)
        return self.project(jnp.take_along_axis(features.last, kept[..., None], axis=1))

    def _kept(self, features: VisionFeatures, budget: int, key: Array | None) -> Int[Array, "n V"]:
        """Indices of the patches that stay, in reading order."""
        n, patches = features.last.shape[:2]
        if key is None:  # numpy's old generator: the same order in every version, and in PyTorch's code
            order = np.random.RandomState(self.cfg.seed).permutation(patches)
            return jnp.broadcast_to(np.sort(order[:budget]), (n, budget))
        return jnp.sort(jnp.argsort(jax.random.uniform(key, (n, patches)), axis=1)[:, :budget], axis=1)

    def places(self, features: VisionFeatures, budget: int) -> Places:
        return Places(self._kept(features, budget, None), self.cfg.grid)

"""Random patches in PyTorch: drawn by the seed, in raster order, then LLaVA's MLP.

Exported by deltallava_jax."""

import numpy as np
import torch

from .projector_parts import Mlp


class Projector(Mlp):
    def __init__(self, p):
        super().__init__(p)
        self.order = np.random.RandomState(p["seed"]).permutation(p["grid"] ** 2)

    def forward(self, features, budget):
        kept = torch.from_numpy(np.sort(self.order[:budget])).to(features.last.device)
        return super().forward(features.last[:, kept])

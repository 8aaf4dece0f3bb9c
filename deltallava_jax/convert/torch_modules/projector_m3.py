"""Matryoshka Multimodal Models in PyTorch: LLaVA's MLP, then average pooling. Exported by deltallava_jax."""

import math

import torch.nn.functional as F

from .projector_parts import Mlp, as_grid, as_tokens


class Projector(Mlp):
    def __init__(self, p):
        super().__init__(p)
        self.grid = p["grid"]

    def forward(self, features, budget):
        tokens = as_grid(super().forward(features.last), self.grid)
        return as_tokens(F.avg_pool2d(tokens, self.grid // math.isqrt(budget)))

"""Matryoshka Multimodal Models in PyTorch: LLaVA's MLP, then average pooling. Exported by deltallava_jax."""

import math

import torch.nn.functional as F
from torch import nn

from .projector_parts import as_grid, as_tokens


class Projector(nn.Sequential):
    def __init__(self, p):
        d = p["out_width"]
        super().__init__(nn.Linear(p["in_width"], d), nn.GELU(), nn.Linear(d, d))
        self.grid = p["grid"]

    def forward(self, last, levels, budget):
        tokens = as_grid(super().forward(last), self.grid)
        return as_tokens(F.avg_pool2d(tokens, self.grid // math.isqrt(budget)))

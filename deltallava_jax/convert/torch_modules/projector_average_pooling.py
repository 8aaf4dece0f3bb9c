"""Average pooling in PyTorch: the mean of each cell's patches, then LLaVA's MLP.

Exported by deltallava_jax."""

import math

from torch.nn import functional as F

from .projector_parts import Mlp, as_grid, as_tokens


class Projector(Mlp):
    def __init__(self, p):
        super().__init__(p)
        self.grid = p["grid"]

    def forward(self, features, budget):
        side = math.isqrt(budget)
        pooled = F.adaptive_avg_pool2d(as_grid(features.last, self.grid), side)
        return super().forward(as_tokens(pooled))

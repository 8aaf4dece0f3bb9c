"""The system of own_system.py in PyTorch, as an export carries it."""

import math

from .projector_parts import Mlp


class Projector(Mlp):
    def __init__(self, p):
        super().__init__(p)
        self.grid = p["grid"]

    def forward(self, features, budget):
        step = self.grid // math.isqrt(budget)
        return super().forward(features.last.unflatten(1, (self.grid, self.grid))[:, ::step, ::step].flatten(1, 2))

"""Honeybee's C-Abstractor in PyTorch. Exported by deltallava_jax; tensor names are the public release's."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from .projector_parts import as_grid, as_tokens


class NormedConv(nn.Module):
    """Convolution without bias, LayerNorm over the channels of each pixel."""

    def __init__(self, a, b, size=1, groups=1):
        super().__init__()
        self.conv = nn.Conv2d(a, b, size, padding=size // 2, groups=groups, bias=False)
        self.bn = nn.LayerNorm(b, eps=1e-5)

    def forward(self, x):
        return self.bn(self.conv(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class SqueezeExcite(nn.Module):
    def __init__(self, width, squeezed):
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(width, squeezed, 1), nn.Conv2d(squeezed, width, 1)

    def forward(self, x):
        return x * self.fc2(F.silu(self.fc1(x.mean((2, 3), keepdim=True)))).sigmoid()


class Bottleneck(nn.Module):
    def __init__(self, in_width, width):
        super().__init__()
        self.conv1, self.conv2 = NormedConv(in_width, width), NormedConv(width, width, 3, width)
        self.se, self.conv3 = SqueezeExcite(width, round(in_width / 4)), NormedConv(width, width)
        self.downsample = NormedConv(in_width, width) if in_width != width else nn.Identity()

    def forward(self, x):
        y = F.silu(self.conv2(F.silu(self.conv1(x))))
        return F.silu(self.conv3(self.se(y)) + self.downsample(x))


class Projector(nn.Module):
    def __init__(self, p):
        super().__init__()
        self.p = p
        c, d, depth = p["in_width"], p["out_width"], p["depth"] or 3
        width = p["embed_width"] or c
        self.pos_emb = nn.Parameter(torch.zeros(1, p["grid"] ** 2, c))
        stage = lambda first: nn.ModuleDict(
            {f"b{i}": Bottleneck(first if i == 1 else width, width) for i in range(1, depth + 1)}
        )
        self.net = nn.ModuleDict({"0": stage(c), "2": stage(width)})
        self.readout = nn.Sequential(nn.Linear(width, d), nn.SiLU(), nn.Linear(d, d))

    def forward(self, features, budget):
        x = as_grid(features.last + self.pos_emb, self.p["grid"])
        for block in self.net["0"].values():
            x = block(x)
        x = F.adaptive_avg_pool2d(x, math.isqrt(budget))
        for block in self.net["2"].values():
            x = block(x)
        return self.readout(as_tokens(x))

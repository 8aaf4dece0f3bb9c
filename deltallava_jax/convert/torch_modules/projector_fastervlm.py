"""FasterVLM in PyTorch: the patches that the CLS token attends to most, in raster order, then LLaVA's MLP.

Exported by deltallava_jax."""

import torch

from .projector_parts import Mlp


class Projector(Mlp):
    def forward(self, features, budget):
        kept = features.cls_attention.argsort(dim=1, descending=True, stable=True)[:, :budget].sort(1).values
        rows = torch.arange(len(kept), device=kept.device)[:, None]
        return super().forward(features.last[rows, kept])

"""EViT in PyTorch: the tower keeps the patches that its CLS token attends to most; then LLaVA's MLP.

Exported by deltallava_jax."""

import math

import torch

from .projector_parts import Mlp, cls_attention


class Projector(Mlp):
    def __init__(self, p):
        super().__init__(p)
        self.ratio, self.fuse = 0.7 if p["keep_ratio"] is None else p["keep_ratio"], p["fuse"]

    def prune(self, stage, layer, x):
        """Applies a layer of the tower, [n, 1 + N, C], dropping patches between its attention and its MLP."""
        y = layer.layer_norm1(x)
        scores = cls_attention(layer.self_attn, y, layer.self_attn.num_heads)
        x = x + layer.self_attn(y, attention_mask=None)[0]
        cls, patches = x[:, :1], x[:, 1:]
        count, rows = math.ceil(self.ratio * patches.shape[1]), torch.arange(len(x), device=x.device)[:, None]
        if count < patches.shape[1]:
            stay = scores.topk(count, dim=1).indices.sort(1).values
            kept = patches[rows, stay]
            if self.fuse:
                dropped = scores.scatter(1, stay, 0.0).to(x.dtype)
                kept = torch.cat([kept, dropped[:, None] @ patches], dim=1)
            patches = kept
        x = torch.cat([cls, patches], dim=1)
        return x + layer.mlp(layer.layer_norm2(x))

    def forward(self, features, budget):
        return super().forward(features.last)

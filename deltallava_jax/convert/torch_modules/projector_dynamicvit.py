"""DynamicViT in PyTorch: small predictors in the tower select the patches that are kept; then LLaVA's MLP.

Exported by deltallava_jax; the predictors' tensor names are the public release's."""

import torch
from torch import nn

from .projector_parts import Mlp, run_layer


class Predictor(nn.Module):
    """[n, N, C] patches -> [n, N, 2] log-probabilities of (keep, drop)."""

    def __init__(self, c):
        super().__init__()
        self.in_conv = nn.Sequential(nn.LayerNorm(c), nn.Linear(c, c), nn.GELU())
        sizes = nn.Linear(c, c // 2), nn.GELU(), nn.Linear(c // 2, c // 4), nn.GELU(), nn.Linear(c // 4, 2)
        self.out_conv = nn.Sequential(*sizes)

    def forward(self, x):
        own, others = self.in_conv(x).chunk(2, dim=-1)
        mean = others.mean(1, keepdim=True).expand_as(own)
        return self.out_conv(torch.cat([own, mean], dim=-1)).float().log_softmax(-1)


class Projector(Mlp):
    def __init__(self, p):
        super().__init__(p)
        self.ratio, self.patches = 0.7 if p["keep_ratio"] is None else p["keep_ratio"], p["grid"] ** 2
        self.score_predictor = nn.ModuleList(Predictor(p["in_width"]) for _ in p["prune_layers"])

    def prune(self, stage, layer, x):
        """Drops patches by a predictor, then applies a layer of the tower: [n, 1 + N, C]. stage: the pruning step."""
        scores = self.score_predictor[stage](x[:, 1:])[..., 0]
        stay = scores.topk(int(self.patches * self.ratio ** (stage + 1)), dim=1).indices.sort(1).values
        patches = x[:, 1:][torch.arange(len(x), device=x.device)[:, None], stay]
        return run_layer(layer, torch.cat([x[:, :1], patches], dim=1))

    def forward(self, features, budget):
        return self[2](self[1](self[0](features.last)))

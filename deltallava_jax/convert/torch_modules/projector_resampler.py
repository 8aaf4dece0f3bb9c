"""Qwen-VL's resampler in PyTorch. Exported by deltallava_jax; tensor names are Qwen-VL's."""

import torch
from torch import nn

from .projector_parts import resize_table


class Resampler(nn.Module):
    def __init__(self, p):
        super().__init__()
        self.p = p
        c, d = p["in_width"], p["out_width"]
        self.pos_embed = nn.Parameter(torch.zeros(p["queries"], d), requires_grad=False)
        self.query = nn.Parameter(torch.zeros(p["queries"], d))
        self.kv_proj = nn.Linear(c, d, bias=False) if c != d else nn.Identity()
        self.attn = nn.MultiheadAttention(d, d // p["head_dim"], batch_first=True)
        self.ln_q, self.ln_kv = nn.LayerNorm(d, eps=1e-6), nn.LayerNorm(d, eps=1e-6)

    def forward(self, features, budget):
        x, position = self.ln_kv(self.kv_proj(features.last)), self.pos_embed
        if len(position) != x.shape[1]:
            position = resize_table(position, self.p["grid"]).to(x.dtype)
        q = (self.ln_q(self.query) + self.pos_embed).expand(len(x), -1, -1)
        return self.attn(q, x + position, x, need_weights=False)[0]


class Closed(nn.Module):
    """The resampler followed by Qwen-VL's LayerNorm and output matrix."""

    def __init__(self, p):
        super().__init__()
        self.attn_pool = Resampler(p)
        self.ln_post = nn.LayerNorm(p["out_width"], eps=1e-6)
        self.proj = nn.Parameter(torch.zeros(p["out_width"], p["out_width"]))

    def forward(self, features, budget):
        return self.ln_post(self.attn_pool(features, budget)) @ self.proj


def Projector(p):
    return Closed(p) if p["closing"] else Resampler(p)

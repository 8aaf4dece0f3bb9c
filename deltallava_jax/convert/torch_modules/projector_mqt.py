"""Matryoshka Query Transformer in PyTorch. Exported by deltallava_jax; tensor names are the public release's."""

import torch
from torch import nn

from .projector_parts import resize_table


class Projector(nn.Module):
    def __init__(self, p):
        super().__init__()
        self.p = p
        c = p["in_width"]
        self.pos_embed = nn.Parameter(torch.zeros(p["queries"], c), requires_grad=False)
        self.query = nn.Parameter(torch.zeros(p["queries"], c))
        self.ln_q, self.ln_k, self.ln_v = (nn.LayerNorm(c, eps=1e-6) for _ in range(3))
        self.attn = nn.MultiheadAttention(c, c // p["head_dim"], batch_first=True)
        self.proj = nn.Parameter(torch.zeros(c, p["out_width"]))

    def forward(self, features, budget):
        last = features.last
        q = self.ln_q(self.query[:budget] + self.pos_embed[:budget])
        k = self.ln_k(resize_table(self.pos_embed, self.p["grid"]).to(last.dtype))
        q, k = (t.expand(len(last), -1, -1) for t in (q, k))
        y, _ = self.attn(q, k, self.ln_v(last), need_weights=False)
        return y @ self.proj

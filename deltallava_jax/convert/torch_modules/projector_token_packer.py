"""TokenPacker in PyTorch. Exported by deltallava_jax; tensor names are the public release's."""

import math

from torch import nn

from .projector_parts import as_tokens, resize, windows


class Projector(nn.Module):
    def __init__(self, p):
        super().__init__()
        self.p = p
        c, d = p["in_width"], p["out_width"]
        width, levels = p["embed_width"] or c, p["level_count"] * c
        self.q_proj_1 = nn.Linear(c, width, bias=False)
        self.k_proj_1 = nn.Sequential(nn.Linear(levels, width), nn.GELU(), nn.Linear(width, width))
        self.v_proj_1 = nn.Sequential(nn.Linear(levels, width), nn.GELU(), nn.Linear(width, width))
        self.ln_q_1, self.ln_k_1, self.ln_v_1 = (nn.LayerNorm(width, eps=1e-6) for _ in range(3))
        self.clip_attn = nn.MultiheadAttention(width, width // p["head_dim"], batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, d), nn.GELU(), nn.Linear(d, d))

    def forward(self, features, budget):
        side = math.isqrt(budget)
        q = self.ln_q_1(self.q_proj_1(as_tokens(resize(features.last, self.p["grid"], side))))
        k, v = self.ln_k_1(self.k_proj_1(features.levels)), self.ln_v_1(self.v_proj_1(features.levels))
        k, v = windows(k, side), windows(v, side)
        y, _ = self.clip_attn(q.reshape(-1, 1, q.shape[-1]), k, v, need_weights=False)
        return self.mlp(y.reshape(q.shape[0], budget, -1))

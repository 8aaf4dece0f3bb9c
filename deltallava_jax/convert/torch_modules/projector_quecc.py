"""QueCC in PyTorch. Exported by deltallava_jax; tensor names are the public release's."""

import math

from torch import nn

from .projector_parts import as_grid, as_tokens, scale_factor, windows


class Compressor(nn.Module):
    """Each query patch, with the question added, attends to the patches of its cell."""

    def __init__(self, p):
        super().__init__()
        self.p = p
        c, s = p["in_width"], scale_factor(p)
        width, levels = p["embed_width"] or c, p["level_count"] * c
        embed = lambda a: nn.Sequential(
            nn.Linear(a, width), nn.GELU(), nn.Linear(width, width), nn.LayerNorm(width, eps=1e-6)
        )
        self.q_proj, self.k_proj, self.v_proj = embed(c), embed(levels), embed(levels)
        self.q_downsample = nn.Conv2d(width, width, s, stride=s, groups=width)
        self.text_projection = nn.Sequential(nn.Linear(p["text_width"] or p["out_width"], c), nn.LayerNorm(c))
        self.clip_attn = nn.MultiheadAttention(width, width // p["head_dim"], batch_first=True)

    def forward(self, features):
        text = self.text_projection(features.text.to(features.last.dtype))
        q = as_grid(self.q_proj(features.last + text[:, None]), self.p["grid"])
        q = as_tokens(self.q_downsample(q))
        side = math.isqrt(q.shape[1])
        k, v = (windows(embed(features.levels), side) for embed in (self.k_proj, self.v_proj))
        y, _ = self.clip_attn(q.reshape(-1, 1, q.shape[-1]), k, v, need_weights=False)
        return y.reshape(q.shape)


class Projector(nn.Sequential):
    reads_question = True

    def __init__(self, p):
        d = p["out_width"]
        super().__init__(Compressor(p), nn.Linear(p["embed_width"] or p["in_width"], d), nn.GELU(), nn.Linear(d, d))

    def forward(self, features, budget):
        return super().forward(features)

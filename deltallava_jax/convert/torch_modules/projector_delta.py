"""The Delta projector in PyTorch, in the variants of the release and of the paper. Exported by deltallava_jax.

Tensor names are those of the public release, mzamini92/Delta-LLaVA; written from its description, not from its code."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from .projector_parts import positions, resize, whole, windows


class DeltaProjection(nn.Module):
    """x (W + U V); the release adds GELU and LayerNorm."""

    def __init__(self, in_width, width, rank, low_rank, normed):
        super().__init__()
        self.shared_weight = nn.Linear(in_width, width, bias=False)
        self.U = nn.Parameter(torch.zeros(in_width, rank)) if low_rank else None
        self.V = nn.Parameter(torch.zeros(rank, width)) if low_rank else None
        self.norm = nn.LayerNorm(width, eps=1e-6) if normed else None

    def forward(self, x):
        y = self.shared_weight(x)
        if self.U is not None:
            y = y + x @ self.U @ self.V
        return y if self.norm is None else self.norm(F.gelu(y))


class SelfAttention(nn.Module):
    """Pre-norm self-attention over a grid [n, C, h, w], keys and values pooled over reduction^2 tokens."""

    def __init__(self, width, head_dim, reduction):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.q, self.k, self.v, self.proj = (nn.Linear(width, width) for _ in range(4))
        self.head_dim, self.reduction = head_dim, reduction

    def forward(self, x):
        n, c, h, w = x.shape
        y = self.norm(x.flatten(2).transpose(1, 2))
        pooled, count = y, self.reduction**2
        if self.reduction > 1:
            pooled = y[:, : y.shape[1] // count * count].reshape(n, -1, count, c).mean(2)
        heads = lambda t: t.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        y = F.scaled_dot_product_attention(heads(self.q(y)), heads(self.k(pooled)), heads(self.v(pooled)))
        return self.proj(y.transpose(1, 2).flatten(2)).transpose(1, 2).reshape(n, c, h, w)


class ConvAttention(nn.Module):
    """Grouped 3x3 convolution, LayerNorm over channels, ReLU, 1x1 convolution."""

    def __init__(self, width, group):
        super().__init__()
        self.group_conv3x3 = nn.Conv2d(width, width, 3, padding=1, groups=width // group, bias=False)
        self.norm = nn.LayerNorm(width)
        self.projection = nn.Conv2d(width, width, 1, bias=False)

    def forward(self, x):
        y = self.norm(self.group_conv3x3(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.projection(F.relu(y))


class Conv(nn.Module):
    def __init__(self, in_width, width):
        super().__init__()
        self.conv = nn.Conv2d(in_width, width, 1, bias=False)

    def forward(self, x):
        return self.conv(x)


class Mlp(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(width, 2 * width, 1), nn.Conv2d(2 * width, width, 1)

    def forward(self, x):
        return self.conv2(F.relu(self.conv1(x)))


class Block(nn.Module):
    """Self-attention on a share of the channels, convolution on the rest, an MLP over both."""

    def __init__(self, p, width, attended):
        super().__init__()
        release, emhsa = p["variant"] == "release", p["ablation"] != "no_emhsa"
        self.patch_embed = Conv(width, attended)
        self.norm_mhsa = nn.LayerNorm(attended) if emhsa and release else None
        self.e_mhsa = SelfAttention(attended, p["block_head_dim"], p["reduction"]) if emhsa else None
        self.projection = Conv(attended, width - attended)
        self.mhca = ConvAttention(width - attended, p["block_head_dim"] if release else 1)
        self.mlp = Mlp(width)

    def forward(self, x):
        x = self.patch_embed(x)
        if self.e_mhsa is not None:
            y = x if self.norm_mhsa is None else self.norm_mhsa(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            x = x + self.e_mhsa(y)
        y = self.projection(x)
        x = torch.cat([x, y + self.mhca(y)], dim=1)
        return x + self.mlp(x)


class Projector(nn.Module):
    """Features -> [n, budget, d] visual tokens; the same weights for any budget."""

    def __init__(self, p):
        super().__init__()
        self.p, self.release = p, p["variant"] == "release"
        c, d, low_rank = p["in_width"], p["out_width"], p["ablation"] != "no_delta"
        width, levels = p["embed_width"] or c, p["level_count"] * c
        self.q_proj_1 = DeltaProjection(c if not self.release else width, width, p["rank"], low_rank, self.release)
        self.k_proj_1 = DeltaProjection(levels, width, p["rank"], low_rank, self.release)
        self.v_proj_1 = DeltaProjection(levels, width, p["rank"], low_rank, self.release)
        self.combined_block = None
        if p["ablation"] != "no_tb":
            heads = width // p["block_head_dim"]
            attended = min(max(1, round(heads * p["mix_ratio"])), heads - 1) * p["block_head_dim"]
            self.combined_block = nn.ModuleDict({"ntb": Block(p, width, attended)})
        if self.release:
            self.clip_attn = nn.MultiheadAttention(width, width // p["head_dim"], batch_first=True)
            self.mlp = nn.Sequential(nn.Linear(width, d), nn.GELU(), nn.Linear(d, d))
        else:
            refine = {"mhca": ConvAttention(c, 1)}
            if p["ablation"] != "no_emhsa":
                refine["e_mhsa"] = SelfAttention(c, p["block_head_dim"], p["reduction"])
            self.refine = nn.ModuleDict(refine)
            self.head = nn.Linear(width, d)
            inner = p["mlp_width"]
            self.ffn = nn.ModuleDict(
                {"norm": nn.LayerNorm(d, eps=1e-6), "0": nn.Linear(d, inner), "2": nn.Linear(inner, d)}
            )

    def forward(self, features, budget):
        grid, side = self.p["grid"], math.isqrt(budget)
        q = resize(features.last, grid, side)
        k, v = self.k_proj_1(features.levels), self.v_proj_1(features.levels)
        return self._release(q, k, v, side) if self.release else self._paper(q, k, v, side)

    def _release(self, q, k, v, side):
        if self.combined_block is not None:
            q = self.combined_block["ntb"](q)
        q = self.q_proj_1(q.flatten(2).transpose(1, 2) + positions(self.p["grid"], side, q))
        k, v = (windows(x, side) for x in (k, v))
        y, _ = self.clip_attn(q.reshape(-1, 1, q.shape[-1]), k, v, need_weights=False)
        return self.mlp(y.reshape(q.shape[0], side * side, -1))

    def _paper(self, q, k, v, side):
        q = q + self.refine["mhca"](q)
        if "e_mhsa" in self.refine:
            q = q + self.refine["e_mhsa"](q)
        q = self.q_proj_1(q.flatten(2).transpose(1, 2) + positions(self.p["grid"], side, q))
        if self.combined_block is not None:
            q = q.transpose(1, 2).unflatten(2, (side, side))
            q = self.combined_block["ntb"](q).flatten(2).transpose(1, 2)
        cells = side // self.p["window"]
        heads = lambda t: t.unflatten(-1, (-1, self.p["head_dim"])).transpose(1, 2)
        q, k, v = (heads(windows(x, cells)) for x in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        y = whole(y, cells)
        y = self.head(y)
        return y + self.ffn["2"](F.gelu(self.ffn["0"](self.ffn["norm"](y))))

"""Shared parts of the projectors in PyTorch. Exported by deltallava_jax.

A projector is called with (features, budget) and returns visual tokens [n, budget, d], with their valid mask
[n, budget] if the number of tokens varies. One that reads the question has reads_question = True; one that applies
layers of the tower has prune(stage, layer, x)."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass
class Features:
    """The inputs of projectors, for n images with N patches, without the CLS token.

    last: [n, N, C]; levels: [n, N, L C], several layers of the tower, concatenated on channels; cls_attention: [n, N],
    the CLS token's attention to each patch; keys: [n, N, C], of a layer; text: [n, d], the question's last hidden
    state."""

    last: torch.Tensor
    levels: torch.Tensor | None = None
    cls_attention: torch.Tensor | None = None
    keys: torch.Tensor | None = None
    text: torch.Tensor | None = None


class Mlp(nn.Sequential):
    """LLaVA's projector, on every token: [n, V, C] -> [n, V, d]."""

    def __init__(self, p):
        d = p["out_width"]
        super().__init__(nn.Linear(p["in_width"], d), nn.GELU(), nn.Linear(d, d))


def cls_attention(attention, state, heads):
    """[n, 1 + N, C], the normed input of a tower's attention -> [n, N]: the CLS token's attention to each patch,
    averaged over ``heads`` heads."""
    split = lambda t: t.unflatten(-1, (heads, -1)).transpose(1, 2).float()
    q, k = split(attention.q_proj(state[:, :1])), split(attention.k_proj(state))
    scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
    return scores.softmax(-1).mean(1)[:, 0, 1:]


def run_layer(layer, x):
    """Applies a layer of the tower."""
    y = layer(x, attention_mask=None)
    return y[0] if isinstance(y, tuple) else y


def scale_factor(p):
    """The first scale factor, of weights that support only one."""
    value = p["scale_factor"]
    return value[0] if isinstance(value, list) else value


def as_grid(x, grid):
    """[n, N, C] -> [n, C, g, g]"""
    return x.transpose(1, 2).unflatten(2, (grid, grid))


def as_tokens(x):
    """[n, C, h, w] -> [n, h w, C]"""
    return x.flatten(2).transpose(1, 2)


def resize(x, grid, side):
    """[n, N, C] -> [n, C, side, side], bilinear without antialiasing."""
    return F.interpolate(as_grid(x, grid).float(), (side, side), mode="bilinear", align_corners=False).to(x.dtype)


def windows(x, count):
    """[n, g g, C] -> [n count count, w w, C]: the cells of a count x count grid, row by row."""
    n, tokens, c = x.shape
    w = math.isqrt(tokens) // count
    return x.reshape(n, count, w, count, w, c).transpose(2, 3).reshape(n * count * count, w * w, c)


def whole(x, count):
    """The inverse of windows."""
    cells, tokens, c = x.shape
    n, w = cells // (count * count), math.isqrt(tokens)
    return x.reshape(n, count, count, w, w, c).transpose(2, 3).reshape(n, count * count * w * w, c)


def table(side, width):
    """[side side, width] sines and cosines of the columns, then of the rows."""
    frequencies = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)
    return (
        torch.cat([axis[None].expand(side, -1, -1), axis[:, None].expand(-1, side, -1)], dim=-1).flatten(0, 1).float()
    )


def resize_table(positions, side):
    """[S S, C] position embeddings of a square grid, resized to side x side (bicubic)."""
    start = math.isqrt(len(positions))
    grid = positions.float().T.reshape(1, -1, start, start)
    return F.interpolate(grid, (side, side), mode="bicubic", align_corners=False)[0].flatten(1).T


def positions(grid, side, like):
    """The fixed table of the patch grid, resized to side x side: [1, side side, C]."""
    return resize_table(table(grid, like.shape[1]).to(like.device), side)[None].to(like.dtype)

"""What the projectors share in PyTorch. Exported by deltallava_jax."""

import math

import torch
import torch.nn.functional as F


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
    """[S S, C] positions of a square for another one, bicubic."""
    start = math.isqrt(len(positions))
    grid = positions.float().T.reshape(1, -1, start, start)
    return F.interpolate(grid, (side, side), mode="bicubic", align_corners=False)[0].flatten(1).T


def positions(grid, side, like):
    """The fixed table of the patch grid, resized to side x side: [1, side side, C]."""
    return resize_table(table(grid, like.shape[1]).to(like.device), side)[None].to(like.dtype)

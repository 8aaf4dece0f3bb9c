"""The Delta projector's paper variant against a float64 reference written from the paper's equations alone.

Where the paper leaves a gap both read it so: EMHSA has one pre-norm, MHCA is depthwise everywhere, the block splits
the channels as the release does, norms have eps 1e-5 in the block and 1e-6 in equation 11.
"""

import math

import jax
import numpy as np
import pytest

from deltallava_jax.config import system_config
from deltallava_jax.models import systems
from tests import golden

# Widths differ wherever they can: 3 heads of 16 in the refinement, 3 + 1 in the block, 2 heads of 32 in the windows.
SMALL = dict(
    variant="paper",
    in_width=48,
    embed_width=64,
    out_width=40,
    mlp_width=56,
    head_dim=32,
    block_head_dim=16,
    rank=4,
    level_count=2,
)


class PaperDelta:
    """weights: {torch name: array}; every method takes and returns [n, side, side, channels]."""

    def __init__(self, weights, cfg):
        self.w = {name: value.astype(np.float64) for name, value in weights.items()}
        self.grid, self.window = cfg.grid, cfg.window
        self.head_dim, self.block_head_dim, self.reduction = cfg.head_dim, cfg.block_head_dim, cfg.reduction

    def __call__(self, last, levels, side):
        """Equations 3 to 11: tokens [n, side * side, d]."""
        as_grid = lambda x: x.astype(np.float64).reshape(len(x), self.grid, self.grid, -1)
        q, levels = resize(as_grid(last), side, linear_kernel), as_grid(levels)
        q = q + self.convolutional("refine.mhca", q)
        if "refine.e_mhsa.q.weight" in self.w:
            q = q + self.self_attention("refine.e_mhsa", q)
        table = position_table(self.grid, q.shape[-1])[None]
        q = q + resize(table, side, cubic_kernel)
        q, k, v = (self.delta(f"{name}_proj_1", x) for name, x in (("q", q), ("k", levels), ("v", levels)))
        if "combined_block.ntb.mlp.conv1.weight" in self.w:
            q = self.block(q)
        t = self.linear("head", self.windows(q, k, v))
        t = t + self.linear("ffn.2", exact_gelu(self.linear("ffn.0", self.norm("ffn.norm", t, 1e-6))))
        return t.reshape(len(t), side * side, -1)

    def linear(self, name, x):
        """A linear layer or a 1x1 convolution, with a bias where the weights have one."""
        weight = self.w[f"{name}.weight"]
        return x @ weight.reshape(weight.shape[:2]).T + self.w.get(f"{name}.bias", 0.0)

    def norm(self, name, x, eps=1e-5):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * self.w[f"{name}.weight"] + self.w[f"{name}.bias"]

    def delta(self, name, x):
        """Equations 4 and 8: W_s + (U V)^T, linear."""
        weight = self.w[f"{name}.shared_weight.weight"]
        if f"{name}.U" in self.w:
            weight = weight + (self.w[f"{name}.U"] @ self.w[f"{name}.V"]).T
        return x @ weight.T

    def convolutional(self, name, x):
        """MHCA: depthwise 3x3 with a border of zeros, LayerNorm, ReLU, 1x1."""
        kernel = self.w[f"{name}.group_conv3x3.weight"]  # [C, 1, 3, 3]
        assert kernel.shape == (x.shape[-1], 1, 3, 3)
        side, out = x.shape[1], np.zeros_like(x)
        for i, j, a, b in np.ndindex(side, side, 3, 3):
            row, column = i + a - 1, j + b - 1
            if 0 <= row < side and 0 <= column < side:
                out[:, i, j] += x[:, row, column] * kernel[:, 0, a, b]
        return self.linear(f"{name}.projection", np.maximum(self.norm(f"{name}.norm", out), 0))

    def self_attention(self, name, x):
        """EMHSA over all tokens, its own norm first, keys and values averaged over reduction^2 tokens in a row."""
        tokens = self.norm(f"{name}.norm", x).reshape(len(x), -1, x.shape[-1])
        r = self.reduction**2
        pooled = np.stack([tokens[:, i * r : i * r + r].mean(1) for i in range(tokens.shape[1] // r)], axis=1)
        q, k, v = (self.linear(f"{name}.{p}", t) for p, t in (("q", tokens), ("k", pooled), ("v", pooled)))
        return self.linear(f"{name}.proj", attend(q, k, v, self.block_head_dim)).reshape(x.shape)

    def block(self, x):
        """NTB, equation 6."""
        name = "combined_block.ntb"
        x = self.linear(f"{name}.patch_embed.conv", x)
        if f"{name}.e_mhsa.q.weight" in self.w:
            x = x + self.self_attention(f"{name}.e_mhsa", x)
        y = self.linear(f"{name}.projection.conv", x)
        y = y + self.convolutional(f"{name}.mhca", y)
        x = np.concatenate([x, y], axis=-1)
        return x + self.linear(f"{name}.mlp.conv2", np.maximum(self.linear(f"{name}.mlp.conv1", x), 0))

    def windows(self, q, k, v):
        """Equations 9 and 10: a window of queries and the patches below it, nothing projected again."""
        out, n, width = np.zeros_like(q), len(q), q.shape[-1]
        w, region = self.window, self.window * self.grid // q.shape[1]
        for i, j in np.ndindex(q.shape[1] // w, q.shape[2] // w):
            queries = np.s_[:, i * w : (i + 1) * w, j * w : (j + 1) * w]
            patches = np.s_[:, i * region : (i + 1) * region, j * region : (j + 1) * region]
            flat = [x.reshape(n, -1, width) for x in (q[queries], k[patches], v[patches])]
            out[queries] = attend(*flat, self.head_dim).reshape(n, w, w, width)
        return out


def attend(q, k, v, head_dim):
    """Scaled dot-product attention of [n, tokens, channels], head by head."""
    out = np.zeros_like(q)
    for start in range(0, q.shape[-1], head_dim):
        head = np.s_[:, :, start : start + head_dim]
        scores = np.exp(q[head] @ k[head].swapaxes(1, 2) / np.sqrt(head_dim))
        out[head] = scores / scores.sum(-1, keepdims=True) @ v[head]
    return out


def exact_gelu(x):
    return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2


def linear_kernel(d):
    return max(0.0, 1 - abs(d))


def cubic_kernel(d, a=-0.75):
    d = abs(d)
    if d >= 2:
        return 0.0
    return (a + 2) * d**3 - (a + 3) * d**2 + 1 if d <= 1 else a * (d**3 - 5 * d**2 + 8 * d - 4)


def resize(x, side, kernel):
    """Interpolation between pixel centres, the border pixels repeated outwards, no antialiasing."""
    grid = x.shape[1]
    weights = np.zeros((side, grid))
    for o in range(side):
        centre = (o + 0.5) * grid / side - 0.5
        for i in range(-2, grid + 2):
            weights[o, min(max(i, 0), grid - 1)] += kernel(centre - i)
    return np.einsum("oi,niwc,pw->nopc", weights, x, weights)


def position_table(grid, width):
    """[grid, grid, width]: sines and cosines of the column, then of the row; wavelengths from 2 pi to 10000."""
    quarter = width // 4
    table = np.zeros((grid, grid, width))
    for row, column, i in np.ndindex(grid, grid, quarter):
        frequency = 10000.0 ** (-i / quarter)
        for half, place in ((0, column), (2, row)):
            table[row, column, half * quarter + i] = math.sin(place * frequency)
            table[row, column, (half + 1) * quarter + i] = math.cos(place * frequency)
    return table


@pytest.mark.parametrize(
    "settings",
    [
        dict(grid=8, scale_factor=2, window=1),
        dict(grid=8, scale_factor=4, window=2),
        dict(grid=12, scale_factor=2, window=2),
        dict(grid=12, scale_factor=4, window=1, reduction=2),  # 9 tokens in two groups of 4, one left over
        dict(grid=8, scale_factor=2, window=2, ablation="no_emhsa"),
        dict(grid=8, scale_factor=2, window=2, ablation="no_delta"),
        dict(grid=8, scale_factor=2, window=2, ablation="no_tb"),
    ],
    ids=lambda settings: ",".join(f"{key}={value}" for key, value in settings.items()),
)
def test_paper_variant_equals_the_float64_reference(settings):
    cfg = system_config(**SMALL, **settings)
    weights, features = golden.projector_state(cfg), golden.features(cfg)
    params = systems.from_torch(weights, cfg)
    found = jax.jit(lambda params, features: systems.project(params, cfg, features))(params, features)
    side = cfg.grid // cfg.scale_factor
    expected = PaperDelta(weights, cfg)(features.last, features.levels, side)
    assert found.shape == (2, side * side, cfg.out_width)
    np.testing.assert_allclose(found, expected, atol=2e-5)
    assert expected.std() > 0.1

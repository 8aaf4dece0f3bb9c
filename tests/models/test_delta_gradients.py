"""Gradients of the Delta projector (release) against a PyTorch version written from its description."""

import jax
import numpy as np
import pytest

from deltallava_jax.config import system_config
from deltallava_jax.models import systems
from deltallava_jax.models.vision import VisionFeatures
from tests import golden

torch = pytest.importorskip("torch")
F = torch.nn.functional


class TorchDelta(torch.nn.Module):
    """The release in float64; w: {torch name: tensor}. Its grids are [n, channels, side, side]."""

    def __init__(self, w, cfg):
        super().__init__()
        self.w, self.cfg = w, cfg

    def forward(self, last, levels):
        cfg, w = self.cfg, self.w
        n, grid, s = len(last), cfg.grid, cfg.scale_factor
        side = grid // s

        q = last.transpose(1, 2).reshape(n, -1, grid, grid)
        q = self.block(F.interpolate(q, size=(side, side), mode="bilinear", align_corners=False))
        table = position_table(grid, cfg.width)
        q = q + F.interpolate(table, size=(side, side), mode="bicubic", align_corners=False)
        q = self.delta("q_proj_1", q.flatten(2).transpose(1, 2))
        k, v = self.delta("k_proj_1", levels), self.delta("v_proj_1", levels)

        # Every query becomes a sequence of one, its s x s cell a sequence of s^2.
        cells = lambda x: x.reshape(n, side, s, side, s, -1).transpose(2, 3).reshape(n * side * side, s * s, -1)
        q, k, v = q.reshape(n * side * side, 1, -1), cells(k), cells(v)
        weights, biases = w["clip_attn.in_proj_weight"].chunk(3), w["clip_attn.in_proj_bias"].chunk(3)
        y = attend(*(F.linear(x, a, b) for x, a, b in zip((q, k, v), weights, biases, strict=True)), cfg.head_dim)
        y = self.linear("clip_attn.out_proj", y).reshape(n, side * side, -1)
        return self.linear("mlp.2", F.gelu(self.linear("mlp.0", y)))

    def linear(self, name, x):
        return F.linear(x, self.w[f"{name}.weight"], self.w[f"{name}.bias"])

    def conv(self, name, x, **options):
        return F.conv2d(x, self.w[f"{name}.weight"], self.w.get(f"{name}.bias"), **options)

    def norm(self, name, x, eps=1e-5):
        return F.layer_norm(x, x.shape[-1:], self.w[f"{name}.weight"], self.w[f"{name}.bias"], eps)

    def delta(self, name, x):
        weight = self.w[f"{name}.shared_weight.weight"] + (self.w[f"{name}.U"] @ self.w[f"{name}.V"]).T
        return self.norm(f"{name}.norm", F.gelu(F.linear(x, weight)), 1e-6)

    def block(self, x):
        name = "combined_block.ntb"
        x = self.conv(f"{name}.patch_embed.conv", x)
        tokens = self.norm(f"{name}.norm_mhsa", x.flatten(2).transpose(1, 2))
        x = x + self.self_attention(f"{name}.e_mhsa", tokens).transpose(1, 2).reshape(x.shape)
        y = self.conv(f"{name}.projection.conv", x)
        z = self.conv(f"{name}.mhca.group_conv3x3", y, padding=1, groups=y.shape[1] // self.cfg.block_head_dim)
        z = self.norm(f"{name}.mhca.norm", z.movedim(1, -1)).movedim(-1, 1)
        y = y + self.conv(f"{name}.mhca.projection", z.relu())
        x = torch.cat([x, y], dim=1)
        return x + self.conv(f"{name}.mlp.conv2", self.conv(f"{name}.mlp.conv1", x).relu())

    def self_attention(self, name, x):
        x = self.norm(f"{name}.norm", x)
        pooled = F.avg_pool1d(x.transpose(1, 2), self.cfg.reduction**2).transpose(1, 2)
        qkv = [self.linear(f"{name}.{p}", t) for p, t in (("q", x), ("k", pooled), ("v", pooled))]
        return self.linear(f"{name}.proj", attend(*qkv, self.cfg.block_head_dim))


def attend(q, k, v, head_dim):
    split = lambda x: x.unflatten(-1, (-1, head_dim)).transpose(1, 2)
    return F.scaled_dot_product_attention(split(q), split(k), split(v)).transpose(1, 2).flatten(2)


def position_table(grid, width):
    """[1, width, grid, grid]: sines, then cosines of the column; the same of the row."""
    frequencies = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.outer(frequencies, torch.arange(grid, dtype=torch.float64))
    axis = torch.cat([angles.sin(), angles.cos()])
    columns = axis[:, None, :].expand(-1, grid, -1)
    rows = axis[:, :, None].expand(-1, -1, grid)
    return torch.cat([columns, rows])[None]


NO_GRADIENT = ("combined_block.ntb.e_mhsa.k.bias", "k_proj_1.norm.bias")


@pytest.mark.parametrize(
    "settings",
    [
        dict(grid=8, scale_factor=4),
        dict(grid=9, scale_factor=3, reduction=2),  # 9 tokens: two groups of 4, one left over
    ],
    ids=lambda settings: ",".join(f"{key}={value}" for key, value in settings.items()),
)
def test_gradients_equal_torch(settings):
    cfg = system_config(
        in_width=64, out_width=24, head_dim=32, block_head_dim=16, rank=4, level_count=2, drop_path=0.3, **settings
    )
    weights, features = golden.projector_state(cfg), golden.features(cfg)
    cotangent = golden.inputs("cotangent", (2, (cfg.grid // cfg.scale_factor) ** 2, cfg.out_width))

    leaf = lambda x: torch.tensor(x, dtype=torch.float64, requires_grad=True)
    tensors = {name: leaf(value) for name, value in weights.items()}
    tensors |= {"last": leaf(features.last), "levels": leaf(features.levels)}
    y = TorchDelta(tensors, cfg)(tensors["last"], tensors["levels"])
    (y * torch.tensor(cotangent)).sum().backward()

    def loss(params, last, levels):
        found = systems.project(params, cfg, VisionFeatures(last, levels, grid=features.grid))
        return (found * cotangent).sum(), found

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))
    params = systems.from_torch(weights, cfg)
    (d_params, d_last, d_levels), found = gradient(params, features.last, features.levels)
    np.testing.assert_allclose(found, y.detach(), atol=1e-5)

    gradients = systems.to_torch(d_params, cfg) | {"last": d_last, "levels": d_levels}
    assert gradients.keys() == tensors.keys()
    for name, value in gradients.items():
        np.testing.assert_allclose(value, tensors[name].grad, rtol=1e-3, atol=1e-4, err_msg=name)
        # What adds the same to every key shifts all scores of a query alike: no gradient. All else has one.
        assert name in NO_GRADIENT or np.abs(value).max() > 1e-2, name

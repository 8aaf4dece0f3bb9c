"""Honeybee's D-Abstractor in PyTorch. Exported by deltallava_jax; tensor names are the public release's."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from .projector_parts import as_grid, as_tokens, scale_factor

POINTS = 4


class SelfAttention(nn.Module):
    def __init__(self, width, head_dim):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))
        self.head_dim = head_dim

    def forward(self, x, positions):
        heads = lambda t: t.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        q, k, v = self.q_proj(x + positions), self.k_proj(x + positions), self.v_proj(x)
        y = F.scaled_dot_product_attention(heads(q), heads(k), heads(v))
        return self.out_proj(y.transpose(1, 2).flatten(2))


class DeformableAttention(nn.Module):
    """Weighted bilinear samples around each query's point; zero outside the image."""

    def __init__(self, width, head_dim):
        super().__init__()
        self.heads = width // head_dim
        self.sampling_offsets = nn.Linear(width, self.heads * POINTS * 2)
        self.attention_weights = nn.Linear(width, self.heads * POINTS)
        self.value_proj, self.output_proj = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, q, image, grid, points):
        n, tokens, width = q.shape
        values = as_grid(self.value_proj(image), grid).reshape(n * self.heads, -1, grid, grid)
        offsets = self.sampling_offsets(q).reshape(n, tokens, self.heads, POINTS, 2) / grid
        weights = self.attention_weights(q).reshape(n, tokens, self.heads, POINTS).softmax(-1)
        places = 2 * (points[None, :, None, None] + offsets) - 1
        places = places.transpose(1, 2).reshape(n * self.heads, tokens, POINTS, 2)
        found = F.grid_sample(values, places.to(values.dtype), padding_mode="zeros", align_corners=False)
        found = found.reshape(n, self.heads, -1, tokens, POINTS)
        return self.output_proj(torch.einsum("nhdtp,nthp->nthd", found, weights).reshape(n, tokens, width))


class Layer(nn.Module):
    def __init__(self, width, head_dim, inner):
        super().__init__()
        self.self_attn, self.encoder_attn = SelfAttention(width, head_dim), DeformableAttention(width, head_dim)
        self.fc1, self.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)
        self.self_attn_layer_norm, self.encoder_attn_layer_norm, self.final_layer_norm = (
            nn.LayerNorm(width) for _ in range(3)
        )

    def forward(self, x, positions, image, grid, points):
        x = self.self_attn_layer_norm(x + self.self_attn(x, positions))
        x = self.encoder_attn_layer_norm(x + self.encoder_attn(x + positions, image, grid, points))
        return self.final_layer_norm(x + self.fc2(F.relu(self.fc1(x))))


class Projector(nn.Module):
    def __init__(self, p):
        super().__init__()
        self.p = p
        c, tokens = p["in_width"], (p["grid"] // scale_factor(p)) ** 2
        self.reference_points = nn.Parameter(torch.zeros(1, tokens, 2), requires_grad=False)
        self.v_pos_emb = nn.Parameter(torch.zeros(1, p["grid"] ** 2, c))
        self.layers = nn.ModuleList(Layer(c, p["head_dim"], p["mlp_width"]) for _ in range(p["depth"] or 6))
        self.query_position_embeddings = nn.Embedding(tokens, c)
        self.output_proj = nn.Linear(c, p["out_width"])

    def forward(self, features, budget):
        image, grid = features.last + self.v_pos_emb, self.p["grid"]
        positions = as_tokens(F.adaptive_avg_pool2d(as_grid(image, grid), math.isqrt(budget)))
        x = self.query_position_embeddings.weight.expand(len(image), -1, -1)
        for layer in self.layers:
            x = layer(x, positions, image, grid, self.reference_points[0])
        return self.output_proj(x)

"""Delta-LLaVA in PyTorch, for transformers. Exported by deltallava_jax; needs torch and transformers alone.

The projector (DeltaProjector) has the tensor names of the public release, mzamini92/Delta-LLaVA, and its numbers;
"paper" is the form of the paper's equations. Written from their description, not from their code."""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

from .configuration_deltallava import DeltaLlavaConfig


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


class DeltaProjector(nn.Module):
    """[n, N, C] and [n, N, L C] features of the tower -> [n, budget, d] visual tokens; any budget, the same weights."""

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

    def forward(self, last, levels, budget):
        grid, side = self.p["grid"], math.isqrt(budget)
        if side * side != budget or grid % side:
            allowed = ", ".join(str((grid // s) ** 2) for s in range(1, grid + 1) if grid % s == 0)
            raise ValueError(f"budget {budget}; a {grid}x{grid} grid gives {allowed} tokens an image")
        q = last.transpose(1, 2).unflatten(2, (grid, grid))
        q = F.interpolate(q.float(), (side, side), mode="bilinear", align_corners=False).to(last.dtype)
        k, v = self.k_proj_1(levels), self.v_proj_1(levels)
        return self._release(q, k, v, side) if self.release else self._paper(q, k, v, side)

    def _release(self, q, k, v, side):
        if self.combined_block is not None:
            q = self.combined_block["ntb"](q)
        q = self.q_proj_1(q.flatten(2).transpose(1, 2) + self._positions(side, q))
        k, v = (self._windows(x, side) for x in (k, v))
        y, _ = self.clip_attn(q.reshape(-1, 1, q.shape[-1]), k, v, need_weights=False)
        return self.mlp(y.reshape(q.shape[0], side * side, -1))

    def _paper(self, q, k, v, side):
        q = q + self.refine["mhca"](q)
        if "e_mhsa" in self.refine:
            q = q + self.refine["e_mhsa"](q)
        q = self.q_proj_1(q.flatten(2).transpose(1, 2) + self._positions(side, q))
        if self.combined_block is not None:
            q = q.transpose(1, 2).unflatten(2, (side, side))
            q = self.combined_block["ntb"](q).flatten(2).transpose(1, 2)
        windows = side // self.p["window"]
        heads = lambda t: t.unflatten(-1, (-1, self.p["head_dim"])).transpose(1, 2)
        q, k, v = (heads(self._windows(x, windows)) for x in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        y = self._whole(y, windows)
        y = self.head(y)
        return y + self.ffn["2"](F.gelu(self.ffn["0"](self.ffn["norm"](y))))

    def _positions(self, side, like):
        """The fixed sine-cosine table of the patch grid, resized to the query grid."""
        grid, width = self.p["grid"], like.shape[1]
        frequencies = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width / 4))
        angles = torch.arange(grid, dtype=torch.float64)[:, None] * frequencies
        axis = torch.cat([angles.sin(), angles.cos()], dim=1)
        table = torch.cat([axis[None].expand(grid, -1, -1), axis[:, None].expand(-1, grid, -1)], dim=-1)
        table = table.float().to(like.device).permute(2, 0, 1)[None]
        table = F.interpolate(table, (side, side), mode="bicubic", align_corners=False)
        return table.flatten(2).transpose(1, 2).to(like.dtype)

    @staticmethod
    def _windows(x, count):
        """[n, g g, C] -> [n count count, w w, C]: the cells of a count x count grid, row by row."""
        n, tokens, c = x.shape
        w = math.isqrt(tokens) // count
        return x.reshape(n, count, w, count, w, c).transpose(2, 3).reshape(n * count * count, w * w, c)

    @staticmethod
    def _whole(x, count):
        """The inverse of _windows."""
        cells, tokens, c = x.shape
        n, w = cells // (count * count), math.isqrt(tokens)
        return x.reshape(n, count, count, w, w, c).transpose(2, 3).reshape(n, count * count * w * w, c)


class DeltaLlavaForConditionalGeneration(PreTrainedModel):
    """input_ids hold one image token for each image of pixel_values; ``budget`` is the visual tokens it opens into."""

    config_class = DeltaLlavaConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    _supports_sdpa = True
    _no_split_modules = ["CLIPEncoderLayer", "SiglipEncoderLayer", "LlamaDecoderLayer", "Qwen2DecoderLayer"]

    def __init__(self, config):
        super().__init__(config)
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.multi_modal_projector = DeltaProjector(config.deltallava_projector)
        self.language_model = AutoModelForCausalLM.from_config(config.text_config)
        self.post_init()

    def get_input_embeddings(self):
        return self.language_model.get_input_embeddings()

    def get_output_embeddings(self):
        return self.language_model.get_output_embeddings()

    def tie_weights(self, *args, **kwargs):
        return self.language_model.tie_weights(*args, **kwargs)

    def get_image_features(self, pixel_values, budget=None):
        """[n, 3, H, W] normalised pixels -> [n, budget, d] visual tokens."""
        select = self.config.select
        states = self.vision_tower(pixel_values.to(self.dtype), output_hidden_states=True).hidden_states
        first = 1 if select["drop_cls"] else 0
        levels = torch.cat([states[i][:, first:] for i in select["levels"]], dim=-1)
        return self.multi_modal_projector(states[select["last"]][:, first:], levels, budget or self.config.budgets[0])

    def _open(self, input_ids, pixel_values, attention_mask, labels, budget, left):
        """(embeddings, attention mask, labels) of the rows with every image token opened, padded on one side."""
        embeddings = self.get_input_embeddings()(input_ids)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if pixel_values is None:
            return embeddings, attention_mask, labels
        visual = self.get_image_features(pixel_values, budget).to(embeddings.dtype)
        places = (input_ids == self.config.image_token_index) & attention_mask.bool()
        if int(places.sum()) != len(visual):
            raise ValueError(f"{int(places.sum())} image tokens in input_ids, but {len(visual)} images")
        image, rows = 0, []
        for row in range(len(input_ids)):
            live = attention_mask[row].bool()
            x, y = embeddings[row][live], None if labels is None else labels[row][live]
            parts, marks, start = [], [], 0
            for place in places[row][live].nonzero().flatten().tolist():
                parts += [x[start:place], visual[image]]
                if y is not None:
                    marks += [y[start:place], y.new_full((len(visual[image]),), -100)]
                start, image = place + 1, image + 1
            rows.append((torch.cat([*parts, x[start:]]), None if y is None else torch.cat([*marks, y[start:]])))
        length = max(len(x) for x, _ in rows)
        pads = [(length - len(x), 0) if left else (0, length - len(x)) for x, _ in rows]
        embeddings = torch.stack([F.pad(x, (0, 0, *pad)) for (x, _), pad in zip(rows, pads)])
        mask = torch.stack([F.pad(attention_mask.new_ones(len(x)), pad) for (x, _), pad in zip(rows, pads)])
        if labels is not None:
            labels = torch.stack([F.pad(y, pad, value=-100) for (_, y), pad in zip(rows, pads)])
        return embeddings, mask, labels

    def forward(
        self,
        input_ids=None,
        pixel_values=None,
        attention_mask=None,
        labels=None,
        budget=None,
        inputs_embeds=None,
        **kwargs,
    ):
        """Logits over the opened rows (and the loss with ``labels``), padded on the right."""
        if inputs_embeds is None:
            inputs_embeds, attention_mask, labels = self._open(
                input_ids, pixel_values, attention_mask, labels, budget, left=False
            )
        return self.language_model(inputs_embeds=inputs_embeds, attention_mask=attention_mask, labels=labels, **kwargs)

    @torch.no_grad()
    def generate(self, input_ids=None, pixel_values=None, attention_mask=None, budget=None, **kwargs):
        """The new tokens alone; keyword arguments as of transformers' generate."""
        embeddings, mask, _ = self._open(input_ids, pixel_values, attention_mask, None, budget, left=True)
        return self.language_model.generate(inputs_embeds=embeddings, attention_mask=mask, **kwargs)

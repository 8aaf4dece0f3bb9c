"""PruMerge and PruMerge+ in PyTorch, on LLaVA's MLP. Exported by deltallava_jax.

Patches that the CLS token attends to most are kept and merged with similar ones; the rest becomes one token."""

import torch
import torch.nn.functional as F

from .projector_parts import Mlp

NEIGHBOURS = 32


class Projector(Mlp):
    """Features -> ([n, budget, d] visual tokens, [n, budget] valid mask)."""

    def __init__(self, p):
        super().__init__(p)
        self.p, self.plus = p, p["name"] == "prumerge_plus"
        self.ratio = 0.125 if p["keep_ratio"] is None else p["keep_ratio"]

    def forward(self, features, budget):
        orders, counts = zip(*map(self.select, features.cls_attention), strict=True)
        count = torch.tensor(counts, device=features.last.device).clamp(max=budget - 1)
        tokens, valid = merge(features, torch.stack(orders), count, budget - 1)
        return super().forward(tokens), valid

    def select(self, attention):
        """[N] -> ([N] patch indices, the kept ones first, and their number).

        By descending attention, then, with ``plus``, evenly spaced patches in raster order. With
        reproduce_duplicates, those that are already kept occur twice, as in the original code, and as many of the
        others with the lowest indices are dropped."""
        places, ratio = torch.arange(len(attention), device=attention.device), self.ratio
        if ratio:
            count = int(len(places) * ratio)
        else:
            low, high = attention.quantile(attention.new_tensor([0.25, 0.75]))
            count = int((attention > high + 1.5 * (high - low)).sum())
        kept = attention.argsort(descending=True, stable=True)[:count]
        if self.plus:
            step = int(1 / ratio) if ratio else max(len(places) // max(count, 1) // 3, 1)
            comb = places[step // 2 if ratio else 0 : -1 : step]
            if not (ratio and self.p["reproduce_duplicates"]):
                comb = comb[~torch.isin(comb, kept)]
            kept = torch.cat([kept, comb])
        others = places[~torch.isin(places, kept)]
        vanished = len(kept) + len(others) - len(places)
        return torch.cat([kept, others[vanished:]]), len(kept)


def merge(features, order, count, cap):
    """(tokens [n, cap + 1, C], valid [n, cap + 1]): the first ``count`` patches of ``order``, and one token of the
    others. To a kept token its nearest by cosine of the keys are added, weighted by attention, not normalised."""
    places = torch.arange(order.shape[1], device=order.device)
    rows = torch.arange(len(order), device=order.device)[:, None]
    x, weights, keys = features.last[rows, order], features.cls_attention[rows, order], features.keys[rows, order]
    keys = F.normalize(keys.float(), dim=-1)
    likeness = keys[:, :cap] @ keys.transpose(1, 2)
    likeness.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
    nearest = likeness.topk(min(NEIGHBOURS, len(places) - 1)).indices
    share = torch.zeros_like(likeness).scatter(2, nearest, 1.0) * weights[:, None]
    kept = x[:, :cap] + share.to(x.dtype) @ x
    dropped = weights.where(places >= count[:, None], 0.0).to(x.dtype)
    valid = places[: cap + 1] < count[:, None]
    valid[:, cap] = True
    return torch.cat([kept, dropped[:, None] @ x], dim=1), valid

"""PruMerge and PruMerge+ (42Shawn/LLaVA-PruMerge, clip_encoder.py): keep what the CLS token attends to, merge the rest.

It keeps keep_ratio of the patches, or, with keep_ratio 0, those with outlying attention in the image, up to a cap
(projector.tokens); the valid mask marks how many. The plus variant adds an even comb of positions. LLaVA's MLP follows,
with its weights: any LLaVA-1.5 projector."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from deltallava_jax.arrays import Array
from deltallava_jax.config import ProjectorConfig
from deltallava_jax.config.checks import require
from deltallava_jax.errors import ConfigError
from deltallava_jax.models.systems.base import Places, last_layer
from deltallava_jax.models.systems.mlp import PatchMlp
from deltallava_jax.models.vision import Needs, VisionFeatures

NEIGHBOURS = 32


def outliers(attention: Float[Array, "n N"]) -> Int[Array, " n"]:
    """Patches of each image above the third quartile by more than 1.5 interquartile ranges."""
    low, high = jnp.percentile(attention, jnp.array([25.0, 75.0]), axis=1)
    return (attention > (high + 1.5 * (high - low))[:, None]).sum(1)


def candidates(
    attention: Float[Array, "n N"], ratio: float, *, plus: bool = False, duplicates: bool = False
) -> tuple[Int[Array, "n N"], Int[Array, " n"]]:
    """(positions, count): every position once, the ``count`` kept ones first, in the original's order.

    By descending attention, then, with ``plus``, the comb's in reading order. ratio 0: adaptive. duplicates: as in the
    original with a fixed ratio, comb positions that are kept already come twice, and as many of the smallest positions
    are lost."""
    n, N = attention.shape
    by_attention = jnp.argsort(-attention, axis=1, stable=True)
    rank = jnp.argsort(by_attention, axis=1)
    count = jnp.full(n, int(N * ratio)) if ratio else outliers(attention)
    key = jnp.where(rank < count[:, None], rank, 2 * N + jnp.arange(N))
    if plus:
        places = jnp.arange(N)
        if ratio:
            step = int(1 / ratio)
            comb = jnp.broadcast_to((places >= step // 2) & ((places - step // 2) % step == 0), (n, N))
        else:
            step = jnp.maximum(N // jnp.maximum(count, 1) // 3, 1)  # the original fails where this is 0
            comb = places % step[:, None] == 0
        comb &= places < N - 1
        if duplicates and ratio:
            teeth = jnp.arange(step // 2, N - 1, step)
            kept = jnp.concatenate(
                [by_attention[:, : int(N * ratio)], jnp.broadcast_to(teeth, (n, len(teeth)))], axis=1
            )
            rest = jnp.sort(jnp.where((key < N) | comb, -1, places), axis=1)[:, kept.shape[1] :]
            return jnp.concatenate([kept, rest], axis=1), jnp.full(n, kept.shape[1])
        key = jnp.where(comb & (key >= N), N + places, key)
    return jnp.argsort(key, axis=1), (key < 2 * N).sum(1)


def merge(
    features: Float[Array, "n N C"],
    attention: Float[Array, "n N"],
    keys: Float[Array, "n N K"],
    positions: Int[Array, "n N"],
    count: Int[Array, " n"],
    cap: int,
) -> tuple[Float[Array, "n M C"], Bool[Array, "n M"]]:
    """(tokens, valid) with M = cap + 1: the first ``count`` positions, at most cap, and one token of the others.

    A kept token adds its 32 nearest by cosine of the keys, weighted by attention, not normalised."""
    take = lambda x: jnp.take_along_axis(x, positions.reshape(*positions.shape, *(1,) * (x.ndim - 2)), axis=1)
    x, weights, keys = take(features), take(attention), take(keys.astype(jnp.float32))
    N, count = x.shape[1], jnp.minimum(count, cap)
    keys /= jnp.linalg.norm(keys, axis=-1, keepdims=True)
    likeness = jnp.einsum("nmk,njk->nmj", keys[:, :cap], keys)
    likeness = jnp.where(jnp.eye(cap, N, dtype=bool), -jnp.inf, likeness)
    nearest = jax.lax.top_k(likeness, min(NEIGHBOURS, N - 1))[1]
    share = jnp.put_along_axis(jnp.zeros_like(likeness), nearest, 1.0, axis=-1, inplace=False)
    share = (share * weights[:, None]).astype(x.dtype)
    merged = x[:, :cap] + jnp.einsum("nmj,njc->nmc", share, x)
    dropped = jnp.where(jnp.arange(N) >= count[:, None], weights, 0.0).astype(x.dtype)
    rest = jnp.einsum("nj,njc->nc", dropped, x)[:, None]
    valid = jnp.pad(jnp.arange(cap) < count[:, None], ((0, 0), (0, 1)), constant_values=True)
    return jnp.concatenate([merged, rest], axis=1), valid


@dataclass(frozen=True)
class PruMergeConfig(ProjectorConfig):
    name: str = "prumerge"
    keep_ratio: float = 0.125  # share of the patches that are kept; 0: by outliers of each image
    tokens: tuple[int, ...] = ()  # with keep_ratio 0, one number: the most tokens of an image; empty: a quarter and one

    def __post_init__(self):
        super().__post_init__()
        require(0 <= self.keep_ratio <= 1, f"projector.keep_ratio={self.keep_ratio}; expected 0 to 1")
        require(min(self.tokens, default=1) >= 1, f"projector.tokens={self.tokens}; expected 1 or more")


@dataclass(frozen=True)
class PruMergePlusConfig(PruMergeConfig):
    name: str = "prumerge_plus"
    reproduce_duplicates: bool = False  # the original's doubled and lost positions


class PruMerge(PatchMlp):
    Config = PruMergeConfig
    torch_code = "projector_prumerge.py"
    plus = False

    def __call__(self, features: VisionFeatures, text, budget: int, key: Array | None):
        positions, count = self._candidates(features)
        tokens, valid = merge(features.last, features.cls_attention, features.keys, positions, count, budget - 1)
        return self.project(tokens), valid

    def _candidates(self, features: VisionFeatures) -> tuple[Int[Array, "n N"], Int[Array, " n"]]:
        return candidates(features.cls_attention, self.cfg.keep_ratio)

    def places(self, features: VisionFeatures, budget: int) -> Places:
        kept = self._candidates(features)[0][:, : budget - 1]
        return Places(jnp.pad(kept, ((0, 0), (0, 1)), constant_values=self.cfg.grid**2), self.cfg.grid)

    @classmethod
    def budgets(cls, cfg: PruMergeConfig) -> tuple[int, ...]:
        patches = cfg.grid**2
        cap = cfg.tokens[0] - 1 if cfg.tokens else patches // 4
        if ratio := cfg.keep_ratio:
            step = int(1 / ratio)
            cap = int(patches * ratio) + (len(range(step // 2, patches - 1, step)) if cls.plus else 0)
        if not 1 <= cap < patches or len(cfg.tokens) > 1:
            given = f"projector.tokens={cfg.tokens}, projector.keep_ratio={cfg.keep_ratio}"
            raise ConfigError(f"{given}; {cfg.name} keeps 1 to {patches - 1} patches and makes one token of the rest")
        return (cap + 1,)

    @staticmethod
    def at(cfg: PruMergeConfig, budget: int) -> PruMergeConfig:
        return dataclasses.replace(cfg, tokens=(budget,), keep_ratio=0.0)  # by outliers, at most that many

    @staticmethod
    def needs(cfg: PruMergeConfig, layers: int) -> Needs:
        last = last_layer(cfg, layers)
        if last == layers:
            raise ConfigError(
                "projector.select_layer=-1; PruMerge needs queries and keys of the layer after it; choose -2 or lower"
            )
        return Needs(last=last, cls_attention=(last + 1, "one_head"), keys=last + 1)


class PruMergePlus(PruMerge):
    Config = PruMergePlusConfig
    plus = True

    def _candidates(self, features: VisionFeatures) -> tuple[Int[Array, "n N"], Int[Array, " n"]]:
        cfg = self.cfg
        return candidates(features.cls_attention, cfg.keep_ratio, plus=True, duplicates=cfg.reproduce_duplicates)

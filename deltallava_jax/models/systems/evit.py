"""EViT (youweiliang/evit, evit.py): the tower goes on with the patches that its CLS token looks at.

In some layers, between attention and MLP, ceil(keep_ratio * N) patches with the most attention stay, in reading order;
the others become one token, weighted by their attention (``fuse``). What is left goes through LLaVA's MLP."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Float

from deltallava_jax.arrays import Array
from deltallava_jax.config import ProjectorConfig
from deltallava_jax.config.checks import require
from deltallava_jax.errors import ConfigError
from deltallava_jax.models.systems.base import Places, last_layer
from deltallava_jax.models.systems.fastervlm import select
from deltallava_jax.models.systems.mlp import PatchMlp
from deltallava_jax.models.vision import Needs, PruningStep, VisionFeatures


@dataclass(frozen=True)
class PrunedConfig(ProjectorConfig):
    """Of systems that drop patches on the tower's way."""

    keep_ratio: float = 0.7  # share of the patches that each stage keeps, more than 0
    prune_layers: tuple[int, ...] = (6, 12, 18)  # the tower's layers, from 0, that drop patches: a stage each

    def __post_init__(self):
        super().__post_init__()
        require(
            0 < self.keep_ratio <= 1,
            f"projector.keep_ratio={self.keep_ratio}; {self.name} keeps more than 0, at most 1",
        )
        require(
            min(self.prune_layers, default=0) >= 0, f"projector.prune_layers={self.prune_layers}; expected 0 or more"
        )
        require(
            list(self.prune_layers) == sorted(set(self.prune_layers)),
            f"projector.prune_layers={self.prune_layers}; expected ascending layers, e.g. (6, 12, 18)",
        )


class Pruned(PatchMlp):
    """What leaves a pruned tower goes through the MLP."""

    @staticmethod
    def needs(cfg: PrunedConfig, layers: int) -> Needs:
        last = last_layer(cfg, layers)
        if not all(0 <= layer < last for layer in cfg.prune_layers):
            raise ConfigError(f"projector.prune_layers={cfg.prune_layers}; the tower is read after {last} layers")
        return Needs(last=last, pruned=cfg.prune_layers)

    @classmethod
    def at(cls, cfg: PrunedConfig, budget: int) -> PrunedConfig:
        """The keep_ratio with the fewest tokens that are ``budget`` or more: bisection, as the count grows with it."""
        low, high = 0.0, 1.0
        for _ in range(40):
            middle = (low + high) / 2
            try:
                (count,) = cls.budgets(dataclasses.replace(cfg, keep_ratio=middle))
            except ConfigError:  # no token is left
                count = 0
            low, high = (low, middle) if count >= budget else (middle, high)
        return dataclasses.replace(cfg, keep_ratio=high)

    def places(self, features: VisionFeatures, budget: int) -> Places:
        return Places(features.places, self.cfg.grid)


@dataclass(frozen=True)
class EvitConfig(PrunedConfig):
    name: str = "evit"
    fuse: bool = True  # the dropped patches become one token


class Evit(Pruned):
    Config = EvitConfig
    torch_code = "projector_evit.py"

    def __call__(self, features: VisionFeatures, text, budget: int, key: Array | None) -> Float[Array, "n V d"]:
        return self.project(features.last)

    def prune(self, stage: int, layer, x: Float[Array, "n N C"], kept: None, key: Array | None):
        """A layer of the tower with fewer tokens behind it (see vision.Prune)."""
        scores = layer.cls_attention(x, "head_mean")
        x = layer.attend(x)
        x, patches = x[:, :1], x[:, 1:]
        stay, before = None, patches.shape[1]
        count = math.ceil(self.cfg.keep_ratio * before)
        if count < before:
            stay = select(scores, count)
            chosen = jnp.take_along_axis(patches, stay[..., None], axis=1)
            if self.cfg.fuse:
                dropped = jnp.put_along_axis(scores, stay, 0.0, axis=1, inplace=False).astype(x.dtype)
                chosen = jnp.concatenate([chosen, jnp.einsum("nj,njc->nc", dropped, patches)[:, None]], axis=1)
                stay = jnp.pad(stay, ((0, 0), (0, 1)), constant_values=before)
            patches = chosen
        return layer.feed(jnp.concatenate([x, patches], axis=1)), PruningStep(stay)

    @staticmethod
    def budgets(cfg: EvitConfig) -> tuple[int, ...]:
        count = cfg.grid**2
        for _ in cfg.prune_layers:
            kept = math.ceil(cfg.keep_ratio * count)
            count = kept + (cfg.fuse and kept < count)
        return (count,)

"""EViT (youweiliang/evit, evit.py): the tower goes on with the patches that its CLS token looks at.

In some layers, between attention and MLP, ceil(keep_ratio * N) patches with the most attention stay, in reading order;
the others become one token, weighted by their attention (``fuse``). What is left goes through LLaVA's MLP."""

from __future__ import annotations

import math

import jax.numpy as jnp
from jaxtyping import Float

from deltallava_jax.arrays import Array
from deltallava_jax.config import ProjectorConfig
from deltallava_jax.errors import ConfigError
from deltallava_jax.models.projectors import common
from deltallava_jax.models.projectors.mlp import Mlp
from deltallava_jax.models.selection.fastervlm import select
from deltallava_jax.models.vision import Needs

KEEP_RATIO = 0.7


def keep_ratio(cfg: ProjectorConfig) -> float:
    """Share of the patches that a stage keeps."""
    return KEEP_RATIO if cfg.keep_ratio is None else cfg.keep_ratio


class Evit(Mlp):
    def prune(self, stage: int, layer, x: Float[Array, "n N C"], kept: None, key: Array | None):
        """A layer of the tower with fewer tokens behind it (see vision.Prune)."""
        scores, x = layer.cls_attention(x, "head_mean"), layer.attend(x)
        x, patches = x[:, :1], x[:, 1:]
        count = math.ceil(keep_ratio(self.cfg) * patches.shape[1])
        if count < patches.shape[1]:
            stay = select(scores, count)
            chosen = jnp.take_along_axis(patches, stay[..., None], axis=1)
            if self.cfg.fuse:
                dropped = jnp.put_along_axis(scores, stay, 0.0, axis=1, inplace=False).astype(x.dtype)
                chosen = jnp.concatenate([chosen, jnp.einsum("nj,njc->nc", dropped, patches)[:, None]], axis=1)
            patches = chosen
        return layer.feed(jnp.concatenate([x, patches], axis=1)), None, 0.0

    @staticmethod
    def budgets(cfg: ProjectorConfig) -> tuple[int, ...]:
        if not 0 < keep_ratio(cfg) <= 1:
            raise ConfigError(f"projector.keep_ratio={cfg.keep_ratio}; {cfg.name} keeps more than 0, at most 1")
        count = cfg.grid**2
        for _ in cfg.prune_layers:
            kept = math.ceil(keep_ratio(cfg) * count)
            count = kept + (cfg.fuse and kept < count)
        return (count,)

    @staticmethod
    def needs(cfg: ProjectorConfig, layers: int) -> Needs:
        last = common.last_layer(cfg, layers)
        if not all(0 <= layer < last for layer in cfg.prune_layers):
            raise ConfigError(f"projector.prune_layers={cfg.prune_layers}; the tower is read after {last} layers")
        return Needs(last=last, pruned=cfg.prune_layers)

    @staticmethod
    def infer(shapes: dict[str, tuple[int, ...]]) -> dict | None:
        return None  # its tensors are an MLP's: name it

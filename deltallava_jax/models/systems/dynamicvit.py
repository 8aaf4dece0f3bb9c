"""DynamicViT (raoyongming/DynamicViT, dyvit.py): small predictors in the tower choose which patches go on.

Before some layers a predictor scores the patches. While training each is kept or dropped by a straight-through Gumbel
sample; what is dropped is masked out of the tower's attention and of the decoder's row, and a penalty holds the share
that is kept near keep_ratio, its square, its cube; of more than the budget a random part goes to the decoder. Otherwise
the best int(N * share) go on. All in reading order, through LLaVA's MLP. The original's distillation from an unpruned
teacher is left out."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float

from deltallava_jax.arrays import Array
from deltallava_jax.config.checks import require_positive
from deltallava_jax.errors import ConfigError
from deltallava_jax.models.layers import LayerNorm, Linear, gelu, trunc_normal
from deltallava_jax.models.names import Entry, linear, norm
from deltallava_jax.models.systems.evit import Pruned, PrunedConfig
from deltallava_jax.models.systems.fastervlm import select
from deltallava_jax.models.vision import PruningStep, VisionFeatures

EPS = 1e-5
PENALTY = 2.0


@dataclass(frozen=True)
class DynamicVitConfig(PrunedConfig):
    name: str = "dynamicvit"
    initializer_range: float = 0.02  # standard deviation of the predictors' fresh weights; small widths want more

    def __post_init__(self):
        super().__post_init__()
        require_positive("projector", self, "initializer_range")


class Predictor(nnx.Module):
    """Each patch beside the mean of those still kept -> log-probabilities of (keep, drop)."""

    def __init__(self, cfg: DynamicVitConfig, *, rngs: nnx.Rngs):
        width, init = cfg.in_width, trunc_normal(cfg.initializer_range)
        make = lambda a, b: Linear(a, b, kernel_init=init, rngs=rngs)
        self.norm = LayerNorm(width, eps=EPS)
        self.inner = make(width, width)
        self.out1, self.out2, self.out3 = make(width, width // 2), make(width // 2, width // 4), make(width // 4, 2)

    def __call__(self, x: Float[Array, "n N C"], kept: Float[Array, "n N"]) -> Float[Array, "n N 2"]:
        x = gelu(self.inner(self.norm(x)))
        own, others = jnp.split(x, 2, axis=-1)
        weights = kept[..., None].astype(x.dtype)
        mean = (others * weights).sum(1, keepdims=True) / jnp.maximum(weights.sum(1, keepdims=True), 1e-6)
        x = jnp.concatenate([own, jnp.broadcast_to(mean, own.shape)], axis=-1)
        return jax.nn.log_softmax(self.out3(gelu(self.out2(gelu(self.out1(x))))).astype(jnp.float32), axis=-1)


class DynamicVit(Pruned):
    Config = DynamicVitConfig
    torch_code = "projector_dynamicvit.py"

    def __init__(self, cfg: DynamicVitConfig, *, rngs: nnx.Rngs):
        super().__init__(cfg, rngs=rngs)
        for stage in range(len(cfg.prune_layers)):
            setattr(self, f"predictor{stage}", Predictor(cfg, rngs=rngs))

    def prune(self, stage: int, layer, x: Float[Array, "n N C"], kept: Float[Array, "n P"] | None, key: Array | None):
        """A layer of the tower behind a predictor (see vision.Prune)."""
        patches, share = x[:, 1:], self.cfg.keep_ratio ** (stage + 1)
        if kept is None:
            kept = jnp.ones(patches.shape[:2])
        scores = getattr(self, f"predictor{stage}")(patches, kept)
        if key is None:
            stay = select(scores[..., 0], int(self.cfg.grid**2 * share))
            patches = jnp.take_along_axis(patches, stay[..., None], axis=1)
            return layer(jnp.concatenate([x[:, :1], patches], axis=1)), PruningStep(stay)
        noise = jax.random.gumbel(jax.random.fold_in(key, stage), scores.shape)
        soft = jax.nn.softmax(scores + noise, axis=-1)[..., 0]
        kept = kept * (soft + jax.lax.stop_gradient((soft > 0.5) - soft))
        penalty = PENALTY * ((kept.mean(1) - share) ** 2).mean() / len(self.cfg.prune_layers)
        return layer(x, kept), PruningStep(kept=kept, penalty=penalty)

    def __call__(self, features: VisionFeatures, text, budget: int, key: Array | None):
        x, kept = features.last, features.kept
        if kept is None:
            return self.project(x)
        noise = jax.random.uniform(jax.random.fold_in(key, len(self.cfg.prune_layers)), kept.shape)
        stay = select(kept + noise, budget)
        kept = jnp.take_along_axis(kept, stay, axis=1)
        tokens = self.project(jnp.take_along_axis(x, stay[..., None], axis=1))
        return tokens * kept[..., None].astype(tokens.dtype), kept > 0.5

    @staticmethod
    def budgets(cfg: DynamicVitConfig) -> tuple[int, ...]:
        count = int(cfg.grid**2 * cfg.keep_ratio ** len(cfg.prune_layers))
        if not count:
            raise ConfigError(f"projector.keep_ratio={cfg.keep_ratio}; {cfg.name} would keep {count} patches")
        return (count,)

    @staticmethod
    def name_table(cfg: DynamicVitConfig) -> list[Entry]:
        table = Pruned.name_table(cfg)
        for stage in range(len(cfg.prune_layers)):
            torch, path = f"score_predictor.{stage}", f"predictor{stage}"
            table += norm(f"{torch}.in_conv.0", f"{path}/norm") + linear(f"{torch}.in_conv.1", f"{path}/inner")
            for number in range(3):
                table += linear(f"{torch}.out_conv.{2 * number}", f"{path}/out{number + 1}")
        return table

    @staticmethod
    def infer(shapes: dict[str, tuple[int, ...]]) -> dict | None:
        if "score_predictor.0.in_conv.0.weight" not in shapes:
            return None
        out_width, in_width = shapes["0.weight"]
        return dict(name="dynamicvit", in_width=in_width, out_width=out_width)

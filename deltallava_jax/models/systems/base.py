"""What a system is: the class that each one extends, the settings that several share, and where tokens lie.

docs/new_system.md walks through one."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Bool, Float, Int

from deltallava_jax.arrays import Array
from deltallava_jax.config import ConfigError, ProjectorConfig
from deltallava_jax.config.checks import require, require_at_least, require_positive
from deltallava_jax.models.names import Entry
from deltallava_jax.models.vision import Needs, VisionFeatures


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Places:
    """Where in the image the tokens lie: the cell of each, by rows from the top of a grid of side x side cells, and
    side^2 for a token of many cells."""

    cells: Int[Array, "n V"]
    side: int = field(metadata={"static": True})


class System(nnx.Module):
    """What makes or selects the visual tokens, between the tower and the decoder. It is made as ``System(cfg, rngs=)``
    with its ``Config``; the static methods speak of a config alone."""

    Config: type[ProjectorConfig]
    torch_code: str | Path = ""  # its PyTorch module for exports: a file of convert/torch_modules, or a path
    prefix = ""  # of its tensors in published checkpoints, where that is not mm_projector.
    is_llava = False  # whether its exports are Hugging Face's LLaVA
    reads_question = False  # whether it wants the hidden state of each image's question
    prune: Callable | None = None  # vision.Prune with a random key behind it, where it runs tower layers itself
    places: Callable | None = None  # (features, budget) -> Places, where each token lies somewhere in the image

    def __call__(
        self, features: VisionFeatures, text: Float[Array, "n t"] | None, budget: int, key: Array | None
    ) -> Float[Array, "n V d"] | tuple[Float[Array, "n V d"], Bool[Array, "n V"]]:
        """V = budget tokens of n images, and which of them are there where that varies. text: where it is read, the
        question's hidden state. key: None outside of training."""
        raise NotImplementedError

    @staticmethod
    def budgets(cfg: ProjectorConfig) -> tuple[int, ...]:
        """The tokens an image that it can make, largest first."""
        raise NotImplementedError

    @staticmethod
    def at(cfg: ProjectorConfig, budget: int) -> ProjectorConfig:
        """The settings with which it makes that many tokens, if there are such (``systems.at`` looks)."""
        return cfg

    @staticmethod
    def needs(cfg: ProjectorConfig, layers: int) -> Needs:
        """What it asks of a tower of that many layers."""
        return Needs(last=last_layer(cfg, layers))

    @staticmethod
    def name_table(cfg: ProjectorConfig) -> list[Entry]:
        """Its torch names, those of the public release."""
        raise NotImplementedError

    @staticmethod
    def left_out(cfg: ProjectorConfig) -> list[Entry]:
        """Tensors that published checkpoints may hold and this config has no use for: of parts that it ablates."""
        return []

    @staticmethod
    def infer(shapes: dict[str, tuple[int, ...]]) -> dict | None:
        """Its settings from {torch name: shape}; None where the tensors are not its own or do not tell."""
        return None


def last_layer(cfg: ProjectorConfig, layers: int) -> int:
    """The hidden state of the query features in a tower of that many layers."""
    return layers + 1 + cfg.select_layer


# ------------------------------------------------------------------ tokens are cells of the patch grid


@dataclass(frozen=True)
class ScaleConfig(ProjectorConfig):
    """Of systems that make (grid / s)^2 tokens, one a cell of s x s patches."""

    scale_factor: int | tuple[int, ...] = 2  # s; several make the model elastic: a budget is drawn each step

    def __post_init__(self):
        super().__post_init__()
        divisors = [s for s in range(1, self.grid + 1) if self.grid % s == 0]
        valid = f"valid values: {', '.join(map(str, divisors))}"
        require(self.scale_factors != (), f"projector.scale_factor is empty; {valid}")
        for s in self.scale_factors:
            require(
                s in divisors,
                f"projector.scale_factor={s} does not divide the {self.grid}x{self.grid} patch grid; {valid}",
            )

    @property
    def scale_factors(self) -> tuple[int, ...]:
        return self.scale_factor if isinstance(self.scale_factor, tuple) else (self.scale_factor,)

    def require_one_scale(self) -> None:
        """ConfigError for more than one scale factor."""
        require(
            len(self.scale_factors) == 1,
            f"projector.scale_factor={self.scale_factor}; {self.name}'s weights serve one scale factor",
        )


class OnGrid(System):
    """A system whose tokens are the cells of a coarser grid, in reading order."""

    @staticmethod
    def budgets(cfg: ScaleConfig) -> tuple[int, ...]:
        return tuple(sorted({(cfg.grid // s) ** 2 for s in cfg.scale_factors}, reverse=True))

    @staticmethod
    def at(cfg: ScaleConfig, budget: int) -> ScaleConfig:
        return dataclasses.replace(cfg, scale_factor=round(cfg.grid / math.sqrt(budget)))

    def places(self, features: VisionFeatures, budget: int) -> Places:
        return in_reading_order(features, budget)


def in_reading_order(features: VisionFeatures, budget: int) -> Places:
    """Tokens that fill a grid of their own."""
    n = features.last.shape[0]
    return Places(jnp.broadcast_to(jnp.arange(budget), (n, budget)), math.isqrt(budget))


LEVELS = (12, 16, 22, 23)  # of CLIP-L's 24 layers: the release's multi-level features


@dataclass(frozen=True)
class LevelsConfig(ScaleConfig):
    """Of systems whose keys and values come from several layers of the tower, in attention within a cell."""

    embed_width: int = 0  # width inside the projector; 0: in_width
    levels: tuple[int, ...] = ()  # hidden states of the tower, 0 the embedding; empty: 12, 16, 22, 23 of 24 layers
    level_count: int = 4  # how many of them
    head_dim: int = 128  # width of a head of the local attention
    initializer_range: float = 0.02  # standard deviation of fresh Linear weights; small widths want more

    def __post_init__(self):
        super().__post_init__()
        require_at_least(1, "projector", self, "level_count", "head_dim")
        require_at_least(0, "projector", self, "embed_width")
        require_positive("projector", self, "initializer_range")
        require(min(self.levels, default=0) >= 0, f"projector.levels={self.levels}; expected 0 or more")
        require(
            not self.levels or len(self.levels) == self.level_count,
            f"projector.levels has {len(self.levels)} entries; projector.level_count is {self.level_count}",
        )
        require(
            bool(self.levels) or self.level_count <= len(LEVELS),
            f"projector.level_count={self.level_count}; name the tower's layers in projector.levels",
        )
        require(
            self.width % self.head_dim == 0,
            f"projector.head_dim={self.head_dim} does not divide the projector's width {self.width}",
        )

    @property
    def width(self) -> int:
        return self.embed_width or self.in_width

    def validate_tower(self, layers: int) -> None:
        super().validate_tower(layers)
        require(
            all(level <= layers for level in self.levels),
            f"projector.levels={self.levels}; the tower has {layers} layers",
        )


class MultiLevel(OnGrid):
    """A system that reads the last features and several layers."""

    @staticmethod
    def needs(cfg: LevelsConfig, layers: int) -> Needs:
        """The release's relative depths where none are named: halves rounded up, none beyond the last."""
        last = last_layer(cfg, layers)
        levels = cfg.levels or tuple(min(int(layers * level / 24 + 0.5), last) for level in LEVELS[-cfg.level_count :])
        return Needs(last=last, levels=levels)


# ------------------------------------------------------------------ learned queries


@dataclass(frozen=True)
class QueriesConfig(ProjectorConfig):
    """Of systems with learned queries that attend to all patches."""

    queries: int = 256  # learned queries
    head_dim: int = 128  # width of a head
    initializer_range: float = 0.02  # standard deviation of fresh weights; small widths want more

    def __post_init__(self):
        super().__post_init__()
        require_at_least(1, "projector", self, "queries", "head_dim")
        require_positive("projector", self, "initializer_range")
        require(
            math.isqrt(self.queries) ** 2 == self.queries,
            f"projector.queries={self.queries}; {self.name} needs a square number, for its position table",
        )


# ------------------------------------------------------------------ a selection of the patches


@dataclass(frozen=True)
class TokensConfig(ProjectorConfig):
    """Of systems that keep so many patches."""

    tokens: tuple[int, ...] = ()  # the budgets; empty: those of 144, 64, 36, 16, 4 and 1 that the grid has

    def __post_init__(self):
        super().__post_init__()
        patches = self.grid**2
        require(min(self.tokens, default=1) >= 1, f"projector.tokens={self.tokens}; expected 1 or more")
        if max(self.tokens, default=1) > patches:
            raise ConfigError(f"projector.tokens={self.tokens}; {self.name} keeps 1 to {patches} patches")

"""Systems, between the tower and the decoder: vision features -> V tokens of the decoder's width.

A system is one class in one file (base.System) and a line in config/systems.py; the functions here find it by its
config, and nothing else in the project names one."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from deltallava_jax import config
from deltallava_jax.arrays import Array
from deltallava_jax.config import SYSTEMS, ProjectorConfig
from deltallava_jax.errors import ConfigError
from deltallava_jax.models import layers, names
from deltallava_jax.models.systems.base import Places, System
from deltallava_jax.models.vision import Needs, Prune, VisionFeatures


def system(cfg: ProjectorConfig) -> type[System]:
    """The class of a config. Raises ConfigError with the nearest name for an unknown system."""
    return config.system(cfg.name)


def prefixes() -> list[str]:
    """Tensor prefixes of projectors in published checkpoints, other than LLaVA's mm_projector; longer ones first."""
    found = {config.system(name).prefix for name in SYSTEMS} - {""}
    return sorted(found, key=len, reverse=True)


def init_params(cfg: ProjectorConfig, key: Array) -> layers.Params:
    """Fresh float32 parameters as a nested dict."""
    return layers.init(system(cfg), cfg, key)


def budgets(cfg: ProjectorConfig) -> tuple[int, ...]:
    """Visual tokens per image that this projector can make, largest first; several for an elastic one."""
    return system(cfg).budgets(cfg)


def check_budget(cfg: ProjectorConfig, budget: int | None) -> int:
    """The budget, or the largest one for None. Raises ConfigError with the allowed ones for any other."""
    allowed = budgets(cfg)
    if budget is None:
        return allowed[0]
    if budget not in allowed:
        raise ConfigError(f"{cfg.name} makes {', '.join(map(str, allowed))} tokens an image, not {budget}")
    return budget


def at(cfg: ProjectorConfig, budget: int) -> ProjectorConfig:
    """The config with which the system makes exactly that many tokens. Raises ConfigError where there is none."""
    try:
        able = system(cfg).at(cfg, budget) if budget > 0 else None
        if able and budgets(able) == (budget,):
            return able
    except ConfigError:  # the setting for that budget would be invalid
        pass
    raise ConfigError(f"{cfg.name} does not make {budget} tokens of {cfg.grid**2} patches")


def needs(cfg: ProjectorConfig, layers: int) -> Needs:
    """What the projector needs from a tower of that many layers."""
    return system(cfg).needs(cfg, layers)


def pruning(params: layers.Params, cfg: ProjectorConfig, key: Array | None = None) -> Prune | None:
    """Applies the tower's layers in ``needs(...).pruned``; None for a system that does not prune the tower.

    key: a random key, for training."""
    if system(cfg).prune is None:
        return None
    return functools.partial(layers.bind(system(cfg), cfg, params).prune, key=key)


def reads_question(cfg: ProjectorConfig) -> bool:
    """Whether the projector uses the hidden state of each image's question."""
    return system(cfg).reads_question


def question_length(cfg: ProjectorConfig | None) -> int:
    """Most tokens of a question; 0 for a projector that uses none, and for a model without a projector."""
    return cfg.question_length if cfg and reads_question(cfg) else 0


def project(
    params: layers.Params,
    cfg: ProjectorConfig,
    features: VisionFeatures,
    text: Float[Array, "n t"] | None = None,
    *,
    budget: int | None = None,
    key: Array | None = None,
) -> Float[Array, "n V d"]:
    """Visual tokens of n images, in reading order; n may be 0.

    text: for systems that use the question, its hidden state. budget: V, static; the largest by default.
    key: a random key, for training (stochastic depth). Raises ConfigError for a budget that the system does not make,
    ValueError for features of another grid or width."""
    return project_valid(params, cfg, features, text, budget=budget, key=key)[0]


def project_valid(
    params: layers.Params,
    cfg: ProjectorConfig,
    features: VisionFeatures,
    text: Float[Array, "n t"] | None = None,
    *,
    budget: int | None = None,
    key: Array | None = None,
) -> tuple[Float[Array, "n V d"], Bool[Array, "n V"] | None]:
    """``project``, and which of the tokens exist; None where all do."""
    budget = check_budget(cfg, budget)
    if features.grid != (cfg.grid, cfg.grid) or features.last.shape[-1] != cfg.in_width:
        raise ValueError(
            f"features of grid {features.grid} and width {features.last.shape[-1]}; "
            f"the projector expects ({cfg.grid}, {cfg.grid}) and {cfg.in_width}"
        )
    if features.last.shape[0] == 0:  # an empty array cannot infer a dimension of -1
        return jnp.zeros((0, budget, cfg.out_width), features.last.dtype), None
    with jax.named_scope(f"projector_{cfg.name}"):
        made = layers.bind(system(cfg), cfg, params)(features, text, budget, key)
    return made if isinstance(made, tuple) else (made, None)


def places(params: layers.Params, cfg: ProjectorConfig, features: VisionFeatures, budget: int) -> Places:
    """Where the tokens of a budget lie in the image, for a system with ``places``."""
    return layers.bind(system(cfg), cfg, params).places(features, budget)


def name_table(cfg: ProjectorConfig) -> list[names.Entry]:
    """The name table, by the names of the public release."""
    return system(cfg).name_table(cfg)


def infer(shapes: dict[str, tuple[int, ...]]) -> dict | None:
    """ProjectorConfig settings by the names and shapes of a state dict; None for an unknown system."""
    return next((found for name in SYSTEMS if (found := config.system(name).infer(shapes)) is not None), None)


def from_torch(state_dict: dict[str, np.ndarray], cfg: ProjectorConfig) -> layers.Params:
    """{torch name: array} -> nested dict, float32. Tensors of parts that cfg ablates are left out.

    Raises names.WeightMismatch with both sides where names or shapes differ."""
    expected = jax.eval_shape(lambda: init_params(cfg, jax.random.key(0)))
    left_out = {entry.torch for entry in system(cfg).left_out(cfg)}
    return names.from_torch(state_dict, name_table(cfg), expected, left_out.__contains__)


def to_torch(params: layers.Params, cfg: ProjectorConfig) -> dict[str, np.ndarray]:
    """Nested dict -> {torch name: numpy array}, the names and shapes of the public release."""
    return names.to_torch(params, name_table(cfg))

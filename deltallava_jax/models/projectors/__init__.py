"""Visual projectors: vision features -> V tokens of the decoder's width. A system is a file and a line here.

A system is an NNX class ``System(cfg, *, rngs)`` with
    __call__(features, text, budget, key)   [n, V, d], or that and the valid mask [n, V] where the number of live tokens
                                            varies; key is None outside training
    budgets(cfg)                            the tokens an image it can make, largest first
    needs(cfg, layers)                      what it asks of a tower of that many layers
    name_table(cfg)                         its torch names
    reads_question                          True for one that wants text
    prune                                   a vision.Prune with a key behind it, for one that runs tower layers itself
    prefix                                  of its tensors in published checkpoints, where it is not mm_projector.
    infer(shapes)                           its settings from {torch name: shape}, None if the tensors are not its own
"""

from __future__ import annotations

import dataclasses
import difflib
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from deltallava_jax.arrays import Array
from deltallava_jax.config import ProjectorConfig
from deltallava_jax.errors import ConfigError
from deltallava_jax.models import layers, names
from deltallava_jax.models.projectors.delta import Delta
from deltallava_jax.models.projectors.honeybee_c import HoneybeeC
from deltallava_jax.models.projectors.honeybee_d import HoneybeeD
from deltallava_jax.models.projectors.m3 import M3
from deltallava_jax.models.projectors.mlp import Mlp
from deltallava_jax.models.projectors.mqt import Mqt
from deltallava_jax.models.projectors.quecc import Quecc
from deltallava_jax.models.projectors.resampler import Resampler
from deltallava_jax.models.projectors.token_packer import TokenPacker
from deltallava_jax.models.selection.dynamicvit import DynamicVit
from deltallava_jax.models.selection.evit import Evit
from deltallava_jax.models.selection.fastervlm import FasterVlm
from deltallava_jax.models.selection.prumerge import PruMerge, PruMergePlus
from deltallava_jax.models.vision import Needs, Prune, VisionFeatures

SYSTEMS = {
    "delta": Delta,
    "mlp": Mlp,
    "token_packer": TokenPacker,
    "m3": M3,
    "mqt": Mqt,
    "quecc": Quecc,
    "resampler": Resampler,
    "honeybee_c": HoneybeeC,
    "honeybee_d": HoneybeeD,
    "prumerge": PruMerge,
    "prumerge_plus": PruMergePlus,
    "fastervlm": FasterVlm,
    "evit": Evit,
    "dynamicvit": DynamicVit,
}
# Where published checkpoints keep a projector that is not LLaVA's mm_projector; the longer names first.
PREFIXES = sorted({kind.prefix for kind in SYSTEMS.values() if hasattr(kind, "prefix")}, key=len, reverse=True)


def system(cfg: ProjectorConfig) -> type:
    if cfg.name not in SYSTEMS:
        close = difflib.get_close_matches(cfg.name, SYSTEMS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(SYSTEMS)}"
        raise ConfigError(f"projector.name is {cfg.name!r}; {hint}")
    return SYSTEMS[cfg.name]


def init_params(cfg: ProjectorConfig, key: Array) -> layers.Params:
    """Fresh float32 parameters as a nested dict."""
    return layers.init(system(cfg), cfg, key)


def budgets(cfg: ProjectorConfig) -> tuple[int, ...]:
    """Visual tokens an image that this projector can make, largest first; more than one for an elastic one."""
    return system(cfg).budgets(cfg)


def check_budget(cfg: ProjectorConfig, budget: int | None) -> int:
    """The budget itself, or the largest one for None; ConfigError with the allowed list for any other."""
    allowed = budgets(cfg)
    if budget is None:
        return allowed[0]
    if budget not in allowed:
        raise ConfigError(f"{cfg.name} makes {', '.join(map(str, allowed))} tokens an image, not {budget}")
    return budget


def needs(cfg: ProjectorConfig, layers: int) -> Needs:
    """What the projector asks of a tower with that many layers."""
    return system(cfg).needs(cfg, layers)


def pruning(params: layers.Params, cfg: ProjectorConfig, key: Array | None = None) -> Prune | None:
    """What runs the tower's layers in ``needs(...).pruned``; None for a system that leaves the tower alone.

    key: a random key switches training behaviour on."""
    if not hasattr(system(cfg), "prune"):
        return None
    return functools.partial(layers.bind(system(cfg), cfg, params).prune, key=key)


def reads_question(cfg: ProjectorConfig) -> bool:
    """Whether the projector wants the hidden state of each image's question."""
    return getattr(system(cfg), "reads_question", False)


def question_length(cfg: ProjectorConfig | None) -> int:
    """Tokens of a question that are read at most; 0 for a projector that reads none, and for a model without one."""
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

    text: for systems that read the question, its hidden state. budget: V, static; the largest by default.
    key: a random key switches training behaviour (stochastic depth) on. Raises ConfigError for a budget that the
    system does not make, ValueError for features of another grid or width."""
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
    """``project``, and which of the tokens are there; None where all are."""
    budget = check_budget(cfg, budget)
    if features.grid != (cfg.grid, cfg.grid) or features.last.shape[-1] != cfg.in_width:
        raise ValueError(
            f"features of grid {features.grid} and width {features.last.shape[-1]}; "
            f"the projector expects ({cfg.grid}, {cfg.grid}) and {cfg.in_width}"
        )
    if features.last.shape[0] == 0:  # a reshape to "the rest" has no answer in an empty array
        return jnp.zeros((0, budget, cfg.out_width), features.last.dtype), None
    with jax.named_scope(f"projector_{cfg.name}"):
        made = layers.bind(system(cfg), cfg, params)(features, text, budget, key)
    return made if isinstance(made, tuple) else (made, None)


def name_table(cfg: ProjectorConfig) -> list[names.Entry]:
    """Which torch tensor is which parameter, by the names of the public release."""
    return system(cfg).name_table(cfg)


def infer(shapes: dict[str, tuple[int, ...]]) -> dict | None:
    """ProjectorConfig settings of a state dict by its names and shapes; None if it is of no known system."""
    return next((found for kind in SYSTEMS.values() if (found := kind.infer(shapes)) is not None), None)


def from_torch(state_dict: dict[str, np.ndarray], cfg: ProjectorConfig) -> layers.Params:
    """{torch name: array} -> nested dict, float32. Parts that cfg ablates may be in the state dict and are left out.

    Raises names.WeightMismatch with both sides where names or shapes differ."""
    full = {e.torch for e in name_table(dataclasses.replace(cfg, ablation="none"))}
    expected = jax.eval_shape(lambda: init_params(cfg, jax.random.key(0)))
    return names.from_torch(state_dict, name_table(cfg), expected, full.__contains__)


def to_torch(params: layers.Params, cfg: ProjectorConfig) -> dict[str, np.ndarray]:
    """Nested dict -> {torch name: numpy array}, the names and shapes of the public release."""
    return names.to_torch(params, name_table(cfg))

"""AdamW with warmup and cosine decay, and the division of the parameters into trained and frozen."""

from __future__ import annotations

import difflib
import re

import jax.numpy as jnp
import optax

from deltallava_jax.config import OptimizerConfig
from deltallava_jax.errors import ConfigError
from deltallava_jax.models.layers import Params
from deltallava_jax.models.names import flatten, unflatten


def schedule(cfg: OptimizerConfig, steps: int) -> optax.Schedule:
    """Linear warmup over ``warmup_ratio`` of the steps, then cosine decay to ``final_lr_ratio`` of the peak."""
    warmup = max(1, round(cfg.warmup_ratio * steps)) if cfg.warmup_ratio else 0
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0 if warmup else cfg.lr,
        peak_value=cfg.lr,
        warmup_steps=warmup,
        decay_steps=max(steps, warmup + 1),
        end_value=cfg.lr * cfg.final_lr_ratio,
    )


def make_optimizer(cfg: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Clipping by the global norm, AdamW with weight decay on matrices alone, the schedule."""
    decay = lambda params: unflatten({path: _decays(path) for path in flatten(params)})
    return optax.chain(
        optax.clip_by_global_norm(cfg.clip_norm) if cfg.clip_norm else optax.identity(),
        optax.adamw(
            schedule(cfg, steps), cfg.b1, cfg.b2, cfg.eps,
            mu_dtype=cfg.mu_dtype, weight_decay=cfg.weight_decay, mask=decay,
        ),
    )  # fmt: skip


def _decays(path: str) -> bool:
    return path.rsplit("/", 1)[-1] in ("kernel", "base", "U", "V")


def split(params: Params, frozen: tuple[str, ...]) -> tuple[Params, Params]:
    """(trained, frozen) by regular expressions over paths; what is frozen is cast to bfloat16.

    Raises ConfigError for a pattern that matches nothing, or if nothing is left to train."""
    flat = flatten(params)
    for pattern in frozen:
        if not any(re.search(pattern, path) for path in flat):
            close = difflib.get_close_matches(pattern, flat, n=1, cutoff=0.0)
            raise ConfigError(f"optimizer.frozen pattern {pattern!r} matches no parameter, e.g. {close[0]!r}")
    is_frozen = {path: any(re.search(pattern, path) for pattern in frozen) for path in flat}
    if all(is_frozen.values()):
        raise ConfigError(f"optimizer.frozen={frozen} leaves no parameter to train")
    trained = unflatten({path: leaf for path, leaf in flat.items() if not is_frozen[path]})
    return trained, unflatten({path: leaf.astype(jnp.bfloat16) for path, leaf in flat.items() if is_frozen[path]})


def join(trained: Params, frozen: Params) -> Params:
    """The whole nested dict again."""
    return unflatten({**flatten(trained), **flatten(frozen)})

"""AdamW or Muon with warmup and cosine decay, learning rates of parts, and the split of the parameters into trained and
frozen."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from deltallava_jax.config import OptimizerConfig
from deltallava_jax.errors import ConfigError
from deltallava_jax.models import lora
from deltallava_jax.models.layers import Params
from deltallava_jax.models.names import flatten, unflatten

MUON_RMS = 0.2


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
    """Clipping by the global norm, then AdamW or Muon with weight decay on matrices alone, at the scheduled rate; the
    updates of parameters with a rate of their own, weight decay included, are scaled to it."""
    rate = schedule(cfg, steps)
    clip = optax.clip_by_global_norm(cfg.clip_norm) if cfg.clip_norm else optax.identity()
    adamw = optax.adamw(
        rate, cfg.b1, cfg.b2, cfg.eps, mu_dtype=cfg.mu_dtype, weight_decay=cfg.weight_decay, mask=_decayed
    )  # fmt: skip
    update = adamw
    if cfg.name == "muon":
        muon = _muon(cfg, lambda step: cfg.muon_rate * rate(step))
        update = optax.partition({"muon": muon, "adamw": adamw}, kinds)
    return optax.chain(clip, _with_rates(update, cfg) if cfg.rates else update)


def _with_rates(inner: optax.GradientTransformation, cfg: OptimizerConfig) -> optax.GradientTransformation:
    """Scales the updates of ``inner``, whose state stays as it is: rates may change when a run resumes."""

    def update(updates, state, params=None):
        updates, state = inner.update(updates, state, params)
        return unflatten({path: cfg.rate_of(path) / cfg.lr * leaf for path, leaf in flatten(updates).items()}), state

    return optax.GradientTransformation(inner.init, update)


def _muon(cfg: OptimizerConfig, rate: optax.Schedule) -> optax.GradientTransformation:
    """Muon (Jordan et al. 2024) on matrices [..., in, out]; leading axes index separate matrices.

    An orthogonal r x c matrix has a root mean square of max(r, c)**-0.5. It is scaled to 0.2, about that of AdamW's
    updates, so that learning rate and weight decay mean the same for both (Liu et al. 2025, arXiv:2502.16982)."""
    matrix = MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)

    def scale(update):
        return MUON_RMS * max(update.shape[-2:]) ** 0.5 * update

    return optax.chain(
        scale_by_muon(
            ns_steps=cfg.muon_iterations,
            beta=cfg.muon_momentum,
            eps=cfg.eps,
            mu_dtype=cfg.mu_dtype,
            weight_dimension_numbers=lambda updates: jax.tree.map(lambda _: matrix, updates),
        ),
        optax.stateless(lambda updates, _: jax.tree.map(scale, updates)),
        optax.add_decayed_weights(cfg.weight_decay),
        optax.scale_by_learning_rate(rate),
    )


def kinds(params: Params) -> Params:
    """ "muon" for the matrices inside the layers and the projector, "adamw" for the rest: embeddings, heads, norms,
    biases, convolutions, the narrow factors of a low-rank update."""

    def kind(path: str, leaf) -> str:
        inside = re.search(r"(^projector|/layers)/.*(kernel|base)$", path)
        return "muon" if inside and leaf.ndim in (2, 3) else "adamw"  # 3: stacked layers

    return unflatten({path: kind(path, leaf) for path, leaf in flatten(params).items()})


def _decayed(params: Params) -> Params:
    """Whether weight decay applies to each parameter: only to matrices."""
    matrices = ("kernel", "base", "U", "V", lora.A, lora.B)
    return unflatten({path: path.rsplit("/", 1)[-1] in matrices for path in flatten(params)})


def split(params: Params, cfg: OptimizerConfig) -> tuple[Params, Params]:
    """(trained, frozen) by regular expressions over paths; frozen parameters are cast to bfloat16. Adapters are always
    trained, the matrices that they adapt never.

    Raises ConfigError for a pattern that matches nothing (of ``rates``: nothing that is trained), or if nothing is left
    to train."""
    flat = flatten(params)
    adapted = {f"{path.removesuffix(lora.A)}kernel" for path in flat if path.endswith(f"/{lora.A}")}
    _require_matches("frozen", cfg.frozen, [path for path in flat if not lora.is_adapter(path)])
    is_frozen = {
        path: path in adapted or (not lora.is_adapter(path) and any(re.search(one, path) for one in cfg.frozen))
        for path in flat
    }
    if all(is_frozen.values()):
        raise ConfigError(f"optimizer.frozen={cfg.frozen} leaves no parameter to train")
    _require_matches("rates", [pattern for pattern, _ in cfg.rates], [path for path in flat if not is_frozen[path]])
    trained = unflatten({path: leaf for path, leaf in flat.items() if not is_frozen[path]})
    return trained, unflatten({path: leaf.astype(jnp.bfloat16) for path, leaf in flat.items() if is_frozen[path]})


def _require_matches(setting: str, patterns: Iterable[str], paths: list[str]) -> None:
    for pattern in patterns:
        if not any(re.search(pattern, path) for path in paths):
            close = difflib.get_close_matches(pattern, paths, n=1, cutoff=0.0)
            kind = "trained parameter" if setting == "rates" else "parameter"
            raise ConfigError(f"optimizer.{setting} pattern {pattern!r} matches no {kind}, e.g. {close[0]!r}")


def join(trained: Params, frozen: Params) -> Params:
    """All parameters as one nested dict, the inverse of ``split``."""
    return unflatten({**flatten(trained), **flatten(frozen)})

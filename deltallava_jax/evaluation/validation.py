"""Evaluation during training."""

from __future__ import annotations

from collections.abc import Callable

from deltallava_jax.config import Config
from deltallava_jax.data.tokens import Tokenizer
from deltallava_jax.errors import ConfigError
from deltallava_jax.evaluation import TASKS
from deltallava_jax.models import systems
from deltallava_jax.models.layers import Params
from deltallava_jax.training.metrics import Metrics


def validation(cfg: Config, tokenizer: Tokenizer) -> Callable[[Params, Metrics, int], float] | None:
    """The function that the loop calls every training.eval_every steps: (params, metrics, step) -> the mean accuracy
    over the budgets, each of which is logged; None for a data set without an evaluation. Raises ConfigError where
    training.keep_best needs one."""
    if cfg.data.dataset not in TASKS:
        if cfg.training.keep_best:
            raise ConfigError(f"training.keep_best: no evaluation during training for data.dataset={cfg.data.dataset}")
        return None

    def evaluate(params: Params, metrics: Metrics, step: int) -> float:
        accuracies = []
        for budget in systems.budgets(cfg.model.projector):
            report = TASKS[cfg.data.dataset](
                params, cfg, tokenizer, budget=budget, limit=cfg.evaluation.limit, progress=False
            )
            by_type = ", ".join(f"{kind} {score['accuracy']:.4f}" for kind, score in report["by_type"].items())
            metrics.log(f"step {step}: {report['task']} {report['accuracy']:.4f} at {budget} tokens ({by_type})")
            metrics.log_evaluation(step, {f"{report['task']}_{budget}": report["accuracy"]})
            accuracies.append(report["accuracy"])
        return sum(accuracies) / len(accuracies)

    return evaluate

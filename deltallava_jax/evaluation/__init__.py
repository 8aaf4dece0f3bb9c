"""Benchmarks by name. A task is evaluate(params, cfg, tokenizer, *, budget, control, limit, progress) -> report."""

from deltallava_jax.evaluation import easy_vqa

TASKS = {"easy_vqa": easy_vqa.evaluate}

"""Exports of our models, loaded by transformers, and what both answer."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from transformers import (  # noqa: E402
    AutoModelForImageTextToText,
)

from deltallava_jax.config import system_config  # noqa: E402
from deltallava_jax.convert.export import write_hf  # noqa: E402
from deltallava_jax.convert.read import Pretrained  # noqa: E402
from deltallava_jax.convert.workdir import compose  # noqa: E402
from deltallava_jax.inference.generate import Engine, prompt_batch  # noqa: E402
from deltallava_jax.inference.sampling import Sampling  # noqa: E402
from deltallava_jax.models import systems, vlm  # noqa: E402
from tests.convert.checkpoints import (  # noqa: E402
    our_batch,
)
from tests.models.rows import random_params  # noqa: E402

DELTA = dict(scale_factor=(1, 2, 4), head_dim=16, block_head_dim=8, rank=4, mlp_width=24)


def composer(saved):
    """Makes composed(tower, decoder, projector, dtype, **settings), the fixture."""
    parts = functools.cache(
        lambda tower, decoder, dtype: compose(saved(tower, dtype), saved(decoder, dtype), "mlp", {})
    )

    @functools.cache
    def composed(tower: str, decoder: str, projector: str, dtype: str = "float32", **settings) -> Pretrained:
        model = parts(tower, decoder, dtype)
        cfg = model.cfg.projector
        sizes = dict(grid=cfg.grid, in_width=cfg.in_width, out_width=cfg.out_width)
        cfg = dataclasses.replace(model.cfg, projector=system_config(name=projector, **sizes, **settings))
        drawn = random_params(systems.init_params, cfg.projector)
        drawn = jax.tree.map(lambda leaf: leaf.astype(dtype), drawn)
        return dataclasses.replace(model, cfg=cfg, params=model.params | {"projector": drawn})

    return composed


def exported(model: Pretrained, folder):
    folder.mkdir()
    write_hf(model, folder)
    return folder


def loaded(folder, dtype: str = "float32"):
    """What transformers loads from an export: every tensor found and used."""
    model, info = AutoModelForImageTextToText.from_pretrained(
        folder, trust_remote_code=True, dtype=getattr(torch, dtype), output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


def assert_close(mine, reference, dtype: str = "float32"):
    """Logits or visual tokens; in bfloat16 the typical difference is taken, relative to the typical value."""
    reference = reference.float().numpy()[..., : mine.shape[-1]]
    assert mine.shape == reference.shape and reference.std() > 0.1
    if dtype == "float32":
        np.testing.assert_allclose(mine, reference, atol=1e-4)
    else:
        assert np.std(mine - reference) < 2e-2 * np.std(reference)


def our_logits(model: Pretrained, rows, images, budget: int) -> np.ndarray:
    """[tokens that are not padding, vocab], row after row."""
    batch = our_batch(rows, images)

    @jax.jit
    def run(params):
        _, layout, _ = vlm.hidden_states(params, model.cfg, batch, budget=budget)
        return vlm.logits(params, model.cfg, batch, budget=budget), layout.segments > 0

    logits, live = run(model.params)
    return np.asarray(logits)[np.asarray(live)]


def our_tokens(model: Pretrained, rows, images, budget: int, count: int = 8) -> list[list[int]]:
    prompts = prompt_batch(rows, max(len(row.ids) for row in rows))
    engine = Engine(model.params, model.cfg)
    visual = engine.encode(images, prompts, budget=budget)
    return engine.tokens(prompts, *visual, Sampling(max_new_tokens=count), end=-1)

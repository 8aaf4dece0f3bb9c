"""A run small enough for a test: every part real, every width tiny. Also a --config file for the command line."""

from pathlib import Path

from deltallava_jax import config as c


def get_config() -> c.Config:
    return c.Config(
        name="tiny",
        model=c.compose(
            c.VisionConfig(image_size=64, patch_size=8, width=32, layers=2, heads=2, mlp_width=64),
            c.DecoderConfig(
                vocab_size=384, width=32, layers=2, heads=2, kv_heads=2, mlp_width=64, initializer_range=0.1
            ),
            dict(scale_factor=4, head_dim=16, block_head_dim=16, rank=4, initializer_range=0.1),
            dtype="float32",
        ),
        data=c.DataConfig(template="brief", turns=3, independent_rounds=True, rows=8, row_length=96, workers=0),
        optimizer=c.OptimizerConfig(lr=1e-3),
        training=c.TrainingConfig(steps=8, log_every=1, checkpoint_every=4),
        evaluation=c.EvaluationConfig(batch_size=64, max_new_tokens=3),
    )


def random_params(cfg: c.ModelConfig, seed: int = 0, scale: float = 0.2) -> dict:
    """Parameters of a model as random numbers, norms' scales around 1: without compiling its initialisers."""
    import jax
    import numpy as np

    from deltallava_jax.models import vlm
    from deltallava_jax.models.names import flatten, unflatten

    rng = np.random.default_rng(seed)
    shapes = flatten(jax.eval_shape(lambda: vlm.init_params(cfg, jax.random.key(0))))
    values = lambda path, shape: scale * rng.standard_normal(shape) + path.endswith("scale")
    return unflatten({path: jax.numpy.float32(values(path, leaf.shape)) for path, leaf in shapes.items()})


def make_run(cfg: c.Config, source=None):
    """(rows, plan, tokenizer) of a config, over easy-VQA or another source."""
    from deltallava_jax.data import tokens
    from deltallava_jax.data.pipeline import Rows
    from deltallava_jax.data.sources import training_source
    from deltallava_jax.models import systems

    source = source or training_source(cfg.data)
    tokenizer = tokens.train(source.texts(), cfg.model.decoder.vocab_size)
    rows = Rows(source, tokenizer, cfg.data, cfg.model.vision, systems.question_length(cfg.model.projector))
    return rows, rows.plan(systems.budgets(cfg.model.projector), cfg.seed), tokenizer


FILE = Path(__file__)

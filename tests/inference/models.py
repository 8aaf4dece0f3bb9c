"""A tiny model with random weights and a tokenizer, ready to answer; and prompts for it."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import numpy as np

from deltallava_jax.config import Config, DataConfig, FastVConfig, to_dict
from deltallava_jax.data import tokens
from deltallava_jax.data.conversation import Tokenized
from deltallava_jax.inference.model import Model
from deltallava_jax.models import vlm
from deltallava_jax.training.checkpoints import Checkpoints
from tests import tiny

TEXTS = ["what color is the shape?", "is there a red circle on the blue square?", "yes no red green blue"] * 3
VOCAB = 384


@functools.cache
def model(fastv: bool = False, template: str = "brief", scale: float = 1.0) -> Model:
    """Elastic: 16, 4 or 1 tokens an image. fastv: two of them stay in the second layer. Cached: do not modify."""
    cfg = tiny.get_config().model
    cfg = dataclasses.replace(
        cfg,
        projector=dataclasses.replace(cfg.projector, scale_factor=(2, 4, 8)),
        decoder=dataclasses.replace(cfg.decoder, vocab_size=VOCAB, heads=4, initializer_range=0.3),
        fastv=FastVConfig(1, 2) if fastv else None,
    )
    return Model(cfg, vlm.init_params(cfg, jax.random.key(0)), tokens.train(TEXTS, VOCAB), template)


def decoder_alone(template=None):
    whole = model()
    cfg = dataclasses.replace(whole.cfg, vision=None, projector=None)
    return Model(cfg, {"decoder": whole.params["decoder"]}, whole.tokenizer, template)


def save_workdir(folder: Path) -> Path:
    """The model in a workdir, as train.py would leave it."""
    one = model()
    config = Config(name="tiny", model=one.cfg, data=DataConfig(template=one.template))
    (folder / "config.json").write_text(json.dumps(to_dict(config)))
    one.tokenizer.save(folder / "tokenizer.json")
    checkpoints = Checkpoints(folder, create=True)
    checkpoints.save_params(one.params)
    checkpoints.close()
    return folder


def picture(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8)


def prompt(length: int, images: int = 0, seed: int = 0) -> Tokenized:
    """Random ids, an image behind each of the first tokens."""
    ids = np.random.default_rng(seed).integers(3, VOCAB, length).astype(np.int32)
    places = np.arange(1, 1 + 2 * images, 2, dtype=np.int32)
    ids[places] = 0
    nothing = np.zeros(length, np.int32)
    return Tokenized(ids, nothing > 0, places, nothing, np.zeros((images, 0), np.int32))


def visual(engine, pictures: list[np.ndarray], budget: int | None = None):
    """Visual tokens of pictures, each encoded alone, so that one number of images is compiled."""
    found = [engine.encode(one[None], budget=budget) for one in pictures] or [engine.encode(np.zeros(0))]
    assert all(valid is None for _, valid in found)
    return np.concatenate([tokens for tokens, _ in found]), None

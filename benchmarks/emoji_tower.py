"""A small CLIP tower for emoji: trained contrastively with their names, then frozen by the recipe (emoji_recipe.py).

A picture's CLS output, through one matrix, is to be nearer to its own name than to the name of any other sign. A name
is the mean of the decoder's embeddings of its tokens, through another matrix: the tower learns what the pictures show,
in two drawing styles, and nothing of the decoder but which names are alike."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, UInt8
from PIL import Image

from configs.emoji import TOWER
from deltallava_jax.config import ModelConfig, VisionConfig
from deltallava_jax.convert.read import Pretrained
from deltallava_jax.convert.workdir import write_workdir
from deltallava_jax.models import vision
from deltallava_jax.models.layers import Params, bind

JOINT, BATCH, TEMPERATURE = 256, 64, 0.07


def train(
    pictures: UInt8[np.ndarray, "n H W 3"],
    names: Int[np.ndarray, " n"],
    texts: Float[np.ndarray, "m t"],
    *,
    steps: int,
    cfg: VisionConfig = TOWER,
    lr: float = 1e-3,
    shift: float = 5.0,
    seed: int = 0,
    say: Callable[[str, Params], None] | None = None,
) -> tuple[Params, list[float]]:
    """({"tower", "picture", "name"}: the tower and the two matrices, the loss of every step).

    names: the row of ``texts`` that is each picture's. shift: pixels that pictures are moved by, at most. say: is
    told every 100 steps how far it is."""
    keys = jax.random.split(jax.random.key(seed), 3)
    texts = centred(texts)
    params = {
        "tower": vision.init_params(cfg, keys[0]),
        "picture": jax.random.normal(keys[1], (cfg.width, JOINT)) * cfg.width**-0.5,
        "name": jax.random.normal(keys[2], (texts.shape[1], JOINT)),
    }
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(optax.warmup_cosine_decay_schedule(0.0, lr, steps // 20, steps), b2=0.98, weight_decay=0.1),
    )
    moments, rng, losses = optimizer.init(params), np.random.default_rng(seed), []

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, moments, images, right, key):
        images = augment(images.astype(jnp.float32), key, shift)

        def loss(params):
            scores = likeness(params, cfg, images, texts) / TEMPERATURE
            return optax.softmax_cross_entropy_with_integer_labels(scores, right).mean()

        value, grads = jax.value_and_grad(loss)(params)
        updates, moments = optimizer.update(grads, moments, params)
        return optax.apply_updates(params, updates), moments, value

    for number in range(steps):
        chosen = rng.choice(len(pictures), min(BATCH, len(pictures)), replace=False)
        key = jax.random.key(rng.integers(2**31))
        params, moments, value = step(params, moments, pictures[chosen], names[chosen], key)
        losses.append(float(value))
        if say and (number + 1) % 100 == 0:
            say(f"tower: step {number + 1} of {steps}, loss {np.mean(losses[-100:]):.3f}", params)
    return params, losses


def centred(texts: Float[np.ndarray, "m t"]) -> Float[Array, "m t"]:
    """What tells names apart: without their mean, of length 1."""
    texts = texts - texts.mean(0)
    return jnp.asarray(texts / np.linalg.norm(texts, axis=1, keepdims=True))


def accuracy(
    params: Params,
    pictures: UInt8[np.ndarray, "n H W 3"],
    names: Int[np.ndarray, " n"],
    texts: Float[np.ndarray, "m t"],
    cfg: VisionConfig = TOWER,
) -> float:
    """How often a picture's own name is the nearest of all."""
    nearest = jax.jit(lambda params, images: likeness(params, cfg, images, centred(texts)).argmax(1))
    parts = [nearest(params, pictures[at : at + BATCH].astype(np.float32)) for at in range(0, len(pictures), BATCH)]
    return float((np.concatenate(parts) == names).mean())


def pictures(files: list[Path]) -> UInt8[np.ndarray, "n H W 3"]:
    return np.stack([np.asarray(Image.open(file)) for file in files])


def likeness(params: Params, cfg: VisionConfig, images: Float[Array, "n H W 3"], texts) -> Float[Array, "n m"]:
    """Cosines of pictures (0 to 255) and names."""
    pixels = (images / 255.0 - jnp.asarray(cfg.image_mean)) / jnp.asarray(cfg.image_std)
    hidden = vision.forward(params["tower"], cfg, vision.embed(params["tower"], cfg, pixels), (0, cfg.layers))
    seen = bind(vision.FinalNorm, cfg, params["tower"]["final"])(hidden[:, 0]) @ params["picture"]
    meant = texts @ params["name"]
    unit = lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)
    return unit(seen) @ unit(meant).T


def augment(images: Float[Array, "n H W 3"], key: Array, most: float) -> Float[Array, "n H W 3"]:
    """Pictures moved by ``most`` pixels, stretched and tinted at random, on white: about what another style changes."""
    n, size = images.shape[0], images.shape[1]
    move, stretch, tint, light, grey = jax.random.split(key, 5)
    scale = jnp.exp(jax.random.uniform(stretch, (n, 2), minval=-0.25, maxval=0.2))
    shift = jax.random.uniform(move, (n, 2), minval=-most, maxval=most) + (1 - scale) * size / 2
    place = lambda ink, s, t: jax.image.scale_and_translate(ink, ink.shape, (0, 1), s, t, "linear", antialias=False)
    ink = jax.vmap(place)(255.0 - images, scale, shift)
    image = 255.0 - ink
    gain = jnp.exp(jax.random.uniform(tint, (n, 1, 1, 3), minval=-0.25, maxval=0.25))
    dull = jax.random.uniform(grey, (n, 1, 1, 1), maxval=0.6)
    image = image * gain + jax.random.uniform(light, (n, 1, 1, 1), minval=-25.0, maxval=25.0)
    return jnp.clip(image + dull * (image.mean(-1, keepdims=True) - image), 0.0, 255.0)


def write(params: Params, folder: Path, cfg: VisionConfig = TOWER) -> None:
    """The tower as a workdir, which ``convert --vision`` reads."""
    folder.mkdir(parents=True)
    write_workdir(Pretrained(ModelConfig(cfg, None, None), {"vision": params}), folder, folder.name)

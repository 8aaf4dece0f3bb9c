"""Where in the image an answer comes from, by its visual tokens: the paper's Figure 1.

The answer's log-probability is differentiated at the projector's output. A token's heat is, by method:
    relevance  |token . its gradient|: how much the log-probability changes, to first order, where the token is scaled;
    gradcam    the positive part of the token's channels weighted by their mean gradient over all tokens (Selvaraju et
               al., 2017), which the paper's figure shows (mzamini92/Delta-LLaVA, llava/eval/gradcam_visualization.py;
               there of the first token's logit). Where few tokens differ from the rest, the mean hardly reflects them:
               on easy-VQA it finds the shape less often (docs/results.md).
Tokens must have a place in the image: a cell of a grid, or the patch that a selection kept.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8
from PIL import Image, ImageDraw, ImageFont

from deltallava_jax.config import ModelConfig
from deltallava_jax.data.conversation import TEMPLATES, Tokenized, prompt_conversation, tokenize
from deltallava_jax.data.images import load_image
from deltallava_jax.errors import ConfigError
from deltallava_jax.inference.generate import prompt_batch
from deltallava_jax.inference.model import Model
from deltallava_jax.models import decoder, systems, vision, vlm
from deltallava_jax.models.layers import Params
from deltallava_jax.models.systems.base import Places
from deltallava_jax.sequence import Batch, layout

LENGTH_STEP = 64  # texts are padded to a multiple of this, so that few lengths are compiled
METHODS = ("relevance", "gradcam")
HEAT = 0.45  # the colours' share in an overlay
SHOWN = 336  # pixels a side of an overlay, at least


@dataclass(frozen=True)
class HeatMap:
    """grid: heat of each cell, 0 or more, rows from the top; for a selection the cells are patches, 0 where dropped.
    log_probability: of the whole answer with its end token."""

    grid: Float[np.ndarray, "h w"]
    budget: int
    answer: str
    log_probability: float


def require_places(cfg: ModelConfig) -> None:
    """Raises ConfigError unless every visual token has a known place in the image."""
    cfg.require_whole("a heat map")
    if systems.system(cfg.projector).places is None:
        raise ConfigError(
            f"no heat map: the tokens of {cfg.projector.name} have no known place in the image; use a system whose "
            "tokens are grid cells or selected patches"
        )
    if cfg.fastv:
        raise ConfigError("no heat map: FastV drops visual tokens inside the decoder; use the model without it")


def heat_maps(
    model: Model,
    image: str | Path | bytes | Image.Image,
    prompt: str,
    *,
    budgets: Sequence[int] = (),
    answer: str | None = None,
    method: str = "relevance",
    max_new_tokens: int = 64,
) -> list[HeatMap]:
    """A heat map for each budget (the projector's largest by default), of ``answer``, or of the model's own.

        model = deltallava_jax.load("runs/easy_vqa")
        (heat,) = heat_maps(model, "shape.png", "what shape is present?")
        overlay(tower_image(model, "shape.png"), heat).save("heat.png")

    Raises ConfigError for a bad budget or a system without places, BadSample for an image that cannot be read."""
    require_places(model.cfg)
    if method not in METHODS:
        raise ConfigError(f"method is {method!r}; known: {', '.join(METHODS)}")
    if model.tokenizer is None:
        raise ConfigError("the checkpoint holds no tokenizer; put its tokenizer.json beside the weights")
    budgets = [systems.check_budget(model.cfg.projector, budget) for budget in budgets or (None,)]
    prompt_conversation([(prompt, None)], 1)
    pixels = _pixels(model, image)[None]
    found = []
    for budget in budgets:
        text = answer
        if text is None:
            text = model.generate(image, prompt, budget=budget, max_new_tokens=max_new_tokens)
        row = _row(
            tokenize(
                prompt_conversation([(prompt, text)], 1), TEMPLATES[model.template], model.tokenizer,
                question_length=systems.question_length(model.cfg.projector),
            )
        )  # fmt: skip
        heat, log_probability = _heat(model.params, model.cfg, pixels, row, budget=budget, method=method)
        places = _places(model.params, model.cfg, pixels, budget)
        found.append(HeatMap(_on_grid(heat, places), budget, text, float(log_probability)))
    return found


def _pixels(model: Model, image) -> UInt8[np.ndarray, "H W 3"]:
    return load_image(image, model.cfg.vision.image_size, model.aspect, model.cfg.vision.mean_color)


def _row(text: Tokenized) -> Batch:
    """One row with the answer's tokens in the loss mask, padded to a multiple of LENGTH_STEP."""
    T = -(-len(text.ids) // LENGTH_STEP) * LENGTH_STEP
    row = prompt_batch([text], T)
    row.loss_mask[0, : len(text.ids)] = text.loss_mask
    return row


@functools.partial(jax.jit, static_argnames=("cfg", "budget", "method"))
def _heat(
    params: Params, cfg: ModelConfig, pixels: UInt8[Array, "1 H W 3"], row: Batch, *, budget: int, method: str
) -> tuple[Float[Array, " V"], Float[Array, ""]]:
    """(heat of each token, the answer's log-probability)."""
    visual, valid, _ = vlm.visual_tokens(params, cfg, pixels, row, budget=budget)
    row_layout = layout(row, None if valid is None else valid[None], budget)
    weights = params["decoder"]

    def log_probability(visual: Float[Array, "1 V d"]) -> Float[Array, ""]:
        hidden, _ = decoder.forward(weights, cfg.decoder, vlm.merge(params, cfg, row, row_layout, visual), row_layout)
        scores = decoder.logits(weights, cfg.decoder, decoder.finish(weights, cfg.decoder, hidden))
        chosen = jnp.take_along_axis(jax.nn.log_softmax(scores), row_layout.targets[..., None], axis=-1)[..., 0]
        return jnp.where(row_layout.loss_mask, chosen, 0.0).sum()

    value, gradient = jax.value_and_grad(log_probability)(visual)
    visual, gradient = visual[0].astype(jnp.float32), gradient[0].astype(jnp.float32)
    live = jnp.ones(budget, bool) if valid is None else valid[0]
    if method == "gradcam":
        channels = jnp.where(live[:, None], gradient, 0.0).sum(0) / live.sum()
        heat = jax.nn.relu(visual @ channels)
    else:
        heat = jnp.abs((visual * gradient).sum(-1))
    return jnp.where(live, heat, 0.0), value


@functools.partial(jax.jit, static_argnames=("cfg", "budget"))
def _places(params: Params, cfg: ModelConfig, pixels: UInt8[Array, "1 H W 3"], budget: int) -> Places:
    """The places of the tokens in the image."""
    needs = systems.needs(cfg.projector, cfg.vision.layers)
    weights = params["projector"]
    prune = systems.pruning(weights, cfg.projector)
    features = vision.encode(params["vision"], cfg.vision, pixels, needs, prune=prune, dtype=cfg.dtype)
    return systems.places(weights, cfg.projector, features, budget)


def _on_grid(heat: Float[Array, " V"], places: Places) -> Float[np.ndarray, "h w"]:
    cells = np.zeros(places.side**2 + 1, np.float32)
    np.add.at(cells, np.asarray(places.cells[0]), np.asarray(heat))
    return cells[:-1].reshape(places.side, places.side)


# ------------------------------------------------------------------ pictures


def tower_image(model: Model, image: str | Path | bytes | Image.Image) -> Image.Image:
    """The square of an image that the tower's patches cover, enlarged to at least SHOWN pixels."""
    covered = model.cfg.vision.grid * model.cfg.vision.patch_size
    square = Image.fromarray(_pixels(model, image)[:covered, :covered])
    side = max(SHOWN, covered)
    return square.resize((side, side), Image.Resampling.BICUBIC if side > covered else Image.Resampling.NEAREST)


def overlay(image: Image.Image, heat: HeatMap) -> Image.Image:
    """The heat over an image (what ``tower_image`` returns) in colours from blue to red, a block for each token."""
    largest = heat.grid.max()
    grid = heat.grid / largest if largest > 0 else heat.grid
    x = 4 * grid[..., None] - np.array([3.0, 2.0, 1.0])  # "jet": red, green and blue, each a plateau with slopes
    colors = (255 * np.clip(1.5 - np.abs(x), 0, 1)).astype(np.uint8)
    blocks = Image.fromarray(colors).resize(image.size, Image.Resampling.NEAREST)
    return Image.blend(image.convert("RGB"), blocks, HEAT)


def figure(image: Image.Image, maps: Sequence[HeatMap]) -> Image.Image:
    """The image and the overlay of each map beside it, with the number of tokens and the answer below."""
    panels = [(image.convert("RGB"), "")]
    for heat in maps:
        tokens = f"{heat.budget} token{'' if heat.budget == 1 else 's'}"
        panels.append((overlay(image, heat), f"{tokens}: {heat.answer}"))
    gap, font = 8, ImageFont.load_default(14)
    lines = [_wrapped(text, font, image.width) for _, text in panels]
    size = (len(panels) * (image.width + gap) + gap, image.height + 2 * gap + 18 * max(map(len, lines)))
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for place, ((panel, _), text) in enumerate(zip(panels, lines, strict=True)):
        left = gap + place * (image.width + gap)
        sheet.paste(panel, (left, gap))
        for number, line in enumerate(text):
            draw.text((left, image.height + gap + 4 + 18 * number), line, fill="black", font=font)
    return sheet


def _wrapped(text: str, font, width: int) -> list[str]:
    """Lines that fit the width, words kept whole."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines

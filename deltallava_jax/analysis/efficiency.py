"""The cost of an answer: tower, projector, prefill and decoding, for any system and number of visual tokens.

Two conventions. "exact" counts every matrix product of the programs that run (analysis/flops.py): gated
MLPs, heads and their groups, all of a projector's layers, what a selection adds, the logits, and the tower layers that
are used. "paper" is the arithmetic behind Delta-LLaVA's Figure 3 and sections 5 and 6.5 (mzamini92/Delta-LLaVA,
llava/eval/analyze_speed_multi.py): an MLP of two matrices, no groups, no logits, all of the tower's layers, and of the
projector its first two linear maps on the visual tokens alone.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from deltallava_jax.analysis import flops
from deltallava_jax.config import SYSTEMS, FastVConfig, ModelConfig, ProjectorConfig, settings_of, system_config
from deltallava_jax.errors import ConfigError
from deltallava_jax.models import decoder, fastv, systems, vision, vlm
from deltallava_jax.models.names import flatten
from deltallava_jax.sequence import Batch, layout, text_layout

BUDGETS = (576, 144, 64, 36, 16, 4, 1)  # of the paper's Figure 3
TEXT, NEW = 68, 30  # tokens of a prompt's text and of an answer: 30 is the paper's mean, 68 gives its prefill numbers
PARTS = ("vision", "projector", "prefill", "decode")
# Printed in the paper (sections 5 and 6.5), in TFLOPs: {tokens: {part: operations}}.
PUBLISHED = {
    576: dict(vision=0.382, projector=0.024, prefill=6.72, decode=0.31, total=7.43),
    144: dict(vision=0.382, prefill=2.16, total=2.84),
    36: dict(vision=0.382, total=1.74),
    16: dict(vision=0.382, prefill=0.85, decode=0.28),
    4: dict(vision=0.382, decode=0.28),
    1: dict(vision=0.382, prefill=0.70, total=1.39),
}


def rows(cfg: ModelConfig, budget: int, text: int = TEXT, new: int = NEW) -> list[dict]:
    """Both conventions of one model at ``budget`` visual tokens (with FastV: those it keeps), as rows for a table.

    Operations in TFLOPs for one image, ``text`` tokens of text and ``new`` new ones; cache_bytes are those of the keys
    and values at the end, in the model's dtype, the same in both. Raises ConfigError for a budget that it does not
    make."""
    cfg = at_budget(cfg, budget)
    common = dict(system=cfg.system, budget=budget, text_tokens=text, new_tokens=new)
    found = []
    for convention, count in (("paper", paper), ("exact", exact)):
        parts = count(cfg, text, new)
        values = {f"{part}_tflops": parts[part] / 1e12 for part in PARTS}
        total = sum(parts.values()) / 1e12
        held = cache_bytes(cfg, text, new)
        found.append(common | dict(convention=convention) | values | dict(total_tflops=total, cache_bytes=held))
    return found


def system_names() -> tuple[str, ...]:
    """The systems that can be counted, by name."""
    return (*SYSTEMS, "fastv")


def visual_tokens(cfg: ModelConfig) -> int:
    """Visual tokens per image that enter the decoder."""
    return systems.budgets(cfg.projector)[0]


def layer_slices(cfg: ModelConfig, text: int) -> list[tuple[tuple[int, int], int]]:
    """((first, last) layers of the decoder, a prompt's tokens in them), in order: more than one with FastV."""
    tokens = text + visual_tokens(cfg)
    if not cfg.fastv:
        return [((0, cfg.decoder.layers), tokens)]
    kept = fastv.kept_tokens(tokens, text, cfg.fastv)
    return list(zip(fastv.layer_slices(cfg.decoder, cfg.fastv), (tokens, tokens, kept), strict=True))


def cache_bytes(cfg: ModelConfig, text: int, new: int) -> int:
    """Bytes of all keys and values at the end of the answer."""
    wide = 2 * cfg.decoder.kv_heads * cfg.decoder.head_dim * jnp.dtype(cfg.dtype).itemsize
    return sum((last - first) * (tokens + new) * wide for (first, last), tokens in layer_slices(cfg, text))


# ------------------------------------------------------------------ the systems at a number of tokens


def with_system(cfg: ModelConfig, name: str) -> ModelConfig:
    """The model with another system between its tower and its decoder, as published."""
    if name not in system_names():
        raise ConfigError(f"unknown system {name!r}; known: {', '.join(system_names())}")
    own = "mlp" if name == "fastv" else name
    width = cfg.vision.width
    fitted = dict(grid=cfg.vision.grid, in_width=width, out_width=cfg.decoder.width, scale_factor=1)
    # Head sizes that divide any width; they do not affect the counts.
    fitted |= dict(head_dim=math.gcd(128, width), block_head_dim=math.gcd(32, width // 2))
    projector = system_config(own, **settings_of(own, fitted))
    keep = FastVConfig(keep=min(144, cfg.vision.grid**2)) if name == "fastv" else None
    return dataclasses.replace(cfg, projector=projector, fastv=keep)


def at_budget(cfg: ModelConfig, budget: int) -> ModelConfig:
    """The model set to make, or with FastV to keep, that many tokens. Raises ConfigError where it cannot."""
    if cfg.fastv:
        if not 1 <= budget <= visual_tokens(cfg):
            raise ConfigError(f"fastv keeps 1 to {visual_tokens(cfg)} tokens, not {budget}")
        return dataclasses.replace(cfg, fastv=dataclasses.replace(cfg.fastv, keep=budget))
    return dataclasses.replace(cfg, projector=systems.at(cfg.projector, budget))


def budgets_of(cfg: ModelConfig, wanted: tuple[int, ...]) -> list[int]:
    """Those of the wanted budgets that the system can make; if none, the one that it is set to."""
    able = []
    for budget in wanted:
        try:
            at_budget(cfg, budget)
            able.append(budget)
        except ConfigError:
            pass
    return able or [cfg.fastv.keep if cfg.fastv else visual_tokens(cfg)]


# ------------------------------------------------------------------ every matrix product


def exact(cfg: ModelConfig, text: int, new: int) -> dict[str, int]:
    """Operations by part of one image and an answer, counted in the traced programs.

    Encoding a question for the projector (QueCC) counts as the projector's. Each of the ``new`` tokens runs through the
    decoder once, attending to all tokens before it and itself."""
    shapes = jax.eval_shape(functools.partial(vlm.init_params, cfg), jax.random.key(0))
    V = visual_tokens(cfg)
    size = cfg.vision.image_size
    needs = systems.needs(cfg.projector, cfg.vision.layers)
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.uint8)
    made = jax.ShapeDtypeStruct((1, V, cfg.decoder.width), cfg.dtype)
    token = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    prompt = Batch.shapes(1, text + 1, 1, question=systems.question_length(cfg.projector))

    def encode(params, images):
        prune = systems.pruning(params["projector"], cfg.projector)
        return vision.encode(params["vision"], cfg.vision, images, needs, prune=prune, dtype=cfg.dtype)

    def project(params, features, prompt):
        question = vlm.question_states(params, cfg, prompt) if systems.reads_question(cfg.projector) else None
        return systems.project(params["projector"], cfg.projector, features, question)

    def score(params, hidden):
        return decoder.logits(params["decoder"], cfg.decoder, decoder.finish(params["decoder"], cfg.decoder, hidden))

    def prefill(params, prompt, made):
        places = layout(prompt, None, V)
        hidden, weights = vlm.merge(params, cfg, prompt, places, made), params["decoder"]
        if cfg.fastv:
            hidden = fastv.forward(weights, cfg.decoder, hidden, places, cfg.fastv, text + cfg.fastv.keep)[0]
        else:
            hidden, _ = decoder.forward(weights, cfg.decoder, hidden, places)
        return score(params, hidden[:, -1:])

    def step(params, token, caches):
        hidden = decoder.embed(params["decoder"], cfg.decoder, token, cfg.dtype)
        for (layers, _), cache in zip(layer_slices(cfg, text), caches, strict=True):
            row = text_layout(token, jnp.ones_like(token))
            hidden, _ = decoder.forward(params["decoder"], cfg.decoder, hidden, row, layers=layers, cache=cache)
        return score(params, hidden)

    def nth(count: int) -> int:
        """Operations of the ``count``-th new token: linear in count."""
        caches = [
            jax.eval_shape(
                functools.partial(decoder.init_cache, cfg.decoder, 1, tokens + count, cfg.dtype, layers=last - first)
            )
            for (first, last), tokens in layer_slices(cfg, text)
        ]
        return _count(step, shapes, token, caches)

    return dict(
        vision=_count(encode, shapes, images),
        projector=_count(project, shapes, jax.eval_shape(encode, shapes, images), prompt),
        prefill=_count(prefill, shapes, prompt, made),
        decode=new * (nth(1) + nth(new)) // 2 if new else 0,
    )


def _count(program, *shapes) -> int:
    return flops.total(flops.traced(jax.make_jaxpr(program)(*shapes)))


# ------------------------------------------------------------------ the paper's arithmetic


def paper(cfg: ModelConfig, text: int, new: int) -> dict[str, int]:
    """Operations by part in the paper's convention.

    FastV, which the paper does not count, by its own rule: layers before ``fastv.layer`` have every token."""
    tower = cfg.vision
    d = cfg.decoder
    width = d.width
    patches = tower.grid**2
    tower_tokens = patches + (tower.family == "clip")
    stem = 2 * patches * 3 * tower.patch_size**2 * tower.width
    prefill = decode = 0
    for (first, last), tokens in layer_slices(cfg, text):
        prefill += (last - first) * _layer(tokens, width, d.mlp_width)
        # The n-th new token attends to the prompt and the n - 1 before it.
        attended = new * tokens + new * (new - 1) // 2
        decode += (last - first) * (new * (8 * width**2 + 4 * width * d.mlp_width) + 4 * width * attended)
    return dict(
        vision=stem + tower.layers * _layer(tower_tokens, tower.width, tower.mlp_width),
        projector=2 * visual_tokens(cfg) * sum(_first_two_maps(cfg.projector)),
        prefill=prefill,
        decode=decode,
    )


def _layer(tokens: int, width: int, hidden: int) -> int:
    """A transformer layer with two matrices in its MLP: 8 L d^2 + 4 L d f + 4 L^2 d."""
    return 8 * tokens * width**2 + 4 * tokens * width * hidden + 4 * tokens**2 * width


def _first_two_maps(cfg: ProjectorConfig) -> list[int]:
    """Sizes of a projector's first two linear maps, in the order of its published tensors."""
    shapes = flatten(jax.eval_shape(functools.partial(systems.init_params, cfg), jax.random.key(0)))
    entries = [entry for entry in systems.name_table(cfg) if entry.kind in ("linear", "conv1x1")]
    maps = [
        math.prod(shapes[e.path].shape) for e in entries if len(shapes[e.path].shape) == 2 and "in_proj" not in e.torch
    ]
    return maps[:2]

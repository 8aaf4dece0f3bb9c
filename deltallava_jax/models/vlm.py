"""The whole model: tower, projector and decoder, with the visual tokens merged into the text by layout."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Bool, Float, Int, UInt8

from deltallava_jax.arrays import Array
from deltallava_jax.config import ModelConfig
from deltallava_jax.errors import ConfigError
from deltallava_jax.kernels.registry import as_configured
from deltallava_jax.models import decoder, llavolta, systems, vision
from deltallava_jax.models.layers import Params, by_rows
from deltallava_jax.sequence import Batch, Layout, layout, text_layout


def init_params(cfg: ModelConfig, key: Array) -> Params:
    """{"vision", "projector", "decoder"}, those that the model has: nested dicts of float32 arrays."""
    parts = {"vision": vision, "projector": systems, "decoder": decoder}
    return {
        name: module.init_params(getattr(cfg, name), part_key)
        for (name, module), part_key in zip(parts.items(), jax.random.split(key, 3), strict=True)
        if getattr(cfg, name)
    }


@as_configured
def visual_tokens(
    params: Params,
    cfg: ModelConfig,
    images: UInt8[Array, "n H W 3"] | Float[Array, "n H W 3"],
    batch: Batch | None = None,
    *,
    budget: int | None = None,
    key: Array | None = None,
    passes: int = 1,
) -> tuple[Float[Array, "n V d"], Bool[Array, "n V"] | None, Float[Array, ""] | float]:
    """Images -> V visual tokens each (the projector's largest budget by default), in the compute dtype; which of them
    exist (None: all); and a pruned tower's penalty on the loss.

    batch: the rows that the images belong to, for systems that use each image's question.
    passes: the tower encodes the images in so many parts, one after the other."""
    text = None
    if systems.reads_question(cfg.projector):
        if batch is None or batch.questions is None:
            raise ValueError(f"{cfg.projector.name} uses each image's question; pass a batch with questions")
        text = question_states(params, cfg, batch)
    needs = systems.needs(cfg.projector, cfg.vision.layers)
    prune = systems.pruning(params["projector"], cfg.projector, key)
    encode = lambda images: vision.encode(
        params["vision"], cfg.vision, images, needs, prune=prune, dtype=cfg.dtype, remat=cfg.remat
    )
    features = encode(images) if passes == 1 or needs.pruned else in_passes(encode, images, passes)
    visual, valid = systems.project_valid(params["projector"], cfg.projector, features, text, budget=budget, key=key)
    return by_rows(visual), valid, features.penalty


def in_passes(encode, images: UInt8[Array, "n H W 3"] | Float[Array, "n H W 3"], passes: int):
    """``encode`` of n / passes images at a time, every ``passes``-th, so that a pass holds its share of each row."""
    parts = jax.lax.map(encode, jnp.swapaxes(images.reshape(-1, passes, *images.shape[1:]), 0, 1))
    whole = lambda x: jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:]) if x.ndim > 1 else x.sum()
    return jax.tree.map(whole, parts)


def question_states(params: Params, cfg: ModelConfig, batch: Batch) -> Float[Array, "n d"]:
    """The decoder's last hidden state of each image's question alone, without gradient; zeros where there is none."""
    weights = jax.lax.stop_gradient(params["decoder"])
    questions = rearrange(batch.questions, "b i q -> (b i) q")
    live = questions >= 0
    count = live.sum(1)
    positions = jnp.broadcast_to(jnp.arange(questions.shape[1]), questions.shape)
    with jax.named_scope("question"):
        hidden = decoder.embed(weights, cfg.decoder, jnp.maximum(questions, 0), cfg.dtype)
        hidden, _ = decoder.forward(weights, cfg.decoder, hidden, text_layout(positions, live.astype(jnp.int32)))
        last = jnp.take_along_axis(hidden, jnp.maximum(count - 1, 0)[:, None, None], axis=1)[:, 0]
        states = decoder.finish(weights, cfg.decoder, last)
    return jax.lax.stop_gradient(jnp.where((count > 0)[:, None], states, 0))


def merge(
    params: Params, cfg: ModelConfig, batch: Batch, rows: Layout, visual: Float[Array, "n V d"]
) -> Float[Array, "B S d"]:
    """The decoder's input: text embeddings, and visual tokens at their positions."""
    tokens = jnp.take_along_axis(batch.tokens, rows.text_index, axis=1)
    text = by_rows(decoder.embed(params["decoder"], cfg.decoder, tokens, cfg.dtype))
    if visual.shape[0] == 0:
        return text
    visual = visual.reshape(batch.tokens.shape[0], -1, visual.shape[-1])  # [B, I * V, d]
    opened = jnp.take_along_axis(visual, rows.visual_index[..., None], axis=1)
    return by_rows(jnp.where(rows.is_visual[..., None], opened.astype(text.dtype), text))


@as_configured
def hidden_states(
    params: Params,
    cfg: ModelConfig,
    batch: Batch,
    *,
    budget: int | None = None,
    pooling: llavolta.Pooling | None = None,
    key: Array | None = None,
) -> tuple[Float[Array, "B S d"], Layout, Float[Array, ""] | float]:
    """Final hidden states (normed) of every token, their layout, and a pruned tower's penalty on the loss.

    pooling: (stride, layer) of LLaVolta, for systems whose tokens all exist."""
    budget = systems.check_budget(cfg.projector, budget) if cfg.projector else 1
    B, I = batch.image_positions.shape
    if I:
        images = batch.images.reshape(B * I, *batch.images.shape[2:])
        most = cfg.tower_images or I
        passes = next(count for count in range(1, I + 1) if I % count == 0 and I // count <= most)
        visual, valid, penalty = visual_tokens(params, cfg, images, batch, budget=budget, key=key, passes=passes)
    else:
        visual, valid, penalty = jnp.zeros((0, budget, cfg.decoder.width), cfg.dtype), None, 0.0
    rows = layout(batch, None if valid is None else valid.reshape(B, I, budget), budget)
    hidden = merge(params, cfg, batch, rows, visual)
    start = 0
    forward = functools.partial(decoder.forward, params["decoder"], cfg.decoder, remat=cfg.remat)
    if pooling and I:
        if valid is not None:
            raise ConfigError(
                f"training.llavolta needs a fixed number of tokens per image; {cfg.projector.name} drops some"
            )
        stride, start = pooling
        hidden, _ = forward(hidden, rows, layers=(0, start))
        hidden, rows = llavolta.pool(hidden, rows, batch, budget, stride)
    hidden, _ = forward(hidden, rows, layers=(start, cfg.decoder.layers))
    return decoder.finish(params["decoder"], cfg.decoder, hidden), rows, penalty


def logits(params: Params, cfg: ModelConfig, batch: Batch, *, budget: int | None = None) -> Float[Array, "B S vocab"]:
    """Float32 logits of every token; for tests and evaluation."""
    return decoder.logits(params["decoder"], cfg.decoder, hidden_states(params, cfg, batch, budget=budget)[0])


def loss_sum(
    params: Params,
    cfg: ModelConfig,
    batch: Batch,
    rng: Array | None,
    *,
    train: bool = True,
    budget: int | None = None,
    pooling: llavolta.Pooling | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """(summed next-token cross-entropy, supervised tokens), float32: unreduced, so that parts of a batch add up.

    At most ``loss_chunk`` tokens of a row have logits at a time, recomputed in the backward pass. The chunks divide the
    row, not the vocabulary, so that a head sharded over the vocabulary reduces in place. Each gathers the head that is
    divided over fsdp once and adds to its whole gradient: few chunks move less."""
    hidden, rows, penalty = hidden_states(
        params, cfg, batch, budget=budget, pooling=pooling, key=rng if train else None
    )
    B, S, d = hidden.shape
    count = -(-S // cfg.loss_chunk)
    chunk = -(-S // count)
    pad = lambda x: jnp.pad(x, ((0, 0), (0, count * chunk - S)) + ((0, 0),) * (x.ndim - 2))
    split = lambda x: jnp.swapaxes(pad(x).reshape(B, count, chunk, *x.shape[2:]), 0, 1)

    matrix = decoder.output_matrix(params["decoder"], cfg.decoder)

    def body(total, part):
        states, targets, mask = part
        return total + cross_entropy_sum(by_rows(states), matrix, targets, mask), None

    with jax.named_scope("loss"):
        parts = (split(hidden), split(rows.targets), split(rows.loss_mask))
        total, _ = jax.lax.scan(body, jnp.float32(0), parts)
    count = rows.loss_mask.sum().astype(jnp.float32)
    return total + penalty * count, count


@jax.custom_vjp
def cross_entropy_sum(
    states: Float[Array, "B S d"],
    matrix: Float[Array, "d vocab"],
    targets: Int[Array, "B S"],
    mask: Bool[Array, "B S"],
) -> Float[Array, ""]:
    """The cross-entropy of the tokens in ``mask``, summed, float32.

    The backward pass computes the logits again, and multiplies their gradient in the dtype of ``states``: by jax's own
    rule it would be float32 products, at half the rate or less. The matrix' gradient is summed in float32."""
    return _cross_entropy(states, matrix, targets, mask)[0]


def _logits(states, matrix) -> Float[Array, "B S vocab"]:
    with jax.named_scope("logits"):
        return jnp.matmul(states, matrix.astype(states.dtype), preferred_element_type=jnp.float32)


def _cross_entropy(states, matrix, targets, mask):
    scores = _logits(states, matrix)
    sums = jax.nn.logsumexp(scores, axis=-1)
    chosen = jnp.take_along_axis(scores, targets[..., None], axis=-1)[..., 0]
    return jnp.where(mask, sums - chosen, 0.0).sum(), (states, matrix, targets, mask, sums)


def _cross_entropy_gradients(saved, gradient):
    states, matrix, targets, mask, sums = saved
    with jax.named_scope("rematted"):
        scores = _logits(states, matrix)
    chosen = targets[..., None] == jnp.arange(matrix.shape[1])
    d_scores = (jnp.exp(scores - sums[..., None]) - chosen) * jnp.where(mask, gradient, 0.0)[..., None]
    d_scores = d_scores.astype(states.dtype)
    with jax.named_scope("logits"):
        d_states = jnp.matmul(d_scores, matrix.astype(states.dtype).T)
        d_matrix = jnp.einsum("bsd,bsv->dv", states, d_scores, preferred_element_type=jnp.float32)
    return d_states, d_matrix.astype(matrix.dtype), None, None


cross_entropy_sum.defvjp(_cross_entropy, _cross_entropy_gradients)


def loss(
    params: Params, cfg: ModelConfig, batch: Batch, rng: Array | None, *, train: bool = True, budget: int | None = None
) -> Float[Array, ""]:
    """Mean cross-entropy over the supervised tokens of the batch; 0 if there are none."""
    total, count = loss_sum(params, cfg, batch, rng, train=train, budget=budget)
    return total / jnp.maximum(count, 1.0)

"""The whole model on packed rows: the loss, its chunks, packing, images, budgets, recomputation, precision."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from deltallava_jax.config import DecoderConfig, ModelConfig, VisionConfig, compose
from deltallava_jax.errors import ConfigError
from deltallava_jax.models import vlm
from deltallava_jax.sequence import Batch, layout
from tests.models.rows import SIDE, assert_trees_close, conversation, pack, random_params

VOCAB, T, I, V = 97, 20, 2, 4
S = T + I * (V - 1)
VISION = VisionConfig(image_size=SIDE, patch_size=16, width=32, layers=3, heads=2, mlp_width=48)
DECODER = DecoderConfig(vocab_size=VOCAB, width=32, layers=2, heads=4, kv_heads=2, mlp_width=48)
MLP = compose(VISION, DECODER, dict(name="mlp"), dtype="float32")
DELTA = dict(scale_factor=(1, 2), head_dim=16, block_head_dim=8, rank=4, drop_path=0.5)
ELASTIC = compose(VISION, DECODER, DELTA, dtype="float32")
PARAMS = random_params(vlm.init_params, MLP)

RNG = np.random.default_rng(1)
TALKS = [conversation(RNG, 9, images=1), conversation(RNG, 8, images=1), conversation(RNG, 7)]
# Two conversations with an image each; one with an image and one without, which has an unused image place.
BATCH = pack([TALKS[:2], [TALKS[1], TALKS[2]]], T, I)
TEXT = pack([[TALKS[2], conversation(RNG, 16)], [conversation(RNG, 20)]], S, 0)


@functools.partial(jax.jit, static_argnums=0)
def step(cfg: ModelConfig, params, batch: Batch):
    return jax.value_and_grad(lambda p: vlm.loss_sum(p, cfg, batch, None, train=False), has_aux=True)(params)


def evaluate(batch: Batch, cfg: ModelConfig = MLP):
    """((summed loss, supervised tokens), gradients)."""
    return step(cfg, PARAMS, batch)


def loss(batch: Batch) -> float:
    (total, count), _ = evaluate(batch)
    return float(total / count)


def changed(**changes) -> ModelConfig:
    return dataclasses.replace(MLP, **changes)


def assert_same(ours, theirs):
    """Two results of evaluate agree to rounding."""
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-6)
    assert_trees_close(ours[1], theirs[1], atol=1e-5, rtol=1e-4)


def test_loss_is_the_cross_entropy_of_the_logits():
    """In plain float64, over the layout's targets and mask."""
    logits = jax.jit(lambda params, batch: vlm.logits(params, MLP, batch))(PARAMS, BATCH)
    assert logits.shape == (2, S, VOCAB) and logits.dtype == jnp.float32
    rows = layout(BATCH, None, V)
    mask = np.asarray(rows.loss_mask)
    scores, targets = np.asarray(logits, float)[mask], np.asarray(rows.targets)[mask]
    losses = np.log(np.exp(scores).sum(-1)) - scores[np.arange(len(targets)), targets]
    (total, count), _ = evaluate(BATCH)
    assert count == mask.sum() == BATCH.loss_mask.sum() > 10
    np.testing.assert_allclose(total, losses.sum(), rtol=1e-6)
    assert losses.std() > 0.1


def test_loss_is_the_mean_and_zero_without_supervision():
    loss = jax.jit(lambda params, batch: vlm.loss(params, MLP, batch, None, train=False))
    (total, count), _ = evaluate(TEXT)
    np.testing.assert_allclose(loss(PARAMS, TEXT), total / count, rtol=1e-6)
    silent = [dataclasses.replace(batch, loss_mask=jnp.zeros_like(batch.loss_mask)) for batch in (TEXT, BATCH)]
    assert loss(PARAMS, silent[0]) == 0
    (total, count), gradients = evaluate(silent[1])
    assert total == count == 0 and not any(np.any(leaf) for leaf in jax.tree.leaves(gradients))


def test_chunks_change_neither_loss_nor_gradients():
    """A row of 26 tokens in chunks of 7, against all at once; chunks that divide it are tested with remat."""
    assert_same(evaluate(TEXT, cfg=changed(loss_chunk=7)), evaluate(TEXT))


@pytest.mark.parametrize("chunk, whole", [(S, True), (512, True), (7, False), (1, False)])
def test_logits_never_exist_all_at_once(chunk, whole):
    """No array with a vocabulary axis and B * S * vocab or more elements appears in the traced loss and gradient."""
    jaxpr = jax.make_jaxpr(step, static_argnums=0)(changed(loss_chunk=chunk), PARAMS, BATCH).jaxpr
    sizes = {np.prod(shape) for shape in shapes(jaxpr) if VOCAB in shape}
    assert 2 * min(chunk, S) * VOCAB in sizes
    assert (max(sizes) >= 2 * S * VOCAB) == whole


def shapes(jaxpr):
    """Shapes of all arrays in a jaxpr and in those inside it (scans, checkpoints)."""
    for equation in jaxpr.eqns:
        yield from (variable.aval.shape for variable in equation.outvars)
        for inner in jaxprs_in_params(equation.params):
            yield from shapes(inner)


@pytest.mark.parametrize(
    "batch, remat, chunk, scans", [(BATCH, "full", 7, 2), (TEXT, "dots", 13, 1)], ids=["full-images", "dots-text"]
)
def test_recomputation_changes_nothing(batch, remat, chunk, scans):
    """Neither loss nor gradients, here together with chunks; the scans over layers (tower, decoder) recompute."""
    cfg = changed(remat=remat, loss_chunk=chunk)
    assert_same(evaluate(batch, cfg=cfg), evaluate(batch, cfg=changed(remat="none")))
    forward = lambda cfg: jax.make_jaxpr(lambda p: vlm.loss_sum(p, cfg, batch, None, train=False))(PARAMS)
    none = changed(remat="none", loss_chunk=chunk)
    assert str(forward(cfg)).count("remat") == scans + str(forward(none)).count("remat")


@pytest.mark.parametrize("cfg", [MLP, ELASTIC], ids=["mlp", "delta"])
def test_the_tower_in_parts_changes_nothing(cfg):
    """Rows of two images, one at a time: the scan over the parts exists, loss and gradients are the same."""
    parts, params = dataclasses.replace(cfg, tower_images=1), random_params(vlm.init_params, cfg)
    assert_same(step(parts, params, BATCH), step(cfg, params, BATCH))
    jaxpr = lambda cfg: jax.make_jaxpr(lambda p: vlm.loss_sum(p, cfg, BATCH, None, train=False))(params)
    assert str(jaxpr(parts)).count("scan[") == str(jaxpr(cfg)).count("scan[") + 1


def test_gradients_reach_what_is_used():
    """The tower up to the last layer needed, the projector and the decoder; nothing beyond."""
    _, gradients = evaluate(BATCH)
    tower = gradients["vision"]
    used = [tower["embeddings"], gradients["projector"], gradients["decoder"]]
    assert all(np.abs(leaf).max() > 1e-6 for leaf in jax.tree.leaves(used))
    for leaf in jax.tree.leaves(tower["layers"]):  # select_layer -2 of three layers: two are used
        assert np.any(leaf[0]) and np.any(leaf[1]) and not np.any(leaf[2])


def test_batch_without_images():
    """I = 0: no gradient reaches tower and projector, and the loss is that of rows with unused places."""
    _, gradients = evaluate(TEXT)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves([gradients["vision"], gradients["projector"]]))
    assert all(np.any(leaf) for leaf in jax.tree.leaves(gradients["decoder"]))
    bare = pack([[TALKS[2]], []], S, 0)
    np.testing.assert_allclose(loss(bare), loss(pack([[TALKS[2]], []], T, I)), atol=1e-5)


def test_parts_of_a_batch_add_up():
    part = jax.jit(lambda params, batch: vlm.loss_sum(params, MLP, batch, None, train=False))
    parts = [part(PARAMS, jax.tree.map(lambda x: x[b : b + 1], TEXT)) for b in range(2)]  # noqa: B023
    np.testing.assert_allclose(evaluate(TEXT)[0], np.sum(parts, axis=0), rtol=1e-6)
    assert parts[0][1] != parts[1][1]


def test_packing_changes_nothing():
    """Two conversations with an image each in one row, in either order, or in two rows; and their gradients."""
    unpacked = evaluate(pack([TALKS[:1], TALKS[1:2]], T, I))
    for packed in (pack([TALKS[:2], []], T, I), pack([[], TALKS[1::-1]], T, I)):
        np.testing.assert_allclose(evaluate(packed)[0], unpacked[0], atol=1e-5)
        assert_trees_close(evaluate(packed)[1], unpacked[1], atol=1e-5)


def test_an_image_reaches_its_own_conversation_only():
    other = dataclasses.replace(BATCH, images=BATCH.images.at[0, 1].set(255 - BATCH.images[0, 1]))
    assert abs(loss(other) - loss(BATCH)) > 1e-3
    only_first = BATCH.loss_mask & (BATCH.segments == 1)
    muted = [dataclasses.replace(batch, loss_mask=only_first) for batch in (other, BATCH)]
    assert loss(muted[0]) == loss(muted[1])
    swapped = dataclasses.replace(BATCH, images=BATCH.images.at[0].set(BATCH.images[0, ::-1]))
    assert abs(loss(swapped) - loss(BATCH)) > 1e-3


def test_unused_image_places_do_not_reach_the_loss():
    assert BATCH.image_positions[1].tolist() == [1, T]
    noise = np.random.default_rng(2).integers(0, 256, BATCH.images.shape[2:], dtype=np.uint8)
    before, after = evaluate(BATCH), evaluate(dataclasses.replace(BATCH, images=BATCH.images.at[1, 1].set(noise)))
    assert before[0] == after[0]
    assert_trees_close(before[1], after[1], atol=1e-6)


def test_bfloat16_is_close():
    """Compute in bfloat16 with float32 parameters: float32 loss and gradients, near those of float32."""
    cfg = changed(dtype="bfloat16")
    total, _ = jax.jit(lambda params, batch: vlm.loss_sum(params, cfg, batch, None, train=False))(PARAMS, BATCH)
    (exact, _), _ = evaluate(BATCH)
    np.testing.assert_allclose(total, exact, rtol=2e-2)
    assert total.dtype == jnp.float32 and total != exact
    assert jax.eval_shape(lambda p: vlm.hidden_states(p, cfg, BATCH)[0], PARAMS).dtype == jnp.bfloat16
    _, gradients = jax.eval_shape(functools.partial(step, cfg), PARAMS, BATCH)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(gradients))


@functools.partial(jax.jit, static_argnames=("budget", "train"))
def elastic_loss(params, batch, key=None, *, budget, train=False):
    return vlm.loss(params, ELASTIC, batch, key, train=train, budget=budget)


ELASTIC_PARAMS = random_params(vlm.init_params, ELASTIC)
elastic = functools.partial(elastic_loss, ELASTIC_PARAMS)


def test_every_budget_of_an_elastic_model():
    """Four tokens per image (the default) and one; another number is refused."""
    values = {budget: float(elastic(BATCH, budget=budget)) for budget in (4, 1)}
    assert np.isfinite(list(values.values())).all() and abs(values[4] - values[1]) > 1e-4
    other = dataclasses.replace(BATCH, images=255 - BATCH.images)
    assert all(abs(elastic(other, budget=budget) - value) > 1e-4 for budget, value in values.items())
    tokens = lambda budget: jax.eval_shape(
        lambda params: vlm.visual_tokens(params, ELASTIC, BATCH.images[0], budget=budget)[0], ELASTIC_PARAMS
    )
    assert tokens(None).shape == tokens(4).shape == (I, 4, 32) and tokens(1).shape == (I, 1, 32)
    with pytest.raises(ConfigError, match="4, 1"):
        vlm.loss({}, ELASTIC, BATCH, None, budget=3)


def test_only_training_with_a_key_is_random():
    key = jax.random.key(3)
    trace = lambda *key, **options: str(jax.make_jaxpr(functools.partial(elastic, budget=1, **options))(BATCH, *key))
    assert "random_bits" in trace(key, train=True)
    assert not any("random_bits" in text for text in (trace(key), trace(train=True), trace()))


def test_independent_rounds_are_the_questions_asked_alone():
    """A picture with two questions in branches of one conversation = two conversations with the picture each."""
    image = RNG.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    front, rounds = [1, 0, 5], ([7, 8, 9, 10], [11, 12, 13])
    supervised = [False, True, True, True], [False, False, True]
    alone = [
        dataclasses.replace(TALKS[0], tokens=front + r, supervised=[False] * 3 + s, images=[image])
        for r, s in zip(rounds, supervised, strict=True)
    ]
    shared = dataclasses.replace(
        alone[0], tokens=front + rounds[0] + rounds[1], supervised=[False] * 3 + supervised[0] + supervised[1]
    )
    branched = pack([[shared, TALKS[1]]], T, I)
    branches = np.zeros((1, T), np.int32)
    branches[0, 3:10] = [1, 1, 1, 1, 2, 2, 2]
    branched = dataclasses.replace(branched, branches=jnp.asarray(branches))
    ours, theirs = evaluate(branched), evaluate(pack([[alone[0]], [alone[1]], [TALKS[1]]], T, I))
    assert ours[0][1] == theirs[0][1]
    assert_same(ours, theirs)
    # Without branches the second question attends to the first: another loss.
    assert abs(evaluate(dataclasses.replace(branched, branches=None))[0][0] - ours[0][0]) > 1e-3

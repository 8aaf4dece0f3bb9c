"""The whole model on packed rows: the loss, its chunks, packing, images, budgets, recomputation, precision."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rows import SIDE, Conversation, assert_trees_close, conversation, jitter, pack

from deltallava_jax.config import DecoderConfig, ModelConfig, VisionConfig, compose
from deltallava_jax.models import vlm
from deltallava_jax.sequence import Batch, layout

VOCAB, T, I = 97, 20, 2
VISION = VisionConfig(image_size=SIDE, patch_size=8, width=32, layers=3, heads=2, mlp_width=48)
DECODER = DecoderConfig(vocab_size=VOCAB, width=32, layers=2, heads=4, kv_heads=2, mlp_width=48)
DELTA = dict(scale_factor=(1, 2, 4), head_dim=16, block_head_dim=8, rank=4, drop_path=0.5)
ELASTIC = compose(VISION, DECODER, DELTA, dtype="float32")
V = 4  # the budget of most tests
S = T + I * (V - 1)


@pytest.fixture(scope="module")
def params():
    return jitter(vlm.init_params(ELASTIC, jax.random.key(0)), scale=0.5)


@pytest.fixture(scope="module")
def talks() -> list[Conversation]:
    rng = np.random.default_rng(1)
    return [conversation(rng, 9, images=1), conversation(rng, 8, images=1), conversation(rng, 7)]


@pytest.fixture(scope="module")
def batch(talks) -> Batch:
    """Two rows of 20 tokens: two conversations with an image each; one with an image, one without, a place unused."""
    return pack([talks[:2], [talks[1], talks[2]]], T, I)


@functools.partial(jax.jit, static_argnames=("cfg", "budget", "train"))
def loss(params, batch, rng=None, *, cfg=ELASTIC, budget=V, train=False):
    return vlm.loss(params, cfg, batch, rng, train=train, budget=budget)


@functools.partial(jax.jit, static_argnames=("cfg",))
def loss_and_gradients(params, batch, cfg=ELASTIC):
    return jax.value_and_grad(lambda p: vlm.loss(p, cfg, batch, None, train=False, budget=V))(params)


@functools.partial(jax.jit, static_argnames=("cfg",))
def loss_sum(params, batch, cfg=ELASTIC):
    return vlm.loss_sum(params, cfg, batch, None, train=False, budget=V)


def changed(cfg: ModelConfig = ELASTIC, **changes) -> ModelConfig:
    return dataclasses.replace(cfg, **changes)


def cross_entropy(logits, batch: Batch, budget: int = V) -> float:
    """Mean over the supervised slots, in plain float64."""
    rows = layout(batch, None, budget)
    scores = np.asarray(logits, np.float64)[np.asarray(rows.loss_mask)]
    targets = np.asarray(rows.targets)[np.asarray(rows.loss_mask)]
    assert len(targets) == batch.loss_mask.sum() > 0
    return float(np.mean(np.log(np.exp(scores).sum(-1)) - scores[np.arange(len(targets)), targets]))


@pytest.fixture(scope="module")
def unchunked(params, batch):
    """(loss, gradients) with all logits of a row at once."""
    return loss_and_gradients(params, batch, changed(loss_chunk=S))


def test_loss_is_the_cross_entropy_of_the_logits(params, batch, unchunked):
    logits = jax.jit(lambda p: vlm.logits(p, ELASTIC, batch, budget=V))(params)
    assert logits.shape == (2, S, VOCAB) and logits.dtype == jnp.float32
    expected = cross_entropy(logits, batch)
    np.testing.assert_allclose(unchunked[0], expected, rtol=1e-6)
    assert abs(expected - np.log(VOCAB)) > 0.05  # the parameters are far from initialisation


@pytest.mark.parametrize("chunk", [1, 7, 13, 512])
def test_chunks_change_neither_loss_nor_gradients(params, batch, unchunked, chunk):
    """26 slots in chunks of one, chunks that divide it or not, and more than a row."""
    value, gradients = loss_and_gradients(params, batch, changed(loss_chunk=chunk))
    np.testing.assert_allclose(value, unchunked[0], rtol=1e-6)
    assert_trees_close(gradients, unchunked[1], atol=1e-6, rtol=1e-4)


def test_every_parameter_in_use_has_a_gradient(unchunked):
    """The tower up to its last layer needed, the projector and the decoder; none beyond."""
    gradients = unchunked[1]
    tower = gradients["vision"]
    used = [tower["embeddings"], gradients["projector"], gradients["decoder"]]
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(used))
    for leaf in jax.tree.leaves(tower["layers"]):  # select_layer -2: two of three layers
        assert np.abs(leaf[:2]).max() > 0 and not np.any(leaf[2])


@pytest.mark.parametrize("chunk, expected", [(S, True), (7, False)])
def test_logits_never_exist_all_at_once(params, batch, chunk, expected):
    """No array with a vocabulary axis and B * S * vocab or more elements is in the traced loss and gradient."""
    step = lambda p: loss_and_gradients(p, batch, changed(loss_chunk=chunk))  # noqa: E731
    shapes = [a.shape for a in arrays(jax.make_jaxpr(step)(params).jaxpr)]
    assert any(VOCAB in shape and np.prod(shape) == 2 * min(chunk, S) * VOCAB for shape in shapes)  # the search sees
    assert any(VOCAB in shape and np.prod(shape) >= 2 * S * VOCAB for shape in shapes) == expected


def arrays(jaxpr):
    """Every array that a jaxpr makes, those of inner jaxprs (scans, checkpoints) too."""
    for equation in jaxpr.eqns:
        yield from (variable.aval for variable in equation.outvars)
        for inner in jax.core.jaxprs_in_params(equation.params):
            yield from arrays(inner)


def test_parts_of_a_batch_add_up(params, batch):
    total, count = loss_sum(params, batch)
    parts = [loss_sum(params, jax.tree.map(lambda x: x[b : b + 1], batch)) for b in range(2)]  # noqa: B023
    np.testing.assert_allclose(total, sum(part[0] for part in parts), rtol=1e-6)
    assert count == sum(part[1] for part in parts) == batch.loss_mask.sum()
    assert parts[0][0] / parts[0][1] != parts[1][0] / parts[1][1]


def test_packing_changes_nothing(params, talks):
    """Two conversations with an image each in one row, or in two rows with an unused place each."""
    packed, unpacked = pack([talks[:2]], T, I), pack([talks[:1], talks[1:2]], T, I)
    np.testing.assert_allclose(loss(params, packed), loss(params, unpacked), atol=1e-5)
    rotated = pack([talks[1::-1]], T, I)
    np.testing.assert_allclose(loss(params, rotated), loss(params, packed), atol=1e-5)


def test_an_image_reaches_its_own_conversation_only(params, batch):
    """Other pixels for the first row's second image change its row's loss, not the other row's; nor do they
    change the row when the second conversation is unsupervised."""
    other = dataclasses.replace(batch, images=batch.images.at[0, 1].set(255 - batch.images[0, 1]))
    assert abs(loss(params, other) - loss(params, batch)) > 1e-4
    muted = lambda b: dataclasses.replace(b, loss_mask=b.loss_mask & (b.segments == 1))  # noqa: E731
    assert loss(params, muted(other)) == loss(params, muted(batch))


def test_unused_image_places_do_not_reach_the_loss(params, batch):
    assert (batch.image_positions[1] == jnp.array([1, T])).all()
    noise = np.random.default_rng(2).integers(0, 256, batch.images.shape[2:], dtype=np.uint8)
    filled = dataclasses.replace(batch, images=batch.images.at[1, 1].set(noise))
    before, after = loss_and_gradients(params, batch), loss_and_gradients(params, filled)
    assert before[0] == after[0]
    assert_trees_close(before[1], after[1], atol=1e-7)


def test_batch_without_images(params, talks, batch):
    """I = 0: the tower is not run, and the loss is that of text."""
    text = pack([talks[2:]], 12, 0)
    with_places = pack([talks[2:]], 12, I)
    value, gradients = loss_and_gradients(params, text)
    np.testing.assert_allclose(value, loss(params, with_places), atol=1e-5)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves([gradients["vision"], gradients["projector"]]))
    assert np.any(gradients["decoder"]["layers"]["q"]["kernel"])


def test_nothing_supervised_gives_zero(params, batch):
    value, gradients = loss_and_gradients(params, dataclasses.replace(batch, loss_mask=jnp.zeros_like(batch.loss_mask)))
    assert value == 0 and not any(np.any(leaf) for leaf in jax.tree.leaves(gradients))


def test_every_budget_of_an_elastic_model(params, batch):
    """Losses at 16, 4 and 1 tokens an image equal the fixed model's of that scale, and differ."""
    values = {budget: float(loss(params, batch, budget=budget)) for budget in (16, 4, 1)}
    assert np.isfinite(list(values.values())).all() and len(set(values.values())) == 3
    assert loss(params, batch, budget=None) == values[16]
    fixed = compose(VISION, DECODER, {**DELTA, "scale_factor": 4}, dtype="float32")
    assert loss(params, batch, cfg=fixed, budget=None) == values[1]


def test_training_drops_paths_and_evaluation_does_not(params, batch):
    keys = jax.random.split(jax.random.key(3), 2)
    quiet = loss(params, batch)
    assert loss(params, batch, keys[0]) == quiet
    noisy = [float(loss(params, batch, key, train=True)) for key in keys]
    assert noisy[0] != noisy[1] and float(quiet) not in noisy
    assert loss(params, batch, keys[0], train=True) == noisy[0]


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_recomputation_changes_nothing(params, batch, unchunked, remat):
    cfg = changed(loss_chunk=S, remat=remat)
    value, gradients = loss_and_gradients(params, batch, cfg)
    np.testing.assert_allclose(value, unchunked[0], rtol=1e-6)
    assert_trees_close(gradients, unchunked[1], atol=1e-6, rtol=1e-4)
    assert "checkpoint" in str(jax.make_jaxpr(lambda p: loss_and_gradients(p, batch, cfg))(params)) or "remat" in str(
        jax.make_jaxpr(lambda p: loss_and_gradients(p, batch, cfg))(params)
    )


def test_bfloat16_is_close(params, batch, unchunked):
    """Compute in bfloat16 with float32 parameters: float32 loss and gradients, near those of float32."""
    value, gradients = loss_and_gradients(params, batch, changed(dtype="bfloat16"))
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, unchunked[0], rtol=2e-2)
    flat = [np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]) for tree in (gradients, unchunked[1])]
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(gradients))
    assert flat[0] @ flat[1] > 0.99 * np.linalg.norm(flat[0]) * np.linalg.norm(flat[1])
    hidden = jax.eval_shape(lambda p: vlm.hidden_states(p, changed(dtype="bfloat16"), batch)[0], params)
    assert hidden.dtype == jnp.bfloat16

"""Draws follow the distribution that temperature, top-k, top-p and the repetition penalty define."""

import jax
import numpy as np
import pytest

from deltallava_jax.errors import ConfigError
from deltallava_jax.inference.sampling import Sampling, choose, controls, restrict

DRAWS, VOCAB = 10_000, 40
LOGITS = np.random.default_rng(0).normal(size=VOCAB).astype(np.float32) * 2


def softmax(scores):
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()


def expected(temperature=1.0, top_k=0, top_p=1.0):
    """The distribution by a sort, in the order of transformers: temperature, top-k, top-p."""
    scores = LOGITS.astype(np.float64) / temperature
    if top_k:
        scores[np.argsort(-scores)[top_k:]] = -np.inf
    probabilities = softmax(scores)
    order = np.argsort(-probabilities)
    needed = np.searchsorted(np.cumsum(probabilities[order]), top_p) + 1
    probabilities[order[needed:]] = 0
    return probabilities / probabilities.sum()


def draws(occurred=None, **settings):
    rows = controls([Sampling(**settings)], -1)
    rows = jax.tree.map(lambda x: np.repeat(x, DRAWS), rows)
    occurred = np.zeros(VOCAB, bool) if occurred is None else occurred
    spread = lambda x: np.broadcast_to(x, (DRAWS, VOCAB))
    return np.asarray(jax.jit(choose)(spread(LOGITS), spread(occurred), rows, np.arange(DRAWS)))


@pytest.mark.parametrize(
    "settings",
    [
        dict(temperature=1.0),
        dict(temperature=0.7, top_k=5),
        dict(temperature=1.0, top_p=0.8),
        dict(temperature=1.5, top_k=12, top_p=0.9),
    ],
    ids=str,
)
def test_ten_thousand_draws_follow_the_distribution(settings):
    """Chi-square over the tokens that 5 draws or more are expected of; none of any other."""
    probabilities, found = expected(**settings), np.bincount(draws(seed=1, **settings), minlength=VOCAB)
    assert not found[probabilities == 0].any()
    often = probabilities * DRAWS >= 5
    many, counted = probabilities[often] * DRAWS, found[often]
    rest = DRAWS - many.sum()
    statistic = ((counted - many) ** 2 / many).sum()
    if rest > 1:
        statistic += (found[~often].sum() - rest) ** 2 / rest
    freedom = often.sum() - 1
    # Wilson and Hilferty: the cube root of a chi-square is nearly normal; 3.7 deviations are 1 in 10,000.
    deviations = ((statistic / freedom) ** (1 / 3) - 1 + 2 / (9 * freedom)) / np.sqrt(2 / (9 * freedom))
    assert deviations < 3.7, statistic
    assert often.sum() > 3


@pytest.mark.parametrize("settings", [dict(), dict(top_k=1), dict(top_k=7), dict(top_k=99), dict(top_p=0.5),
                                      dict(top_p=1e-6), dict(top_k=9, top_p=0.6)], ids=str)  # fmt: skip
def test_what_is_kept(settings):
    top_k, top_p = settings.get("top_k", 0), settings.get("top_p", 1.0)
    kept = restrict(LOGITS[None], np.array([top_k]), np.array([top_p], np.float32))
    np.testing.assert_array_equal(np.isfinite(kept[0]), expected(**{**settings, "top_k": min(top_k, VOCAB)}) > 0)
    np.testing.assert_array_equal(np.where(np.isfinite(kept), LOGITS, 0), np.where(np.isfinite(kept), kept, 0))


def test_equal_seeds_draw_alike_and_others_do_not():
    first, again, other = (draws(temperature=1.0, seed=seed) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first, again)
    assert (first != other).mean() > 0.5


def test_without_a_seed_each_is_another_and_its_seed_repeats_it():
    rows = [Sampling(temperature=1.0).seeded() for _ in range(8)]
    assert len({row.seed for row in rows}) > 1 and all(row.seeded() == row for row in rows)
    drawn = lambda seed=None: tuple(draws(temperature=1.0, seed=seed)[:40])
    assert drawn() != drawn()
    assert drawn(rows[0].seed) == drawn(rows[0].seed)


@pytest.mark.parametrize(
    "settings", [dict(temperature=1e-38), dict(temperature=1e-7), dict(temperature=1.0, top_p=1e-300)]
)
def test_settings_too_small_for_the_device_take_the_most_likely_token(settings):
    assert (draws(**settings) == LOGITS.argmax()).all()


def test_the_repetition_penalty_divides_positive_and_multiplies_negative_logits():
    occurred = np.arange(VOCAB) % 2 == 0
    scores = np.where(occurred, np.where(LOGITS > 0, LOGITS / 3, LOGITS * 3), LOGITS)
    assert (draws(occurred, repetition_penalty=3.0) == scores.argmax()).all()
    found = np.bincount(draws(occurred, repetition_penalty=3.0, temperature=1.0), minlength=VOCAB) / DRAWS
    np.testing.assert_allclose(found, softmax(scores), atol=0.02)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        (dict(temperature=-1), "temperature=-1; expected 0"),
        (dict(temperature=10**400), "temperature=10+[.]+.*; expected 0"),
        (dict(repetition_penalty=1e-300), "repetition_penalty=1e-300; expected 1e-09 to 1e.09"),
        (dict(stop=5), "stop=5; expected a text or a list"),
        (dict(stop=[5]), "stop=.5.; expected a text or a list"),
        (dict(temperature=float("nan")), "temperature=nan"),
        (dict(top_p=0), "top_p=0; expected above 0, to 1"),
        (dict(top_k=2.5), "top_k=2.5; expected a whole number"),
        (dict(repetition_penalty=0), "repetition_penalty=0"),
        (dict(max_new_tokens=0), "max_new_tokens=0; expected a whole number, 1 or more"),
        (dict(max_new_tokens="8"), "max_new_tokens='8'"),
        (dict(seed=-1), "seed=-1"),
        (dict(stop=("",)), "stop=.*none of them empty"),
    ],
)
def test_settings_out_of_range(setting, words):
    with pytest.raises(ConfigError, match=words):
        Sampling(**setting)

"""Sampling of the next token: greedy, or with temperature, top-k, top-p and a repetition penalty, per row.

Every setting is an array over the rows, so that requests with different settings share one compiled step."""

from __future__ import annotations

import dataclasses
import reprlib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from deltallava_jax.config.checks import nearest
from deltallava_jax.errors import ConfigError

GREEDY_BELOW = 1e-5  # temperatures below this are greedy
EXTREME = 1e9  # largest temperature or penalty: beyond any use, and far from overflowing float32


@dataclass(frozen=True)
class Sampling:
    """How an answer is sampled and when it ends.

    temperature: 0 takes the most likely token, and so does anything below 1e-5. top_k: only the k most likely tokens;
    0: all. top_p: only the most likely tokens that together reach this probability. repetition_penalty: divides the
    positive logits of tokens in the prompt or the answer, and multiplies the negative ones. seed: equal seeds give
    equal answers, whatever else is in the batch; None: a new one for each answer. max_new_tokens: the longest answer.
    stop: texts that end the answer and are not part of it. Raises ConfigError for a value out of
    range."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    max_new_tokens: int = 128
    stop: tuple[str, ...] = ()

    def __post_init__(self):
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        if not isinstance(stop, (list, tuple)) or not all(isinstance(text, str) and text for text in stop):
            raise ConfigError(f"stop={reprlib.repr(self.stop)}; expected a text or a list of texts, none of them empty")
        object.__setattr__(self, "stop", tuple(stop))
        for name, good, expected in (
            ("temperature", lambda x: 0 <= x <= EXTREME, f"0 (greedy) to {EXTREME:g}"),
            ("top_k", lambda x: 0 <= x < 2**31 and x == int(x), "a whole number, 0 (all) or more"),
            ("top_p", lambda x: 0 < x <= 1, "above 0, to 1"),
            ("repetition_penalty", lambda x: 1 / EXTREME <= x <= EXTREME, f"{1 / EXTREME:g} to {EXTREME:g}"),
            ("seed", lambda x: 0 <= x < 2**32 and x == int(x), "a whole number from 0 to 2**32 - 1"),
            ("max_new_tokens", lambda x: 1 <= x < 2**31 and x == int(x), "a whole number, 1 or more"),
        ):
            value = getattr(self, name)
            if name == "seed" and value is None:
                continue
            if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, float, np.number)) or not good(value):
                raise ConfigError(f"{name}={reprlib.repr(value)}; expected {expected}")

    @classmethod
    def of(cls, settings: dict) -> Sampling:
        """Raises TypeError for a name that is no field, ConfigError for a value out of range."""
        known = [field.name for field in dataclasses.fields(cls)]
        for name in settings:
            if name not in known:
                raise TypeError(f"unknown argument {name!r}{nearest(name, known)}")
        return cls(**settings)

    def seeded(self) -> Sampling:
        """The same with a seed: the given one, or a random one from the operating system."""
        return self if self.seed is not None else dataclasses.replace(self, seed=secrets.randbits(32))


GREEDY = Sampling()


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Controls:
    """``Sampling`` of B rows on the device. end: the token that ends an answer, -1 for none."""

    temperature: Float[Array, " B"]
    top_k: Int[Array, " B"]
    top_p: Float[Array, " B"]
    penalty: Float[Array, " B"]
    seed: UInt32[Array, " B"]
    limit: Int[Array, " B"]
    end: Int[Array, " B"]


def controls(rows: Sequence[Sampling], end: int) -> Controls:
    """The settings of rows as numpy arrays, which jitted functions take directly. A row without a seed gets one."""
    rows = [row.seeded() for row in rows]

    def column(name: str, dtype) -> np.ndarray:
        return np.array([getattr(row, name) for row in rows], dtype)

    return Controls(
        temperature=np.array([row.temperature if row.temperature >= GREEDY_BELOW else 0 for row in rows], np.float32),
        top_k=column("top_k", np.int32),
        top_p=np.maximum(column("top_p", np.float32), np.finfo(np.float32).tiny),  # 0 would keep no token
        penalty=column("repetition_penalty", np.float32),
        seed=column("seed", np.uint32),
        limit=column("max_new_tokens", np.int32),
        end=np.full(len(rows), end, np.int32),
    )


def choose(
    logits: Float[Array, "B vocab"], occurred: Bool[Array, "B vocab"], controls: Controls, drawn: Int[Array, " B"]
) -> Int[Array, " B"]:
    """The next token of each row. occurred: tokens under the repetition penalty. drawn: tokens of the answer so far;
    it and the seed make the row's random key, so that a row's samples do not depend on the rest of the batch."""
    greedy = controls.temperature == 0

    def draw() -> Int[Array, " B"]:
        penalty = jnp.where(occurred, controls.penalty[:, None], 1.0)
        scores = jnp.where(logits > 0, logits / penalty, logits * penalty)
        kept = restrict(scores / jnp.where(greedy, 1.0, controls.temperature)[:, None], controls.top_k, controls.top_p)
        key = jax.vmap(lambda seed, count: jax.random.fold_in(jax.random.key(seed), count))(controls.seed, drawn)
        noise = jax.vmap(lambda k: jax.random.gumbel(k, logits.shape[1:]))(key)
        return jnp.argmax(jnp.where(greedy[:, None], scores, kept + noise), axis=-1)

    with jax.named_scope("choose"):
        plain = (greedy & (controls.penalty == 1)).all()
        return jax.lax.cond(plain, lambda: jnp.argmax(logits, axis=-1), draw).astype(jnp.int32)


def restrict(
    scores: Float[Array, "B vocab"], top_k: Int[Array, " B"], top_p: Float[Array, " B"]
) -> Float[Array, "B vocab"]:
    """Scores with -inf where top-k, then top-p of what is left, exclude a token. Equal scores stay or go together."""
    vocab = scores.shape[1]
    ones = jnp.ones_like(scores)
    scores = _most_likely(scores, ones, jnp.where(top_k > 0, jnp.minimum(top_k, vocab), vocab).astype(jnp.float32))
    return _most_likely(scores, jax.nn.softmax(scores, axis=-1), jnp.where(top_p < 1, top_p, jnp.inf))


def _most_likely(
    scores: Float[Array, "B vocab"], weights: Float[Array, "B vocab"], target: Float[Array, " B"]
) -> Float[Array, "B vocab"]:
    """The highest scores whose weights together reach the target, -inf for the others.

    A sort would cost more than a small model's whole step; instead the threshold is found bit by bit, on integers in
    the order of the scores."""
    bits = jax.lax.bitcast_convert_type(scores, jnp.uint32)
    order = jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))

    def bit(place, threshold):
        raised = threshold | (jnp.uint32(1) << (31 - place).astype(jnp.uint32))
        reached = jnp.where(order >= raised[:, None], weights, 0).sum(-1) >= target
        return jnp.where(reached, raised, threshold)

    threshold = jax.lax.fori_loop(0, 32, bit, jnp.zeros(scores.shape[:1], jnp.uint32))
    return jnp.where(order >= threshold[:, None], scores, -jnp.inf)

"""The host side of the engine: from prompts to tokens and text. Its device side is slots.py."""

from __future__ import annotations

import functools
import reprlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, UInt8

from deltallava_jax.config import ModelConfig
from deltallava_jax.data import cache
from deltallava_jax.data.conversation import Tokenized
from deltallava_jax.errors import ConfigError
from deltallava_jax.inference import slots as device
from deltallava_jax.inference.sampling import GREEDY, Sampling, controls
from deltallava_jax.inference.slots import CHUNK, Slots
from deltallava_jax.inference.text import Text
from deltallava_jax.kernels import tuning
from deltallava_jax.models import decoder, systems
from deltallava_jax.models.layers import Params
from deltallava_jax.sequence import Batch

STREAMED = 4  # tokens decoded between two updates of an answer's text


def bucket(length: int) -> int:
    """The padded length for a length: 16, 24, 32, 48, 64, 96, ...: few shapes to compile, little padding."""
    size = 16
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size // 3 * 4
    return size


def prompt_batch(prompts: Sequence[Tokenized], length: int) -> Batch:
    """Prompts, one per row, padded on the right to ``length`` text tokens; without pixels.

    Raises ValueError for a prompt that is longer or empty."""
    images = max(len(prompt.image_positions) for prompt in prompts)
    batch = Batch.empty(len(prompts), length, images, question=prompts[0].questions.shape[1])
    for row, prompt in enumerate(prompts):
        count = len(prompt.ids)
        if not 0 < count <= length:
            raise ValueError(f"a prompt has {count} tokens; expected 1 to {length}")
        batch.tokens[row, :count] = prompt.ids
        batch.segments[row, :count] = 1
        batch.image_positions[row, : len(prompt.image_positions)] = prompt.image_positions
        if batch.questions is not None:
            batch.questions[row, : len(prompt.questions)] = prompt.questions
    return batch


class Engine:
    """The compiled functions over a model's weights, in the form of ``decoder.unstacked``.

    engine = Engine(params, cfg)
    visual, valid = engine.encode(pixels, prompts, budget=16)
    ids = engine.tokens(prompts, visual, valid, Sampling(max_new_tokens=32), end=tokenizer.eos)

    params: as ``deltallava_jax.load`` reads them, on one device or sharded; with a decoder in its training form a
    second copy of it is made. Raises ConfigError for a model without a decoder."""

    def __init__(self, params: Params, cfg: ModelConfig):
        if cfg.decoder is None:
            raise ConfigError("the model has no decoder, so it cannot answer")
        tuning.recall(tuning.file(cache.folder()))
        self.cfg = cfg
        self.params = {**params, "decoder": decoder.unstacked(params["decoder"], cfg.decoder, cfg.dtype)}
        self._weights = sum(leaf.nbytes for leaf in jax.tree.leaves(self.params["decoder"]))

    def encode(
        self, images: UInt8[np.ndarray, "n H W 3"], prompts: Batch | None = None, *, budget: int | None = None
    ) -> tuple[Float[Array, "n V d"], Bool[Array, "n V"] | None]:
        """Visual tokens of images, which fill the image places of ``prompts`` row by row, and which of them are valid.

        Raises ConfigError as ``budget``, ValueError where ``prompts`` has another number of places."""
        budget = self.budget(budget)
        if prompts is not None:
            _require_matching_images(prompts, len(images))
        if not len(images):
            return np.zeros((0, 1, self.cfg.decoder.width), self.cfg.dtype), None
        questions = prompts if systems.reads_question(self.cfg.projector) else None
        return device.encode(self.params, self.cfg, images, questions, budget=budget)

    def budget(self, requested: int | None) -> int:
        """Visual tokens per image: ``requested``, by default the most (1 for a decoder alone, which takes no images).

        Raises ConfigError for a number that the projector does not make."""
        if requested is not None and (isinstance(requested, bool) or not isinstance(requested, (int, np.integer))):
            raise ConfigError(f"budget={reprlib.repr(requested)}; expected a whole number of visual tokens per image")
        if self.cfg.whole:
            try:
                return systems.check_budget(self.cfg.projector, requested)
            except ConfigError as error:
                raise ConfigError(f"budget: {error}") from error
        if requested is not None:
            raise ConfigError(f"budget={requested}: the model has no vision tower, so it takes no images")
        return 1

    def prefill(
        self,
        prompts: Batch,
        visual: Float[Array, "n V d"],
        valid: Bool[Array, "n V"] | None,
        sampling: Sequence[Sampling],
        end: int,
        *,
        capacity: int = 0,
    ) -> Slots:
        """Slots, one per row, with the prompts in their caches, the first token, and space for the longest answer.

        capacity: tokens that a slot holds; 0: the smallest bucket that suffices. Raises ValueError where the numbers of
        image places and images differ."""
        _require_matching_images(prompts, len(visual))
        answer = max(row.max_new_tokens for row in sampling)
        capacity = capacity or bucket(self.row_length(prompts, visual.shape[1]) + answer)
        return device.prefill(
            self.params, self.cfg, prompts, visual, valid, controls(sampling, end), capacity=capacity
        )  # fmt: skip

    def extend(
        self,
        slots: Slots,
        prompts: Batch,
        visual: Float[Array, "n V d"],
        valid: Bool[Array, "n V"] | None,
        sampling: Sampling,
        end: int,
    ) -> Slots:
        """Continues one conversation with its caches, which grow where the next turn does not fit.

        Raises ValueError as ``prefill``."""
        _require_matching_images(prompts, len(visual))
        cache = slots.caches[0]
        needed = int(cache.length[0]) + self.row_length(prompts, visual.shape[1]) + sampling.max_new_tokens
        if needed > min(cache.live.shape[1] for cache in slots.caches):
            slots = device.insert(
                device.empty(self.cfg, slots.controls, rows=1, capacity=bucket(needed)), slots, 0
            )  # fmt: skip
        return device.extend(self.params, self.cfg, slots, prompts, visual, valid, controls([sampling], end))

    def decode(self, slots: Slots, steps: int = CHUNK) -> tuple[Slots, list[list[int]]]:
        """Up to ``steps`` further tokens of every active slot."""
        read = device.read_lengths(slots, steps, self._weights)
        slots, out = device.decode(self.params, self.cfg, slots, steps, read=read)
        return slots, [[int(token) for token in row if token >= 0] for row in np.asarray(out)]

    def tokens(
        self,
        prompts: Batch,
        visual: Float[Array, "n V d"] | None = None,
        valid: Bool[Array, "n V"] | None = None,
        sampling: Sampling | Sequence[Sampling] = GREEDY,
        *,
        end: int,
    ) -> list[list[int]]:
        """The answer of each row up to and including ``end`` (-1: none). Only ``Answer`` handles stop texts."""
        rows = len(prompts.tokens)
        sampling = [sampling] * rows if isinstance(sampling, Sampling) else sampling
        if visual is None:
            visual, valid = self.encode(np.zeros((0,)))
        slots = self.prefill(prompts, visual, valid, sampling, end)
        answers = [[token] for token in np.asarray(slots.token).tolist()]
        while np.asarray(slots.active).any():
            slots, new = self.decode(slots)
            for answer, more in zip(answers, new, strict=True):
                answer += more
        return answers

    @staticmethod
    def row_length(prompts: Batch, budget: int) -> int:
        """Tokens of a row whose images take ``budget`` each."""
        return prompts.tokens.shape[1] + prompts.image_positions.shape[1] * (budget - 1)


def _require_matching_images(prompts: Batch, images: int) -> None:
    """Raises ValueError unless each place has an image: others would become NaN, surplus images be dropped."""
    rows, places = prompts.image_positions.shape
    if rows * places != images:
        raise ValueError(f"{rows} prompts with {places} image places each, but {images} images")


class Clock:
    """Seconds spent in ``with clock:`` blocks; tracing and compiling are measured separately."""

    def __init__(self):
        self.seconds = 0.0
        self.compiling = 0.0

    def __enter__(self):
        _listen()
        _programs.spans = []
        self._began = time.perf_counter()

    def __exit__(self, *_):
        end = time.perf_counter()
        compiling = 0.0
        reached = self._began
        spans = _programs.__dict__.pop("spans")
        for begin, until in sorted(spans):  # spans nest: each second counts once
            compiling += max(until - max(begin, reached), 0)
            reached = max(until, reached)
        self.seconds += end - self._began - compiling
        self.compiling += compiling


_programs = threading.local()  # spans: (start, end) of this thread's tracing and compiling since its clock started


@functools.cache
def _listen() -> None:
    def record(event: str, seconds: float, **_) -> None:
        if event.startswith("/jax/core/compile/") and hasattr(_programs, "spans"):
            now = time.perf_counter()
            _programs.spans.append((now - seconds, now))

    jax.monitoring.register_event_duration_secs_listener(record)


class Answer:
    """A streamed answer: iterate over it for the pieces of its text.

    text, tokens (their number), finish ("stop", "length" or "cancelled"): of the answer so far. seed: of its sampling.
    seconds_to_first, seconds: from the start to the first and to the last token, excluding the caller's time between
    two pieces and seconds_compiling."""

    def __init__(
        self, engine: Engine, begin: Callable[[Sampling], Slots], text: Text, sampling: Sampling, stride: int = STREAMED
    ):
        """begin: makes the slots, given a sampling with a seed."""
        self._engine = engine
        self._begin = begin
        self._text = text
        self._stride = stride
        self._sampling = sampling.seeded()
        self._clock = Clock()
        self._cancelled = False
        self.seed = self._sampling.seed
        self.slots: Slots | None = None
        self.decoded: list[int] = []  # by the device, possibly past a stop text
        self.tokens = 0
        self.seconds_to_first = 0.0

    def __iter__(self) -> Iterator[str]:
        with self._clock:
            self.slots = self._begin(self._sampling)
            new = np.asarray(self.slots.token).tolist()
        self.seconds_to_first = self.seconds
        while True:
            self.decoded += new
            for token in new:
                self.tokens += 1
                piece = self._text.add(token)
                if piece:
                    yield piece
                if self._text.finish:
                    break
            if self._text.finish or self._cancelled or not bool(self.slots.active[0]):
                break
            with self._clock:
                self.slots, (new,) = self._engine.decode(self.slots, self._stride)
        rest = self._text.close()
        if rest:
            yield rest

    @property
    def seconds(self) -> float:
        return self._clock.seconds

    @property
    def seconds_compiling(self) -> float:
        return self._clock.compiling

    @property
    def text(self) -> str:
        return self._text.text

    @property
    def finish(self) -> str | None:
        return "cancelled" if self._cancelled and self._text.finish == "length" else self._text.finish

    @property
    def ids(self) -> list[int]:
        """The tokens of the text."""
        return self._text.ids

    def cancel(self) -> None:
        """Ends the answer at its current tokens; may be called from a signal handler or another thread."""
        self._cancelled = True

    def whole(self) -> str:
        """The text of the whole answer."""
        for _ in self:
            pass
        return self.text


def halted(slots: Slots, back: int) -> Slots:
    """One conversation after its answer, with the last ``back`` tokens removed from its caches."""
    return device.halt(slots, np.ones(1, bool), np.full(1, back, np.int32))

"""Continuous batching: requests enter and leave a fixed number of cache slots while others are being answered.

One thread owns the engine. It alternates between prefilling waiting prompts into free slots and decoding a few tokens
in all slots. Each request gets the tokens that it would get alone."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from deltallava_jax.data.conversation import Tokenized
from deltallava_jax.errors import Busy, ConfigError
from deltallava_jax.inference import slots as device
from deltallava_jax.inference.generate import STREAMED, bucket, prompt_batch
from deltallava_jax.inference.model import Model
from deltallava_jax.inference.sampling import GREEDY, Sampling, controls
from deltallava_jax.inference.text import Text


@dataclass
class Request:
    """A prompt and its answer. sampling: gets a seed, if it has none. cancelled: the client no longer waits for it.
    on_piece(text, finish) is called in the scheduler's thread with each piece of the answer; finish is None until the
    last piece: "stop", "length", or "error" with a message as the text."""

    prompt: Tokenized
    pixels: np.ndarray
    budget: int | None
    sampling: Sampling
    on_piece: Callable[[str, str | None], None]
    began: float = field(default_factory=time.perf_counter)
    tokens: int = 0
    cancelled: bool = False
    text: Text | None = None

    def __post_init__(self):
        self.sampling = self.sampling.seeded()


class Scheduler:
    """rows: slots, each of which serves one request at a time. context: tokens of a slot's cache. waiting: requests
    that may wait. Raises ConfigError for rows or context below 1.

    counts: of requests, tokens and seconds to the first token, for monitoring."""

    def __init__(self, model: Model, *, rows: int = 8, context: int = 1024, waiting: int = 256):
        for name, value in (("slots", rows), ("context", context)):
            if value < 1:
                raise ConfigError(f"--{name} {value}: expected 1 or more")
        self.model = model
        self.rows = rows
        self.context = context
        self.counts = {"requests": 0, "errors": 0, "cancelled": 0, "tokens": 0, "first_token_seconds": 0.0}
        self._queue: queue.Queue[Request | None] = queue.Queue(waiting)
        self._running: dict[int, Request] = {}
        self._slots = self._empty()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="scheduler", daemon=True)
        self._thread.start()

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        return self._queue.qsize()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def answer_capacity(self, prompt: Tokenized, budget: int | None) -> int:
        """Tokens that the answer to a prompt can have in a slot. Raises ConfigError for a budget not offered."""
        images = len(prompt.image_positions) * (self.model.engine.budget(budget) - 1)
        return self.context - bucket(len(prompt.ids)) - images

    def submit(self, request: Request) -> None:
        """Queues a request. Raises ConfigError for one that does not fit into a slot, Busy where too many wait."""
        places = len(request.prompt.image_positions)
        images = len(request.pixels)
        if places != images:
            raise ConfigError(f"the prompt has {places} image places, but there are {images} images")
        capacity = self.answer_capacity(request.prompt, request.budget)
        answer = request.sampling.max_new_tokens
        if answer > capacity:
            raise ConfigError(
                f"a prompt of {self.context - capacity} tokens (padded) and max_tokens={answer} do not fit into a slot "
                f"of {self.context} tokens"
            )
        if self._closing.is_set():
            raise Busy("the server is shutting down")
        try:
            self._queue.put_nowait(request)
        except queue.Full:
            raise Busy(f"{self.waiting} requests are waiting already; try again later") from None

    def close(self) -> None:
        """Answers the submitted requests, then ends the thread."""
        self._closing.set()
        self._thread.join()

    # ------------------------------------------------------------------ the thread

    def _empty(self):
        return device.empty(
            self.model.cfg, controls([GREEDY] * self.rows, self.model.end), rows=self.rows, capacity=self.context
        )  # fmt: skip

    def _loop(self) -> None:
        while self._running or not (self._closing.is_set() and self._queue.empty()):
            self._admit()
            if not self._running:
                continue
            try:
                self._slots, new = self.model.engine.decode(self._slots, STREAMED)
                active = np.asarray(self._slots.active)
            except Exception as error:  # e.g. out of device memory: these answers are lost, later ones are not
                for row, request in list(self._running.items()):
                    self._fail(row, request, f"{type(error).__name__}: {error}")
                self._slots = self._empty()
                continue
            for row, request in list(self._running.items()):
                self._advance(row, request, new[row], bool(active[row]))

    def _admit(self) -> None:
        free = [row for row in range(self.rows) if row not in self._running]
        while free:
            try:
                request = self._queue.get(timeout=None if self._running else 0.1, block=not self._running)
            except queue.Empty:
                return
            if request.cancelled:
                self.counts["cancelled"] += 1
                continue
            row = free.pop(0)
            try:
                one = self._prefill(request)
                token = int(one.token[0])
                active = bool(one.active[0])
                self._slots = device.insert(self._slots, one, row)
            except Exception as error:
                self._fail(row, request, f"{type(error).__name__}: {error}")
                continue
            self._running[row] = request
            self.counts["first_token_seconds"] += time.perf_counter() - request.began
            self._advance(row, request, [token], active)

    def _prefill(self, request: Request) -> device.Slots:
        engine = self.model.engine
        request.text = Text(self.model.tokenizer, self.model.end, request.sampling.stop)
        batch = prompt_batch([request.prompt], bucket(len(request.prompt.ids)))
        visual, valid = engine.encode(request.pixels, batch, budget=request.budget)
        return engine.prefill(batch, visual, valid, [request.sampling], self.model.end, capacity=self.context)

    def _advance(self, row: int, request: Request, tokens: list[int], active: bool) -> None:
        text = request.text
        piece = ""
        for token in tokens:
            if text.finish is None:
                request.tokens += 1
                self.counts["tokens"] += 1
                piece += text.add(token)
        if not active and text.finish is None:
            piece += text.close()
        if request.cancelled:
            self.counts["cancelled"] += 1
        elif piece or text.finish:
            self._emit(request, piece, text.finish)
        if text.finish or request.cancelled:
            self.counts["requests"] += 1
            del self._running[row]
            if active:
                mask = np.arange(self.rows) == row
                self._slots = device.halt(self._slots, mask, np.zeros(self.rows, np.int32))

    def _fail(self, row: int, request: Request, message: str) -> None:
        self.counts["errors"] += 1
        self._running.pop(row, None)
        self._emit(request, message, "error")

    @staticmethod
    def _emit(request: Request, text: str, finish: str | None) -> None:
        try:
            request.on_piece(text, finish)
        except Exception:  # this client has disconnected; the others have not
            request.cancelled = True

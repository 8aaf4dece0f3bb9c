"""A loaded model: tower, projector, decoder, tokenizer and template in one object, which answers questions."""

from __future__ import annotations

import dataclasses
import functools
import os
import reprlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from deltallava_jax.config import ModelConfig
from deltallava_jax.data.conversation import (
    TEMPLATES,
    Conversation,
    Tokenized,
    end_id,
    end_ids,
    known_template,
    prompt_conversation,
    tokenize,
)
from deltallava_jax.data.images import load_image
from deltallava_jax.data.tokens import Tokenizer
from deltallava_jax.errors import ConfigError
from deltallava_jax.inference.generate import Answer, Engine, bucket, halted, prompt_batch
from deltallava_jax.inference.sampling import Sampling
from deltallava_jax.inference.text import Text
from deltallava_jax.models import systems
from deltallava_jax.models.layers import Params

Picture = str | Path | bytes | np.ndarray | Image.Image  # a file, its bytes, pixels uint8 [H, W, 3], or a PIL image
Pictures = Picture | Sequence[Picture] | None


@dataclass(repr=False)
class Model:
    """What ``deltallava_jax.load`` returns. ``tokenizer`` is None where the checkpoint holds none.

    params: the decoder in the form of ``decoder.unstacked``. template: None for a decoder alone that continues plain
    texts. aspect: how images become square, as in DataConfig."""

    cfg: ModelConfig
    params: Params
    tokenizer: Tokenizer | None
    template: str | None = "vicuna_v1"
    aspect: str = "square"

    def __repr__(self) -> str:
        """Three lines: the parts and their parameters, the visual tokens per image, tokenizer and template."""
        parts = []
        for part, tree in self.params.items():
            name = f"{self.cfg.projector.name} projector" if part == "projector" else part
            size = sum(leaf.size for leaf in jax.tree.leaves(tree))
            if size:
                parts.append(f"{name} {_short(size)}")
        tokens = "none"
        if self.cfg.projector:
            tokens = ", ".join(map(str, systems.budgets(self.cfg.projector))) + f" ({self.aspect} images)"
        words = "none" if self.tokenizer is None else f"{self.tokenizer.vocab_size:,} tokens"
        return (
            f"Model of {', '.join(parts)} parameters, computing in {self.cfg.dtype}\n"
            f"  visual tokens per image: {tokens}\n"
            f"  tokenizer: {words}; template: {self.template}"
        )

    def with_template(self, name: str) -> Model:
        """The same model with another template. Raises ConfigError for an unknown template, or one whose end of an
        answer is no token of this tokenizer."""
        known_template(name, self.tokenizer)
        return dataclasses.replace(self, template=name)

    @functools.cached_property
    def engine(self) -> Engine:
        return Engine(self.params, self.cfg)

    def generate(
        self,
        images: Pictures,
        prompt: str,
        *,
        budget: int | None = None,
        on_text: Callable[[str], None] | None = None,
        **sampling,
    ) -> str:
        """The answer to a prompt about one image, several, or none.

            model = deltallava_jax.load("runs/easy_vqa")
            model.generate("shape.png", "what color is the shape?", budget=16)
            model.generate(["a.png", "b.png"], "what changed?", temperature=0.7, top_p=0.9, seed=1)

        images: a file, its bytes, pixels (uint8 [H, W, 3]), a PIL image, or a list of them. budget: visual tokens per
        image, the projector's largest by default. on_text: called with each piece of the text as it is generated.
        sampling: fields of ``Sampling``; greedy, up to 128 tokens by default. A decoder alone continues the plain
        prompt, in which special tokens are given by name. Before computing anything it raises TypeError for an
        argument of another type or name, ConfigError for a setting or budget out of range or a model that lacks a
        part, BadSample for an image that cannot be read."""
        answer = self.stream(images, prompt, budget=budget, **sampling)
        for piece in answer:
            if on_text:
                on_text(piece)
        return answer.text

    def stream(self, images: Pictures, prompt: str, *, budget: int | None = None, **sampling) -> Answer:
        """The same answer piece by piece; afterwards it has its number of tokens, seconds and finish.

            model = deltallava_jax.load("runs/easy_vqa")
            answer = model.stream("shape.png", "what color is the shape?", budget=16)
            for piece in answer:
                print(piece, end="", flush=True)
            print(answer.tokens, answer.seconds_to_first, answer.seconds, answer.finish)

        Arguments and errors as of ``generate``."""
        settings = Sampling.of(sampling)
        _require_prompt_and_images(prompt, images)
        prompted = self.ask([(prompt, None)], images)
        return self.answer(prompted, self.pixels(images), settings, budget=budget)

    def chat(self, *, budget: int | None = None, **sampling) -> Chat:
        """A conversation: an image is encoded once, and each turn prefills only its new tokens.

            model = deltallava_jax.load("runs/easy_vqa")
            chat = model.chat(budget=16, max_new_tokens=32)
            chat.ask("what color is the shape?", "shape.png")
            for piece in chat.stream("and what shape is it?"):
                print(piece, end="", flush=True)

        budget and sampling as of ``generate``, for all answers; with a seed, each answer uses the next one."""
        return Chat(self, budget, Sampling.of(sampling))

    # ------------------------------------------------------------------ the parts of an answer

    def ask(
        self,
        pairs: list[tuple[str, str | None]],
        images: Pictures = None,
        *,
        system: str | None = None,
        continues: bool = False,
    ) -> Tokenized:
        """(question, answer) pairs up to a question, formatted by the model's template; ``<image>`` in a question is
        the place of an image, and without any the images go before the last question.

        system: replaces the template's system text. continues: the prompt follows an answer. Raises ConfigError as
        ``generate``."""
        return self.prompt(prompt_conversation(pairs, len(_listed(images)), system), continues=continues)

    def prompt(self, conversation: Conversation, *, continues: bool = False) -> Tokenized:
        """A conversation up to a question, formatted by the model's template. Raises ConfigError as ``generate``, and
        for more than one question to a decoder alone without a template."""
        if self.cfg.decoder is None:
            raise ConfigError("the model has no decoder, so it cannot answer")
        if self.tokenizer is None:
            raise ConfigError("the checkpoint holds no tokenizer; put its tokenizer.json beside the weights")
        if conversation.images and not self.cfg.whole:
            raise ConfigError("the model has no vision tower, so it takes no images")
        if self.template is not None:
            tokenized = tokenize(
                conversation, TEMPLATES[self.template], self.tokenizer, continues=continues,
                question_length=systems.question_length(self.cfg.projector),
            )  # fmt: skip
        elif len(conversation.rounds) > 1 or conversation.system:
            raise ConfigError(
                "a decoder alone continues one text; for earlier turns or a system text it needs a template "
                f"(--template, or load(..., template=)): {', '.join(TEMPLATES)}"
            )
        else:
            tokenized = plain_prompt("".join(conversation.rounds[0].parts), self.tokenizer, continues=continues)
        if not len(tokenized.ids):
            raise ConfigError("the prompt is empty")
        return tokenized

    def pixels(self, images: Pictures) -> np.ndarray:
        """uint8 [n, H, W, 3] of the tower's size. Raises BadSample for an image that cannot be read."""
        images = _listed(images)
        if not images:
            return np.zeros((0, 0, 0, 3), np.uint8)
        size = self.cfg.vision.image_size
        fill = self.cfg.vision.mean_color
        return np.stack([load_image(image, size, self.aspect, fill) for image in images])

    def answer(self, prompt: Tokenized, pixels: np.ndarray, sampling: Sampling, *, budget: int | None = None) -> Answer:
        """The answer to a tokenized prompt about pixels of the tower's size."""
        self.engine.budget(budget)
        batch = prompt_batch([prompt], bucket(len(prompt.ids)))

        def begin(sampling: Sampling):
            visual, valid = self.engine.encode(pixels, batch, budget=budget)
            return self.engine.prefill(batch, visual, valid, [sampling], self.end)

        return Answer(self.engine, begin, Text(self.tokenizer, self.end, sampling.stop), sampling)

    @property
    def end(self) -> int:
        """The token that ends an answer."""
        if self.template is None:
            return -1 if self.tokenizer.eos is None else self.tokenizer.eos
        return end_id(TEMPLATES[self.template], self.tokenizer)


class Chat:
    """Turns of one conversation over one key-value cache. After each, ``last`` is its ``Answer``."""

    def __init__(self, model: Model, budget: int | None, sampling: Sampling):
        model.engine.budget(budget)
        self.model = model
        self.budget = budget
        self.sampling = sampling
        self.reset()

    def reset(self) -> None:
        """Starts a new conversation."""
        self.last: Answer | None = None
        self._asked = 0

    def ask(self, prompt: str, images: Pictures = None) -> str:
        """The whole answer to the next question, with new images if given. Raises as ``generate``."""
        return self.stream(prompt, images).whole()

    def stream(self, prompt: str, images: Pictures = None) -> Answer:
        """The next answer piece by piece, to be read to its end before the next question."""
        _require_prompt_and_images(prompt, images)
        model = self.model
        engine = model.engine
        before = self.last
        fresh = before is None or before.slots is None
        pixels = model.pixels(images)
        if len(pixels) and model.cfg.fastv and not fresh:
            raise ConfigError(
                "FastV selects image tokens by the first question; reset the conversation for a new image"
            )
        prompted = model.ask([(prompt, None)], images, continues=not fresh)
        sampling = self.sampling
        if sampling.seed is not None:
            sampling = dataclasses.replace(sampling, seed=(sampling.seed + self._asked) % 2**32)
        self._asked += 1
        if fresh:
            self.last = model.answer(prompted, pixels, sampling, budget=self.budget)
            return self.last
        batch = self._next_turn(before, prompted)

        def begin(sampling: Sampling):
            visual, valid = engine.encode(pixels, batch, budget=self.budget)
            # The caches hold every decoded token but the last; those past the answer's text are removed.
            cached = len(before.decoded) - 1
            slots = halted(before.slots, max(cached - len(before.ids), 0))
            return engine.extend(slots, batch, visual, valid, sampling, model.end)

        self.last = Answer(engine, begin, Text(model.tokenizer, model.end, sampling.stop), sampling)
        return self.last

    def _next_turn(self, before: Answer, prompted: Tokenized):
        """The tokens missing from the cache: the last one of the answer, its end, and the question."""
        model = self.model
        missing = before.ids[len(before.decoded) - 1 :]
        ending = end_ids(TEMPLATES[model.template], model.tokenizer) if model.template else []
        front = np.array([*missing, *ending], np.int32)
        nothing = np.zeros(len(front), prompted.rounds.dtype)
        whole = Tokenized(
            np.concatenate([front, prompted.ids]),
            np.concatenate([nothing > 0, prompted.loss_mask]),
            prompted.image_positions + len(front),
            np.concatenate([nothing, prompted.rounds]),
            prompted.questions,
        )
        return prompt_batch([whole], bucket(len(whole.ids)))


def plain_prompt(prompt: str, tokenizer: Tokenizer, *, continues: bool = False) -> Tokenized:
    """A plain text, with special tokens given by name, after BOS where the tokenizer has one: for a decoder alone."""
    ids = [] if tokenizer.bos is None or continues else [tokenizer.bos]
    ids += tokenizer.encode(tokenizer.named(prompt))[0]
    nothing = np.zeros(len(ids), np.int32)
    return Tokenized(
        np.array(ids, np.int32), nothing.astype(bool), np.zeros(0, np.int32), nothing, np.zeros((0, 0), np.int32)
    )


def _require_prompt_and_images(prompt: str, images: Pictures) -> None:
    """Raises TypeError for a prompt or images of another type; ConfigError where the two seem to be swapped."""
    if not isinstance(prompt, str):
        raise TypeError(f"prompt is of type {type(prompt).__name__}; expected a text")
    for image in _listed(images):
        if isinstance(image, str) and os.path.isfile(prompt) and not os.path.exists(image):
            raise ConfigError(f"images={reprlib.repr(image)} is not a file but prompt={prompt!r} is; are they swapped?")


def _listed(images: Pictures) -> list:
    if images is None:
        return []
    listed = list(images) if isinstance(images, (list, tuple)) else [images]
    for image in listed:
        if not isinstance(image, (str, os.PathLike, bytes, np.ndarray, Image.Image)):
            raise TypeError(
                f"images holds a value of type {type(image).__name__}; expected files, their bytes, pixels "
                "(uint8 [height, width, 3]) or PIL images"
            )
    return listed


def _short(count: int) -> str:
    """1234567 -> 1.2M"""
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return str(count)

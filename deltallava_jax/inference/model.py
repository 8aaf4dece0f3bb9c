"""A loaded model to ask questions: tower, projector, decoder, tokenizer and template in one object."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from deltallava_jax.config import ModelConfig
from deltallava_jax.data.conversation import TEMPLATES, Tokenized, asked, end_id, end_ids, tokenize
from deltallava_jax.data.images import load_image
from deltallava_jax.data.tokens import Tokenizer
from deltallava_jax.errors import ConfigError
from deltallava_jax.inference.generate import Answer, Engine, Text, bucket, halted, prompt_batch
from deltallava_jax.inference.sampling import Sampling
from deltallava_jax.models import projectors
from deltallava_jax.models.layers import Params

Picture = str | Path | bytes | np.ndarray | Image.Image  # a file, its bytes, pixels uint8 [H, W, 3], or opened
Pictures = Picture | Sequence[Picture] | None


@dataclass
class Model:
    """What ``deltallava_jax.load`` returns. ``tokenizer`` is None where the checkpoint holds none.

    params: the decoder in the form of ``decoder.unstacked``. aspect: how images become square, as in DataConfig."""

    cfg: ModelConfig
    params: Params
    tokenizer: Tokenizer | None
    template: str = "vicuna_v1"
    aspect: str = "square"

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

        images: a file, its bytes, pixels (uint8 [H, W, 3]), a PIL image, or a list of them. budget: visual tokens an
        image, the projector's largest by default. on_text: is called with each piece of the text as it comes.
        sampling: fields of ``Sampling``; greedy, up to 128 tokens by default. A decoder alone continues the prompt as
        it stands. Raises ConfigError for a setting or budget out of range or a model without the parts it takes,
        BadSample for an image that cannot be read."""
        answer = self.stream(images, prompt, budget=budget, **sampling)
        for piece in answer:
            if on_text:
                on_text(piece)
        return answer.text

    def stream(self, images: Pictures, prompt: str, *, budget: int | None = None, **sampling) -> Answer:
        """The same answer piece by piece; afterwards its tokens, seconds and finish can be read off.

            model = deltallava_jax.load("runs/easy_vqa")
            answer = model.stream("shape.png", "what color is the shape?", budget=16)
            for piece in answer:
                print(piece, end="", flush=True)
            print(answer.tokens, answer.seconds_to_first, answer.seconds, answer.finish)

        Arguments and errors as of ``generate``."""
        asked = self.ask([(prompt, None)], images)
        return self.answer(asked, self.pixels(images), budget=budget, **sampling)

    def chat(self, *, budget: int | None = None, **sampling) -> Chat:
        """A conversation: an image is encoded once, and each turn reads only what is new.

            model = deltallava_jax.load("runs/easy_vqa")
            chat = model.chat(budget=16, max_new_tokens=32)
            chat.ask("what color is the shape?", "shape.png")
            for piece in chat.stream("and what shape is it?"):
                print(piece, end="", flush=True)

        budget and sampling as of ``generate``, for all its answers."""
        return Chat(self, budget, Sampling(**sampling))

    # ------------------------------------------------------------------ the parts of an answer

    def ask(
        self,
        pairs: list[tuple[str, str | None]],
        images: Pictures = None,
        *,
        system: str | None = None,
        continues: bool = False,
    ) -> Tokenized:
        """A conversation up to a question, as the model's template puts it; images without a marker of their own go
        before the last question.

        system: in place of the template's own system text. continues: what follows an answer. Raises ConfigError as
        ``generate``."""
        if self.cfg.decoder is None:
            raise ConfigError("the model has no decoder, so it cannot answer")
        if self.tokenizer is None:
            raise ConfigError("the checkpoint holds no tokenizer; put its tokenizer.json beside the weights")
        count = len(_listed(images))
        if self.cfg.whole:
            conversation = asked(pairs, count, system)
            tokenized = tokenize(conversation, TEMPLATES[self.template], self.tokenizer, continues=continues)
        elif count:
            raise ConfigError("the model has no vision tower, so it cannot read images")
        else:
            front = f"{system}\n" if system else ""
            tokenized = plain_prompt(front + pairs[-1][0], self.tokenizer, continues=continues)
        if not len(tokenized.ids):
            raise ConfigError("the prompt is empty")
        return tokenized

    def pixels(self, images: Pictures) -> np.ndarray:
        """uint8 [n, H, W, 3] of the tower's size. Raises BadSample for an image that cannot be read."""
        images = _listed(images)
        if not images:
            return np.zeros((0, 0, 0, 3), np.uint8)
        size, fill = self.cfg.vision.image_size, self.cfg.vision.mean_color
        return np.stack([load_image(image, size, self.aspect, fill) for image in images])

    def answer(
        self, asked: Tokenized, pixels: np.ndarray, *, budget: int | None = None, capacity: int = 0, **sampling
    ) -> Answer:
        """The answer to a tokenized prompt about encoded pixels."""
        if len(pixels):
            projectors.check_budget(self.cfg.projector, budget)
        sampling = Sampling(**sampling)
        batch = prompt_batch([asked], bucket(len(asked.ids)))

        def begin():
            visual, valid = self.engine.encode(pixels, batch, budget=budget)
            return self.engine.begin(batch, visual, valid, [sampling], self.end, capacity=capacity)

        return Answer(self.engine, begin, Text(self.tokenizer, self.end, sampling.stop))

    @property
    def end(self) -> int:
        """The token that ends an answer."""
        if not self.cfg.whole:
            return -1 if self.tokenizer.eos is None else self.tokenizer.eos
        return end_id(TEMPLATES[self.template], self.tokenizer)


class Chat:
    """Turns of one conversation over one key-value cache. After each, ``last`` is its ``Answer``."""

    def __init__(self, model: Model, budget: int | None, sampling: Sampling):
        self.model, self.budget, self.sampling = model, budget, sampling
        self.reset()

    def reset(self) -> None:
        """Forgets everything that was said."""
        self.last: Answer | None = None

    def ask(self, prompt: str, images: Pictures = None) -> str:
        """The whole answer to the next question, about new images or what was there before. Raises as ``generate``."""
        return self.stream(prompt, images).whole()

    def stream(self, prompt: str, images: Pictures = None) -> Answer:
        """The next answer piece by piece; it must have ended before the next question."""
        pixels, before = self.model.pixels(images), self.last
        options = {name: getattr(self.sampling, name) for name in Sampling.__dataclass_fields__}
        if before is None or before.slots is None:
            asked = self.model.ask([(prompt, None)], images)
            self.last = self.model.answer(asked, pixels, budget=self.budget, **options)
            return self.last
        if len(pixels) and self.model.cfg.fastv:
            raise ConfigError("FastV chooses among an image's tokens by the first question; begin anew for a new image")
        model, engine = self.model, self.model.engine
        if len(pixels):
            projectors.check_budget(model.cfg.projector, self.budget)
        batch = self._following(before, model.ask([(prompt, None)], images, continues=True))

        def begin():
            visual, valid = engine.encode(pixels, batch, budget=self.budget)
            # The device has read all that it said but the last token; beyond the text's own tokens it is forgotten.
            read, kept = len(before.said) - 1, len(before.ids)
            slots = halted(before.slots, max(read - kept, 0))
            return engine.extend(slots, batch, visual, valid, self.sampling, model.end)

        self.last = Answer(engine, begin, Text(model.tokenizer, model.end, self.sampling.stop))
        return self.last

    def _following(self, before: Answer, asked: Tokenized):
        """What the cache lacks: the last token of the answer, its end, and the question."""
        model = self.model
        unread = before.ids[len(before.said) - 1 :]
        ending = end_ids(TEMPLATES[model.template], model.tokenizer) if model.cfg.whole else []
        front = np.array([*unread, *ending], np.int32)
        nothing = np.zeros(len(front), asked.rounds.dtype)
        whole = Tokenized(
            np.concatenate([front, asked.ids]),
            np.concatenate([nothing > 0, asked.loss_mask]),
            asked.image_positions + len(front),
            np.concatenate([nothing, asked.rounds]),
            asked.questions + len(front),
        )
        return prompt_batch([whole], bucket(len(whole.ids)))


def plain_prompt(prompt: str, tokenizer: Tokenizer, *, continues: bool = False) -> Tokenized:
    """A text as it stands, its special tokens too, BOS before it where the tokenizer has one: for a decoder alone."""
    ids = ([] if tokenizer.bos is None or continues else [tokenizer.bos]) + tokenizer.encode(tokenizer.named(prompt))[0]
    nothing = np.zeros(len(ids), np.int32)
    return Tokenized(
        np.array(ids, np.int32), nothing.astype(bool), np.zeros(0, np.int32), nothing, np.zeros((0, 2), np.int32)
    )


def _listed(images: Pictures) -> list:
    if images is None:
        return []
    return list(images) if isinstance(images, (list, tuple)) else [images]

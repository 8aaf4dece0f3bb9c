"""A loaded model to ask questions: tower, projector, decoder, tokenizer and template in one object."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from deltallava_jax.config import ConfigError, ModelConfig
from deltallava_jax.data.conversation import IMAGE, TEMPLATES, Tokenized, end_id, tokenize
from deltallava_jax.data.images import load_image
from deltallava_jax.data.tokens import Tokenizer
from deltallava_jax.inference.generate import encode, greedy, prompt_batch
from deltallava_jax.models import projectors
from deltallava_jax.models.layers import Params
from deltallava_jax.sequence import Batch

LENGTH_STEP = 64  # prompts are padded to a multiple, so that few lengths are compiled


@dataclass
class Model:
    """What ``deltallava_jax.load`` returns. ``tokenizer`` is None where the checkpoint holds none.

    aspect: how images become square, as in DataConfig."""

    cfg: ModelConfig
    params: Params
    tokenizer: Tokenizer | None
    template: str = "vicuna_v1"
    aspect: str = "square"

    def generate(
        self,
        images: str | Path | Image.Image | Sequence | None,
        prompt: str,
        *,
        budget: int | None = None,
        max_new_tokens: int = 128,
    ) -> str:
        """The greedy answer to a prompt about one image, several, or none.

            model = deltallava_jax.load("runs/easy_vqa")
            model.generate("shape.png", "what color is the shape?", budget=16)

        images: a file, a PIL image, or a list of them. budget: visual tokens an image, the projector's largest by
        default. A decoder alone continues the prompt as it stands. Raises ConfigError for a budget the projector does
        not make or a model without the parts it takes, BadSample for an image that cannot be read."""
        if self.cfg.decoder is None:
            raise ConfigError("the model has no decoder, so it cannot answer")
        if self.tokenizer is None:
            raise ConfigError("the checkpoint holds no tokenizer; put its tokenizer.json beside the weights")
        images = [] if images is None else list(images) if isinstance(images, (list, tuple)) else [images]
        end = self.tokenizer.eos
        if self.cfg.whole:
            template = TEMPLATES[self.template]
            end, markers = end_id(template, self.tokenizer), prompt.count(IMAGE)
            if markers not in (0, len(images)):
                raise ConfigError(f"the prompt holds {markers} {IMAGE} markers, but {len(images)} images are given")
            text = prompt if markers else f"{IMAGE}\n" * len(images) + prompt
            tokenized = tokenize([(text, None)], template, self.tokenizer)
        elif images:
            raise ConfigError("the model has no vision tower, so it cannot read images")
        else:
            tokenized = plain_prompt(prompt, self.tokenizer)
        length = -(-len(tokenized.ids) // LENGTH_STEP) * LENGTH_STEP
        prompt = prompt_batch([tokenized], length)
        ids = greedy(
            self.params, self.cfg, prompt, *self._visual(images, prompt, budget),
            max_new_tokens=max_new_tokens, eos=end,
        )  # fmt: skip
        return self.tokenizer.decode(np.asarray(ids)[0])

    def _visual(self, images: list, prompt: Batch, budget: int | None):
        if not images:
            return np.zeros((0, 1, self.cfg.decoder.width), self.cfg.dtype), None
        budget = projectors.check_budget(self.cfg.projector, budget)
        size, fill = self.cfg.vision.image_size, self.cfg.vision.mean_color
        pixels = np.stack([load_image(image, size, self.aspect, fill) for image in images])
        return encode(self.params, self.cfg, pixels, prompt, budget=budget)


def plain_prompt(prompt: str, tokenizer: Tokenizer) -> Tokenized:
    """A text as it stands, BOS before it where the tokenizer has one: for a decoder alone."""
    ids = ([] if tokenizer.bos is None else [tokenizer.bos]) + tokenizer.encode(prompt)[0]
    nothing = np.zeros(len(ids), np.int32)
    return Tokenized(
        np.array(ids, np.int32), nothing.astype(bool), np.zeros(0, np.int32), nothing, np.zeros((0, 2), np.int32)
    )

"""Greedy answers to many questions about images, a batch at a time: what a benchmark asks of a model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from PIL import Image

from deltallava_jax.data.conversation import IMAGE, TEMPLATES, asked, end_id, tokenize
from deltallava_jax.data.images import load_image
from deltallava_jax.errors import ConfigError
from deltallava_jax.inference.generate import Engine, bucket, prompt_batch
from deltallava_jax.inference.model import Model
from deltallava_jax.inference.sampling import Sampling
from deltallava_jax.models import projectors

Question = tuple[Sequence[Image.Image], str]  # images, which go before the text, and the text


class Answerer:
    """A model over all devices of this process: each has its parameters and a share of a batch's rows."""

    def __init__(self, model: Model, *, budget: int | None = None, rows: int = 16):
        """rows: questions a batch, rounded up to a multiple of the devices. Raises ConfigError for a budget that the
        projector does not make, and for a model that is not whole or has no tokenizer."""
        model.cfg.require_whole("a benchmark")
        if model.tokenizer is None:
            raise ConfigError("the checkpoint holds no tokenizer; put its tokenizer.json beside the weights")
        self.model, self.budget = model, projectors.check_budget(model.cfg.projector, budget)
        devices = jax.local_devices()
        self.rows = -(-rows // len(devices)) * len(devices)
        mesh = Mesh(np.array(devices), ("rows",))
        shared, self._split = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("rows",)))
        self._engine = Engine(jax.device_put(model.params, shared), model.cfg)

    def __call__(self, questions: Sequence[Question], max_new_tokens: int) -> list[str]:
        """An answer to each, in order. Questions with as many images, up to ``rows`` of them, are one batch, filled up
        by its last question: few shapes, few compiles. Raises BadSample for an image that cannot be read."""
        answers = [""] * len(questions)
        for count in sorted({len(images) for images, _ in questions}):
            places = [place for place, (images, _) in enumerate(questions) if len(images) == count]
            for start in range(0, len(places), self.rows):
                chosen = places[start : start + self.rows]
                filled = chosen + chosen[-1:] * (self.rows - len(chosen))
                found = self._batch([questions[place] for place in filled], count, max_new_tokens)
                for place, answer in zip(chosen, found[: len(chosen)], strict=True):
                    answers[place] = answer
        return answers

    def _batch(self, questions: list[Question], images: int, max_new_tokens: int) -> list[str]:
        model, template = self.model, TEMPLATES[self.model.template]
        conversations = [asked([(text.replace(IMAGE, ""), None)], images) for _, text in questions]
        prompts = [tokenize(conversation, template, model.tokenizer) for conversation in conversations]
        length = bucket(max(len(prompt.ids) for prompt in prompts))
        batch = jax.device_put(prompt_batch(prompts, length), self._split)
        visual = None, None
        if images:
            size, fill = model.cfg.vision.image_size, model.cfg.vision.mean_color
            pixels = [load_image(image, size, model.aspect, fill) for shown, _ in questions for image in shown]
            pixels = jax.device_put(np.stack(pixels), self._split)
            visual = self._engine.encode(pixels, batch, budget=self.budget)
        sampling = Sampling(max_new_tokens=max_new_tokens)
        ids = self._engine.tokens(batch, *visual, sampling, end=end_id(template, model.tokenizer))
        return [model.tokenizer.decode(row) for row in ids]


class Kept:
    """Answers in files of a folder, one a process, a line an answer: what a killed evaluation has finished."""

    def __init__(self, folder: Path | None, process: int = 0):
        """folder: None keeps nothing."""
        self._folder, self._process = folder, process

    def read(self) -> dict[str, str]:
        """{key: answer} of all processes' files. A line that was cut short by a kill is left out."""
        found = {}
        for file in sorted(self._folder.glob("*.jsonl")) if self._folder else ():
            for line in file.read_text().splitlines():
                try:
                    entry = json.loads(line)
                except ValueError:
                    continue
                found[entry["key"]] = entry["answer"]
        return found

    def add(self, answers: dict[str, str]) -> None:
        if self._folder is None:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"{self._process}.jsonl"
        broken = path.exists() and not path.read_bytes().endswith(b"\n")  # the kill left half a line
        with path.open("a") as file:
            file.write("\n" if broken else "")
            file.writelines(json.dumps({"key": key, "answer": answer}) + "\n" for key, answer in answers.items())

"""Greedy answers to the many questions of a benchmark about images, in batches."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from PIL import Image

from deltallava_jax.data.conversation import IMAGE, TEMPLATES, end_id, prompt_conversation, tokenize
from deltallava_jax.data.images import load_image
from deltallava_jax.errors import BadSample, ConfigError
from deltallava_jax.inference.generate import Engine, bucket, prompt_batch
from deltallava_jax.inference.model import Model
from deltallava_jax.inference.sampling import Sampling
from deltallava_jax.models import systems

ROWS = 16  # questions per batch by default
Question = tuple[Sequence[Image.Image], str]  # images, which go before the text, and the text


class Answerer:
    """A model replicated over the devices of this process, each of which answers a share of a batch's rows."""

    def __init__(self, model: Model, *, budget: int | None = None, rows: int | str = ROWS):
        """rows: questions per batch, rounded up to a multiple of the devices; also as text, "auto" for ROWS. Raises
        ConfigError for rows below 1, for a budget that the projector does not make, and for a model that is not whole
        or has no tokenizer."""
        rows = _whole(rows)
        model.cfg.require_whole("a benchmark")
        if model.tokenizer is None:
            raise ConfigError("the checkpoint holds no tokenizer; put its tokenizer.json beside the weights")
        self.model, self.budget = model, systems.check_budget(model.cfg.projector, budget)
        devices = jax.local_devices()
        self.rows = -(-rows // len(devices)) * len(devices)
        mesh = Mesh(np.array(devices), ("rows",))
        shared, self._split = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("rows",)))
        self._engine = Engine(jax.device_put(model.params, shared), model.cfg)

    def __call__(self, questions: Sequence[Question], max_new_tokens: int) -> list[str | BadSample]:
        """An answer to each, in order. A batch has questions with equally many images and is filled up to ``rows`` with
        its last question, so that few shapes are compiled. Where an image cannot be read the answer is the BadSample
        with the reason."""
        loaded = [self._pixels(images) for images, _ in questions]
        answers = [found if isinstance(found, BadSample) else "" for found in loaded]
        for count in sorted({len(images) for images, _ in questions}):
            able = [place for place, answer in enumerate(answers) if not isinstance(answer, BadSample)]
            places = [place for place in able if len(questions[place][0]) == count]
            for start in range(0, len(places), self.rows):
                chosen = places[start : start + self.rows]
                filled = chosen + chosen[-1:] * (self.rows - len(chosen))
                texts = [questions[place][1] for place in filled]
                pixels = [loaded[place] for place in filled]
                found = self._batch(texts, pixels, count, max_new_tokens)
                for place, answer in zip(chosen, found[: len(chosen)], strict=True):
                    answers[place] = answer
        return answers

    def _pixels(self, images: Sequence[Image.Image]) -> list[np.ndarray] | BadSample:
        vision = self.model.cfg.vision
        try:
            return [load_image(image, vision.image_size, self.model.aspect, vision.mean_color) for image in images]
        except BadSample as error:
            return error

    def _batch(
        self, questions: list[str], pixels: list[list[np.ndarray]], images: int, max_new_tokens: int
    ) -> list[str]:
        model = self.model
        template = TEMPLATES[model.template]
        conversations = [prompt_conversation([(text.replace(IMAGE, ""), None)], images) for text in questions]
        question_length = systems.question_length(model.cfg.projector)
        prompts = [tokenize(each, template, model.tokenizer, question_length=question_length) for each in conversations]
        length = bucket(max(len(prompt.ids) for prompt in prompts))
        batch = jax.device_put(prompt_batch(prompts, length), self._split)
        visual = None, None
        if images:
            stacked = jax.device_put(np.stack([image for shown in pixels for image in shown]), self._split)
            visual = self._engine.encode(stacked, batch, budget=self.budget)
        sampling = Sampling(max_new_tokens=max_new_tokens)
        ids = self._engine.tokens(batch, *visual, sampling, end=end_id(template, model.tokenizer))
        return [model.tokenizer.decode(row) for row in ids]


def _whole(rows: int | str) -> int:
    if rows == "auto" or str(rows).startswith("auto:"):  # as lmms-eval writes it
        return ROWS
    try:
        count = int(rows)
    except ValueError:
        count = 0
    if count < 1:
        raise ConfigError(f"batch_size={rows}; expected a number of questions, 1 or more, or auto")
    return count


class SavedAnswers:
    """Finished answers in a folder, one file per process and one line per answer, for resuming a killed evaluation."""

    def __init__(self, folder: Path | None, process: int = 0):
        """folder: None saves nothing."""
        self._folder, self._process = folder, process

    def read(self) -> dict[str, str]:
        """{key: answer} of all processes' files. A line truncated by a kill is skipped."""
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
        broken = path.exists() and not path.read_bytes().endswith(b"\n")  # a kill truncated the last line
        with path.open("a") as file:
            file.write("\n" if broken else "")
            file.writelines(json.dumps({"key": key, "answer": answer}) + "\n" for key, answer in answers.items())

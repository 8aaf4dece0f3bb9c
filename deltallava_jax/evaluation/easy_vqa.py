"""easy-VQA's official test split: greedy answers, exact match."""

from __future__ import annotations

import json
import time

import jax
import numpy as np

from deltallava_jax.config import Config
from deltallava_jax.data import easy_vqa
from deltallava_jax.data.conversation import TEMPLATES, end_id, prompt_conversation, tokenize
from deltallava_jax.data.images import load_image
from deltallava_jax.data.tokens import Tokenizer
from deltallava_jax.errors import ConfigError
from deltallava_jax.inference.generate import Engine, prompt_batch
from deltallava_jax.inference.sampling import Sampling
from deltallava_jax.models import systems
from deltallava_jax.models.layers import Params
from deltallava_jax.parallel import hosts
from deltallava_jax.progress import progress_bar

IMAGE_BATCH = 64
CONTROLS = ("shuffled", "noise")


def evaluate(
    params: Params,
    cfg: Config,
    tokenizer: Tokenizer,
    *,
    budget: int | None = None,
    control: str = "",
    limit: int = 0,
    progress: bool = True,
) -> dict:
    """Accuracy on the test questions, in all and by question type; every process calls it and gets the whole result.

    budget: visual tokens per image (the largest by default). control: what answers are worth without their images;
    "shuffled": every question is asked about another test image, "noise": about random pixels. limit: only so many
    questions, spread evenly (0: all). Returns task, accuracy, n, by_type, budget, images (real, or the control),
    seconds. Raises ConfigError for a budget that the projector does not make, or an unknown control."""
    began = time.monotonic()
    if control not in ("", *CONTROLS):
        raise ConfigError(f"control {control!r}; known: {', '.join(CONTROLS)}")
    budget = systems.check_budget(cfg.model.projector, budget)
    questions = easy_vqa.questions("test")
    if limit and limit < len(questions):
        questions = [questions[i] for i in np.linspace(0, len(questions) - 1, limit).astype(int)]
    # Every process answers its share, but at least one question, as all take part in compiling.
    everyones, questions = questions, questions[jax.process_index() :: jax.process_count()] or questions[:1]
    images = sorted({q.image for q in questions})
    pixels = _pixels(cfg, images, control)
    place = {image: index for index, image in enumerate(images)}
    needs_question = systems.reads_question(cfg.model.projector)
    engine = Engine(params, cfg.model)
    sampling = Sampling(max_new_tokens=cfg.evaluation.max_new_tokens)
    visual, valid = (None, None) if needs_question else _encode(engine, pixels, budget)
    template = TEMPLATES[cfg.data.template]
    question_length = systems.question_length(cfg.model.projector)
    prompts = [
        tokenize(prompt_conversation([(q.question, None)], 1), template, tokenizer, question_length=question_length)
        for q in questions
    ]
    length = max(len(prompt.ids) for prompt in prompts)
    size = min(cfg.evaluation.batch_size, len(questions))
    answers = []
    for start in progress_bar(range(0, len(questions), size), "answering", unit="batches", shown=progress):
        # The last batch is filled up with its last question: one shape, one compile.
        chosen = [min(start + i, len(questions) - 1) for i in range(size)]
        batch = prompt_batch([prompts[i] for i in chosen], length)
        shown = [place[questions[i].image] for i in chosen]
        if needs_question:
            these = engine.encode(pixels[shown], batch, budget=budget)
        else:
            these = visual[shown], None if valid is None else valid[shown]
        ids = engine.tokens(batch, *these, sampling, end=end_id(template, tokenizer))
        answers += [tokenizer.decode(row) for row in ids]
    shares = [json.loads(text) for text in hosts.gather(json.dumps(answers))]
    answers = [shares[index % len(shares)][index // len(shares)] for index in range(len(everyones))]
    right: dict[str, list[bool]] = {}
    for question, answer in zip(everyones, answers, strict=True):
        right.setdefault(question.type, []).append(answer == question.answer)
    return {
        "task": "easy_vqa",
        "accuracy": float(np.mean([hit for hits in right.values() for hit in hits])),
        "n": len(everyones),
        "by_type": {kind: {"accuracy": float(np.mean(hits)), "n": len(hits)} for kind, hits in sorted(right.items())},
        "budget": budget,
        "images": control or "real",
        "seconds": round(time.monotonic() - began, 2),
    }


def _pixels(cfg: Config, images: list[int], control: str) -> np.ndarray:
    """Pixels [n, H, W, 3] of the images, of other images, or noise."""
    size, fill = cfg.model.vision.image_size, cfg.model.vision.mean_color
    if control == "noise":
        return np.random.default_rng(cfg.seed).integers(0, 256, (len(images), size, size, 3)).astype(np.uint8)
    if control == "shuffled":
        other = derangement(sorted({q.image for q in easy_vqa.questions("test")}), cfg.seed)
        images = [other[image] for image in images]
    return np.stack([load_image(easy_vqa.image_path("test", i), size, cfg.data.aspect, fill) for i in images])


def derangement(items: list[int], seed: int) -> dict[int, int]:
    """Another item for each: the next one in a random cycle through all items."""
    cycle = np.random.default_rng(seed).permutation(items).tolist()
    return dict(zip(cycle, [*cycle[1:], cycle[0]], strict=True))


def _encode(engine: Engine, pixels: np.ndarray, budget: int) -> tuple[np.ndarray, np.ndarray | None]:
    """(visual tokens [n, V, d], which of them are valid) of all images, encoded in batches."""
    padded = np.pad(pixels, ((0, -len(pixels) % IMAGE_BATCH), (0, 0), (0, 0), (0, 0)))
    batches = padded.reshape(-1, IMAGE_BATCH, *padded.shape[1:])
    parts = [engine.encode(batch, budget=budget) for batch in batches]
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)

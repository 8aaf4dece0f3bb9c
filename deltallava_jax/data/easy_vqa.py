"""easy-VQA (vzhou842/easy-VQA on PyPI): coloured shapes on 64x64 images, questions with 13 possible answers.

Read from the installed package: 4,000 train images with 38,575 questions, 1,000 test images with 9,673.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from importlib import util
from pathlib import Path

from deltallava_jax.data.conversation import IMAGE
from deltallava_jax.data.records import Record
from deltallava_jax.errors import ConfigError


@dataclass(frozen=True)
class Question:
    question: str
    answer: str
    image: int

    @property
    def type(self) -> str:
        """ "color", "shape" or "yes/no"."""
        if self.answer in ("yes", "no"):
            return "yes/no"
        return "shape" if self.answer in ("rectangle", "circle", "triangle") else "color"


@functools.cache
def _folder(split: str) -> Path:
    spec = util.find_spec("easy_vqa")
    if spec is None:
        raise ConfigError("the easy-VQA data set is not installed; install it with: pip install easy-vqa")
    return Path(spec.origin).parent / "data" / split


def questions(split: str) -> list[Question]:
    """The official questions of a split ("train" or "test"), in the package's order."""
    return [Question(*item) for item in json.loads((_folder(split) / "questions.json").read_text())]


def image_path(split: str, image: int) -> Path:
    return _folder(split) / "images" / f"{image}.png"


class EasyVqa:
    """A split as conversations, like LLaVA's VQA mixtures: one image and ``turns`` questions per record (0: all)."""

    def __init__(self, split: str, turns: int = 0):
        self.split = split
        by_image: dict[int, list[Question]] = {}
        for question in questions(split):
            by_image.setdefault(question.image, []).append(question)
        self.records: list[tuple[int, list[Question]]] = []
        for image, items in by_image.items():
            step = turns or len(items)
            self.records += [(image, items[start : start + step]) for start in range(0, len(items), step)]

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Record:
        image, items = self.records[index]
        conversation = []
        for turn, item in enumerate(items):
            marker = f"{IMAGE}\n" if turn == 0 else ""
            conversation += [{"from": "human", "value": f"{marker}{item.question}"}]
            conversation += [{"from": "gpt", "value": item.answer}]
        return Record(f"{self.split}/{image}#{index}", (image_path(self.split, image),), conversation)

    def texts(self) -> list[str]:
        return [f"{IMAGE}\n{item.question} {item.answer}" for _, items in self.records for item in items]

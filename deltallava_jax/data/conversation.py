"""Conversations in LLaVA's format -> token ids with exact supervised spans.

A conversation is a list of turns {"from": "human" | "gpt", "value": text}; ``<image>`` in a human turn marks where an
image goes. Spans come from the tokenizer's character offsets, never from counting re-tokenized substrings.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass

import numpy as np

from deltallava_jax.data.tokens import Tokenizer

IMAGE = "<image>"


class BadSample(ValueError):
    """A record that cannot be trained on; the message says why. The run skips and counts it."""


@dataclass(frozen=True)
class Template:
    """How turns become text: system, then user and assistant formats; ``end`` closes an answer and is supervised."""

    system: str
    user: str
    assistant: str
    end: str = "</s>"

    @property
    def question_end(self) -> str:
        """The text between a question and its answer."""
        return self.user.partition("{}")[2] + self.assistant


TEMPLATES = {
    # LLaVA-1.5's instruction template (haotian-liu/LLaVA, llava/conversation.py).
    "vicuna_v1": Template(
        system="A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions. ",
        user="USER: {} ",
        assistant="ASSISTANT:",
    ),
    # The least text: for models trained from scratch on short questions.
    "brief": Template(system="", user="{}", assistant=""),
}


@dataclass(frozen=True)
class Tokenized:
    """ids [T] with id 0 at each image's placeholder; loss_mask [T]; image_positions [images]; rounds [T]; questions.

    questions: [images, 2], start and end in ids of the question of each image's round, from after its newline.
    rounds: 0 for the system text and the images at the front, then 1, 2, ... for the question and answer pairs."""

    ids: np.ndarray
    loss_mask: np.ndarray
    image_positions: np.ndarray
    rounds: np.ndarray
    questions: np.ndarray


def rounds(conversation: list[dict]) -> list[tuple[str, str | None]]:
    """(question, answer) pairs; the last answer is None when the conversation ends with a question.

    Raises BadSample unless human and gpt turns alternate, human first."""
    for index, turn in enumerate(conversation):
        expected = ("human", "gpt")[index % 2]
        turn = turn if isinstance(turn, dict) else {}
        if turn.get("from") != expected or not isinstance(turn.get("value"), str):
            raise BadSample(f"turn {index} is from {turn.get('from')!r}, expected {expected!r} with a text value")
    if not conversation:
        raise BadSample("the conversation is empty")
    values = [turn["value"] for turn in conversation] + [None] * (len(conversation) % 2)
    return list(zip(values[::2], values[1::2]))


def tokenize(pairs: list[tuple[str, str | None]], template: Template, tokenizer: Tokenizer) -> Tokenized:
    """Token ids of a whole conversation, BOS first; each answer and its ``end`` are supervised.

    A final answer of None leaves the prompt open for generation."""
    text, spans, starts, asked = template.system, [], [], []
    for question, answer in pairs:
        shared, before = 0, len(text) + template.user.index("{}")
        begin = question.rfind(IMAGE) + len(IMAGE) if IMAGE in question else 0  # of the question's own words
        begin += question[begin:].startswith("\n")
        if not starts and IMAGE in question:
            shared = before + begin - len(text)
        starts.append(len(text) + shared)
        asked += [(before + begin, before + len(question))] * question.count(IMAGE)
        text += template.user.format(question) + template.assistant
        if answer is None:
            break
        spans.append((len(text), len(text) + len(f" {answer}{template.end}")))
        text += f" {answer}{template.end}"
    ids = [] if tokenizer.bos is None else [tokenizer.bos]
    mask, of_round, places = [False] * len(ids), [0] * len(ids), [(-1, -1)] * len(ids)
    positions, start = [], 0
    for index, piece in enumerate(text.split(IMAGE)):
        if index:
            positions.append(len(ids))
            ids.append(0)
            mask.append(False)
            places.append((-1, -1))
            of_round.append(bisect.bisect(starts, start))
            start += len(IMAGE)
        piece_ids, offsets = tokenizer.encode(piece)
        ids += piece_ids
        places += [(start + begin, start + end) for begin, end in offsets]
        mask += [any(_overlap(place, span) for span in spans) for place in places[len(mask) :]]
        of_round += [bisect.bisect(starts, start + begin) for begin, _ in offsets]
        start += len(piece)
    questions = np.zeros((len(asked), 2), np.int32)
    for image, span in enumerate(asked):
        inside = [index for index, place in enumerate(places) if _overlap(place, span)]
        questions[image] = (inside[0], inside[-1] + 1) if inside else 0
    return Tokenized(
        np.array(ids, np.int32), np.array(mask, bool), np.array(positions, np.int32), np.array(of_round, np.int32),
        questions,
    )  # fmt: skip


def _overlap(a: tuple[int, int], b: tuple[int, int]) -> bool:
    return a[0] < b[1] and b[0] < a[1]

"""Conversations in LLaVA's format -> token ids with exact supervised spans.

A conversation is a list of turns {"from": "human" | "gpt", "value": text}; ``<image>`` in a human turn marks where an
image goes. Spans come from the tokenizer's character offsets, never from counting re-tokenized substrings.
"""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass

import numpy as np

from deltallava_jax.data.tokens import Tokenizer
from deltallava_jax.errors import BadSample

IMAGE = "<image>"


@dataclass(frozen=True)
class Template:
    """How turns become text: system, then for each round user, assistant, lead, answer, end, after.

    Supervised: lead, answer and end. caption: of the question only the images remain."""

    system: str
    user: str
    assistant: str
    end: str = "</s>"
    lead: str = " "
    after: str = ""
    caption: bool = False

    def turn(self, question: str) -> str:
        """The user's turn and what asks for the answer."""
        return self.user.format(IMAGE * question.count(IMAGE) if self.caption else question) + self.assistant

    def answer(self, answer: str) -> str:
        """What is supervised."""
        return f"{self.lead}{answer}{self.end}"

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
    # Stage 1 of LLaVA and TokenPacker (same file): the caption follows the image, closed by a newline.
    "plain": Template(system="", user="{}", assistant="", end="\n", lead="", caption=True),
    # Qwen2, and its LLaVA models.
    "chatml": Template(
        system="<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n",
        user="<|im_start|>user\n{}<|im_end|>\n",
        assistant="<|im_start|>assistant\n",
        end="<|im_end|>",
        lead="",
        after="\n",
    ),
    "llama_3": Template(
        system="<|start_header_id|>system<|end_header_id|>\n\nYou are a helpful language and vision assistant. You are "
        "able to understand the visual content that the user provides, and assist the user with a variety of tasks "
        "using natural language.<|eot_id|>",
        user="<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>",
        assistant="<|start_header_id|>assistant<|end_header_id|>\n\n",
        end="<|eot_id|>",
        lead="",
    ),
    # The least text: for models trained from scratch on short questions.
    "brief": Template(system="", user="{}", assistant=""),
}


def end_id(template: Template, tokenizer: Tokenizer) -> int:
    """The token that closes an answer: the template's, the tokenizer's EOS where the template closes with text."""
    ids, _ = tokenizer.encode(template.end)
    return ids[0] if len(ids) == 1 else tokenizer.eos


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

    As LLaVA's training does: an answer that comes before any question is dropped, and the one image of a turn goes
    before its text, on a line of its own. Several images of a turn stay where the record puts them.
    Raises BadSample unless human and gpt turns alternate and every turn says something."""
    values: list[str | None] = []
    first = 1 if _turn(conversation, 0).get("from") == "gpt" else 0
    for index in range(first, len(conversation)):
        turn, expected = _turn(conversation, index), ("human", "gpt")[len(values) % 2]
        if turn.get("from") != expected or not isinstance(turn.get("value"), str):
            raise BadSample(f"turn {index} is from {turn.get('from')!r}, expected {expected!r} with a text value")
        if not turn["value"].strip():
            raise BadSample(f"turn {index} is empty")
        values.append(_image_first(turn["value"]) if expected == "human" else turn["value"])
    if not values:
        raise BadSample("the conversation is empty")
    return list(itertools.zip_longest(values[::2], values[1::2]))


def _turn(conversation: list[dict], index: int) -> dict:
    turn = conversation[index] if isinstance(conversation, list) and index < len(conversation) else None
    return turn if isinstance(turn, dict) else {}


def _image_first(question: str) -> str:
    if question.count(IMAGE) != 1:
        return question
    return f"{IMAGE}\n{question.replace(IMAGE, '').strip()}".strip()


def text_pieces(pairs: list[tuple[str, str | None]], template: Template) -> list[str]:
    """The text of a whole conversation, parted at its images."""
    return _assemble(pairs, template)[0].split(IMAGE)


def _assemble(pairs: list[tuple[str, str | None]], template: Template):
    """(text; spans of the answers; where each round starts; the span of the question that belongs to each image)."""
    text, answers, starts, asked = template.system, [], [], []
    for question, answer in pairs:
        shared, before = 0, len(text) + template.user.index("{}")
        begin = question.rfind(IMAGE) + len(IMAGE) if IMAGE in question else 0  # of the question's own words
        begin += question[begin:].startswith("\n")
        if not starts and IMAGE in question and not template.caption:
            shared = before + begin - len(text)
        starts.append(len(text) + shared)
        asked += [(0, 0) if template.caption else (before + begin, before + len(question))] * question.count(IMAGE)
        text += template.turn(question)
        if answer is None:
            break
        answers.append((len(text), len(text) + len(template.answer(answer))))
        text += template.answer(answer) + template.after
    return text, answers, starts, asked


def tokenize(
    pairs: list[tuple[str, str | None]], template: Template, tokenizer: Tokenizer, *, continues: bool = False
) -> Tokenized:
    """Token ids of a whole conversation, BOS first; each answer and its ``end`` are supervised.

    A final answer of None leaves the prompt open for generation. continues: the pairs follow the end of an answer, so
    what stands between rounds takes the place of BOS and the system text."""
    if continues:
        template = dataclasses.replace(template, system=template.after)
    text, answers, starts, asked = _assemble(pairs, template)
    ids = [] if tokenizer.bos is None or continues else [tokenizer.bos]
    places, positions, start = [(-1, -1)] * len(ids), [], 0  # places: characters of each id
    for index, piece in enumerate(text.split(IMAGE)):
        if index:
            positions.append(len(ids))
            ids.append(0)
            places.append((start, start))
            start += len(IMAGE)
        piece_ids, offsets = tokenizer.encode(piece)
        ids += piece_ids
        places += [(start + begin, start + end) for begin, end in offsets]
        start += len(piece)
    begins, ends = np.array(places, np.int64).reshape(-1, 2).T
    mask = np.zeros(len(ids), bool)
    for begin, end in answers:
        mask |= (begins < end) & (ends > begin)
    of_round = np.searchsorted(starts, begins, side="right").astype(np.int32)
    questions = np.zeros((len(asked), 2), np.int32)
    for image, span in enumerate(asked):
        inside = np.flatnonzero((begins < span[1]) & (ends > span[0]))
        questions[image] = (inside[0], inside[-1] + 1) if len(inside) else 0
    return Tokenized(np.array(ids, np.int32), mask, np.array(positions, np.int32), of_round, questions)

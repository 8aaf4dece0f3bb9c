"""Conversations -> token ids with exact supervised spans.

``Conversation`` is the one form that training, checking and asking share: its questions are parted where an image
stands, so that places and pictures agree by construction and a text that happens to hold ``<image>`` stays text. Spans
come from the tokenizer's character offsets, never from counting re-tokenized substrings.
"""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from deltallava_jax.config.checks import nearest
from deltallava_jax.data.tokens import Tokenizer
from deltallava_jax.errors import BadSample, ConfigError

IMAGE, VIDEO = "<image>", "<video>"

# What was done to a record so that it can be used: kind -> how reports name it.
NOTES = {
    "greeting": "answers before any question, left out",
    "silent": "rounds in which a turn is empty, left out; their images go to the next question",
    "literal": "records without an image whose questions hold <image>, which is text",
    "unmarked": "records that mark no place for their images, which go before the first question",
}


@dataclass(frozen=True)
class Round:
    """A question and its answer. parts: the question's text; an image stands between each two of them.

    answer: None where it is yet to come."""

    parts: tuple[str, ...]
    answer: str | None


@dataclass(frozen=True)
class Conversation:
    """Rounds, of which only the last may be open. system: in place of the template's own system text, None for that.

    notes: kinds of ``NOTES``, one for each time that it was done."""

    rounds: tuple[Round, ...]
    system: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def images(self) -> int:
        """How many images it has places for."""
        return sum(len(round.parts) - 1 for round in self.rounds)


# ------------------------------------------------------------------ reading


def read_turns(turns: list[dict], images: int) -> Conversation:
    """The conversation of a record with so many images, from turns {"from": "human" | "gpt", "value": text}.

    ``<image>`` in a human turn is a place for an image where the record has any, text where it has none. As LLaVA's
    training does: an answer before any question is dropped; the one image of a turn goes before its text, on a line of
    its own; images without any marker go before the first question. Several images of a turn stay where they are. The
    turns may begin with a system text. A round in which a turn says nothing is left out.

    Raises BadSample unless human and gpt turns alternate, some round says something, and the human turns hold as many
    markers as there are images, the others none; and for a place of a video."""
    system = None
    first = 0  # the first question
    notes = []
    if _speaker(turns, 0) == "system":
        system = _value(turns, 0)
        first = 1
    if _speaker(turns, first) == "gpt":
        first += 1
        notes.append("greeting")
    for index in range(first, len(turns)):
        expected = ("human", "gpt")[(index - first) % 2]
        if _speaker(turns, index) != expected:
            raise BadSample(f"turn {index} is from {_speaker(turns, index)!r}, expected {expected!r}")
    values = [_value(turns, index) for index in range(len(turns))]
    questions, answers = values[first::2], values[first + 1 :: 2]
    if not questions:
        raise BadSample("the conversation is empty")
    for index in range(first, len(turns), 2):
        if values[index].strip().startswith(VIDEO) or values[index].strip().endswith(VIDEO):
            raise BadSample(f"turn {index} is about a video, which is not read", "video")
    if images:
        for index in set(range(len(turns))) - set(range(first, len(turns), 2)):
            if IMAGE in values[index]:
                raise BadSample(f"turn {index} is not from 'human' but holds {IMAGE}", "markers")
        markers = sum(question.count(IMAGE) for question in questions)
        if not markers:
            questions[0] = f"{IMAGE}\n" * images + questions[0]
            notes.append("unmarked")
        elif markers != images:
            raise BadSample(f"{markers} {IMAGE} markers, but {images} images", "markers")
    elif any(IMAGE in question for question in questions):
        notes.append("literal")
    rounds, silent = _rounds(questions, answers, bool(images))
    if not rounds:
        empty = next(index for index in range(first, len(turns)) if not values[index].strip())
        raise BadSample(f"turn {empty} is empty, and no round is without such a turn")
    return Conversation(tuple(rounds), system or None, (*notes, *["silent"] * silent))


def _speaker(turns: list[dict], index: int) -> str | None:
    """Who says a turn, None behind the last one."""
    if not isinstance(turns, list):
        raise BadSample(f"the conversation is of type {type(turns).__name__}, expected a list of turns")
    if index >= len(turns):
        return None
    if not isinstance(turns[index], dict):
        raise BadSample(f'turn {index} is of type {type(turns[index]).__name__}, expected {{"from", "value"}}')
    return turns[index].get("from")


def _value(turns: list[dict], index: int) -> str:
    value = turns[index].get("value")
    if not isinstance(value, str):
        raise BadSample(f"turn {index} has a value of type {type(value).__name__}, expected a text value")
    return value


def _rounds(questions: list[str], answers: list[str], marked: bool) -> tuple[list[Round], int]:
    """(the rounds in which every turn says something, how many others there were). marked: markers are places."""
    rounds = []
    silent = 0
    held = 0
    for question, answer in itertools.zip_longest(questions, answers):
        question = f"{IMAGE}\n" * held + question  # the images of rounds that were left out
        if question.strip() and (answer is None or answer.strip()):
            rounds.append(Round(_parts(question) if marked else (question,), answer))
            held = 0
        else:
            silent += 1
            held = question.count(IMAGE) if marked else 0
    if rounds and held:
        rounds.append(Round(_parts(question), None))
    return rounds, silent


def _parts(question: str) -> tuple[str, ...]:
    if question.count(IMAGE) != 1:
        return tuple(question.split(IMAGE))
    rest = question.replace(IMAGE, "").strip()
    return "", f"\n{rest}" if rest else ""


def prompt_conversation(
    pairs: Sequence[tuple[str, str | None]], images: int, system: str | None = None
) -> Conversation:
    """The conversation of (question, answer) pairs about so many images, as a prompt gives them.

    ``<image>`` in a question is a place for an image, a lone one before the question's text, as in training; without
    any the images go before the last question, each on a line of its own. An answer is text, whatever it holds. Raises
    ConfigError for more or fewer places than images."""
    markers = sum(question.count(IMAGE) for question, _ in pairs)
    if markers not in (0, images):
        raise ConfigError(f"the prompt holds {markers} {IMAGE} markers, but {images} images are given")
    *earlier, (last, answer) = pairs
    if not markers:
        last = f"{IMAGE}\n" * images + last
    rounds = [Round(_parts(question), said) for question, said in (*earlier, (last, answer))]
    return Conversation(tuple(rounds), system or None)


# ------------------------------------------------------------------ templates


@dataclass(frozen=True)
class Template:
    """How turns become text: the system text, then for each round user, assistant, lead, answer, end, after.

    user: the question at "{}". system_format: the system text at "{}"; "" where there is no place for one, and a
    conversation's own goes before its first question, on a line of its own. Supervised: lead, answer and end. caption:
    of the question only the images remain."""

    user: str
    assistant: str
    end: str = "</s>"
    lead: str = " "
    after: str = ""
    system_format: str = ""
    system_text: str = ""
    caption: bool = False

    def opening(self, system: str | None = None) -> str:
        """The text before the first round; system: in place of the template's own."""
        return self.system_format.replace("{}", self.system_text if system is None else system)

    @property
    def system(self) -> str:
        """The text before the first round of a conversation without a system text of its own."""
        return self.opening()

    @property
    def question_end(self) -> str:
        """The text between a question and its answer."""
        return self.user.partition("{}")[2] + self.assistant

    def named(self, tokenizer: Tokenizer) -> Template:
        """The template with its special tokens as ``Tokenizer.named`` writes them."""
        strings = ("system_format", "user", "assistant", "lead", "end", "after")
        return dataclasses.replace(self, **{name: tokenizer.named(getattr(self, name)) for name in strings})


TEMPLATES = {
    # LLaVA-1.5's instruction template (haotian-liu/LLaVA, llava/conversation.py).
    "vicuna_v1": Template(
        user="USER: {} ",
        assistant="ASSISTANT:",
        system_format="{} ",
        system_text="A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions.",
    ),
    # Stage 1 of LLaVA and TokenPacker (same file): the caption follows the image, closed by a newline.
    "plain": Template(user="{}", assistant="", end="\n", lead="", caption=True),
    # Qwen2, and its LLaVA models.
    "chatml": Template(
        user="<|im_start|>user\n{}<|im_end|>\n",
        assistant="<|im_start|>assistant\n",
        end="<|im_end|>",
        lead="",
        after="\n",
        system_format="<|im_start|>system\n{}<|im_end|>\n",
        system_text="You are a helpful assistant.",
    ),
    "llama_3": Template(
        user="<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>",
        assistant="<|start_header_id|>assistant<|end_header_id|>\n\n",
        end="<|eot_id|>",
        lead="",
        system_format="<|start_header_id|>system<|end_header_id|>\n\n{}<|eot_id|>",
        system_text="You are a helpful language and vision assistant. You are able to understand the visual content "
        "that the user provides, and assist the user with a variety of tasks using natural language.",
    ),
    # The least text: for models trained from scratch on short questions.
    "brief": Template(user="{}", assistant=""),
}


def known_template(name: str, tokenizer: Tokenizer | None = None, *, setting: str = "template") -> Template:
    """The template of a name. Raises ConfigError, which names the setting, for one that is not known, or whose end of
    an answer is no token of the tokenizer."""
    if name not in TEMPLATES:
        raise ConfigError(f"{setting} is {name!r}{nearest(name, TEMPLATES)}")
    end = TEMPLATES[name].end
    if tokenizer is not None and end.startswith("<") and len(end_ids(TEMPLATES[name], tokenizer)) != 1:
        raise ConfigError(f"{setting} {name} closes answers with {end}, which is no token of this tokenizer")
    return TEMPLATES[name]


def end_ids(template: Template, tokenizer: Tokenizer) -> list[int]:
    """The tokens that stand behind an answer."""
    return tokenizer.encode(tokenizer.named(template.end))[0]


def end_id(template: Template, tokenizer: Tokenizer) -> int:
    """The token that closes an answer: the template's, the tokenizer's EOS where the template closes with text."""
    ids = end_ids(template, tokenizer)
    return ids[0] if len(ids) == 1 else tokenizer.eos


# ------------------------------------------------------------------ tokens


@dataclass(frozen=True)
class Tokenized:
    """ids [T] with id 0 at each image's placeholder; loss_mask [T]; image_positions [images]; rounds [T]; questions.

    questions: [images, Q], the ids of the question of each image's round as ``question_ids`` makes them.
    rounds: 0 for the system text and the images at the front, then 1, 2, ... for the question and answer pairs."""

    ids: np.ndarray
    loss_mask: np.ndarray
    image_positions: np.ndarray
    rounds: np.ndarray
    questions: np.ndarray


@dataclass
class _Text:
    """pieces: the whole text, parted at its images. The rest is in characters, an image counting as one: spans of the
    answers, where each round starts. asked: the question that belongs to each image."""

    pieces: list[str]
    answers: list[tuple[int, int]]
    starts: list[int]
    asked: list[str]


def text_pieces(conversation: Conversation, template: Template, tokenizer: Tokenizer) -> list[str]:
    """The text of a whole conversation as the tokenizer is given it, parted at its images."""
    return _assemble(conversation, template.named(tokenizer), False).pieces


def _assemble(conversation: Conversation, template: Template, continues: bool) -> _Text:
    """The text, from a template whose special tokens are named."""
    system = None if continues else conversation.system
    opening = template.after if continues else template.opening(system)
    front = f"{system}\n" if system and not template.system_format else ""
    before, _, behind = template.user.partition("{}")
    text = _Text([opening], [], [], [])
    length = len(opening)
    for round in conversation.rounds:
        parts = (front + round.parts[0], *round.parts[1:])
        images = len(parts) - 1
        own = len(before) + len(front)  # where the question's own words begin
        if images:
            own = len(before) + sum(len(part) + 1 for part in parts[:-1]) + parts[-1].startswith("\n")
        if template.caption:
            parts = ("",) * len(parts)
        shared = own if (front or images) and not text.starts and not template.caption else 0
        text.starts.append(length + shared)
        end = len(before) + sum(map(len, parts)) + images
        text.asked += ["" if template.caption else parts[-1]] * images
        text.pieces[-1] += before + parts[0]
        text.pieces += parts[1:]
        text.pieces[-1] += behind + template.assistant
        length += end + len(behind) + len(template.assistant)
        if round.answer is None:
            break
        said = f"{template.lead}{round.answer}{template.end}"
        text.answers.append((length, length + len(said)))
        text.pieces[-1] += said + template.after
        length += len(said) + len(template.after)
        front = ""
    return text


def question_ids(question: str, tokenizer: Tokenizer, length: int) -> np.ndarray:
    """int32 [length]: the ids of a question's text by itself, BOS first, -1 behind them; all -1 where it says nothing.

    Of a longer one the first ``length`` are taken, which is warned of."""
    ids = tokenizer.encode(question.strip())[0]
    ids = ids if not ids or tokenizer.bos is None else [tokenizer.bos, *ids]
    if len(ids) > length:
        warnings.warn(
            f"a question is longer than the {length} tokens that the projector reads of it "
            "(projector.question_length); the rest is cut off",
            stacklevel=2,
        )
    return np.array([*ids[:length], *[-1] * (length - len(ids))], np.int32)


def tokenize(
    conversation: Conversation,
    template: Template,
    tokenizer: Tokenizer,
    *,
    continues: bool = False,
    question_length: int = 0,
) -> Tokenized:
    """Token ids of a whole conversation, BOS first; each answer and its ``end`` are supervised.

    Only the template's own special tokens are such tokens; their names in a turn are text. An open last round leaves
    the prompt open for generation. continues: the rounds follow the end of an answer, so what stands between rounds
    takes the place of BOS and the system text. question_length: Q of ``Tokenized.questions``, for systems that read the
    question."""
    text = _assemble(conversation, template.named(tokenizer), continues)
    ids = [] if tokenizer.bos is None or continues else [tokenizer.bos]
    places = [(-1, -1)] * len(ids)  # characters of each id
    positions = []
    start = 0
    for index, piece in enumerate(text.pieces):
        if index:
            positions.append(len(ids))
            ids.append(0)
            places.append((start, start))
            start += 1
        piece_ids, offsets = tokenizer.encode(piece)
        ids += piece_ids
        places += [(start + begin, start + end) for begin, end in offsets]
        start += len(piece)
    begins, ends = np.array(places, np.int64).reshape(-1, 2).T
    mask = np.zeros(len(ids), bool)
    for begin, end in text.answers:
        mask |= (begins < end) & (ends > begin)
    of_round = np.searchsorted(text.starts, begins, side="right").astype(np.int32)
    questions = np.full((len(text.asked), question_length), -1, np.int32)
    if question_length:
        for image, question in enumerate(text.asked):
            questions[image] = question_ids(question, tokenizer, question_length)
    return Tokenized(np.array(ids, np.int32), mask, np.array(positions, np.int32), of_round, questions)

"""Any conversation, through check, training rows, lengths and prompts: refused by name, or right in all of them."""

import dataclasses
import re
from dataclasses import dataclass
from io import BytesIO

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from deltallava_jax.config import DataConfig, ModelConfig, VisionConfig
from deltallava_jax.data import tokens
from deltallava_jax.data.check import examine
from deltallava_jax.data.conversation import IMAGE, NOTES, TEMPLATES, Conversation, read_turns, text_pieces, tokenize
from deltallava_jax.data.pipeline import Rows
from deltallava_jax.data.records import Record
from deltallava_jax.errors import FAULTS, BadSample, TooManyFaults
from deltallava_jax.inference.model import Model
from tests import golden

SPECIAL = r"</?s>|<pad>|<unk>|<\|\w+\|>"
WORDS = ["what?", "a blue shape ", "ünï 🟦", "\ud83d", "USER: ", "ASSISTANT:", "{}", "<s", "/s>", " ", "\n"]
NAMES = ["<s>", "</s>", "<pad>", "<unk>", "<|im_end|>", "<|im_start|>assistant\n", "<|eot_id|>"]
CAPACITY = 4096
PICTURE = BytesIO()
Image.new("RGB", (8, 8), (200, 30, 60)).save(PICTURE, "PNG")
rarely = st.integers(0, 19).map(lambda number: number == 7)


@st.composite
def records(draw) -> Record:
    """LLaVA's form, and what people get wrong."""
    front = draw(st.sampled_from([(), (), (), ("system",), ("gpt",), ("system", "gpt")]))
    turns, markers = [], 0
    for speaker in (*front, *("human", "gpt") * draw(st.integers(1, 3)), *draw(st.sampled_from([(), (), ("human",)]))):
        pieces = WORDS + NAMES
        if speaker == "human" or draw(rarely):
            pieces = pieces + [IMAGE, f"{IMAGE}\n"] * 4
        piece = st.sampled_from(pieces) | st.text(min_size=1, max_size=3)
        value = draw(
            st.sampled_from(["", " ", "<video> what?"]) if draw(rarely) else st.lists(piece, min_size=1, max_size=6)
        )
        turns.append({"from": speaker, "value": "".join(value)})
        markers += turns[-1]["value"].count(IMAGE)
    images = draw(st.sampled_from([markers] * 6 + [0, 1]))
    return Record("record", (PICTURE.getvalue(),) * images, turns)


@dataclass
class One:
    record: Record

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return self.record


@pytest.fixture(scope="module")
def llama():
    return tokens.load(golden.DATA / "llama_tokenizer")


def read(record: Record) -> Conversation | None:
    try:
        conversation = read_turns(record.conversation, len(record.images))
    except BadSample as error:
        assert error.kind in FAULTS and "\n" not in str(error)
        return None
    assert set(conversation.notes) <= set(NOTES)
    return conversation


def special_ids(text: str, tokenizer) -> list[int]:
    ids = (tokenizer._backend.token_to_id(name) for name in re.findall(SPECIAL, text))
    return [id for id in ids if id is not None]


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=100, deadline=None, derandomize=True)
@given(record=records())
def test_what_is_read_is_right_in_check_rows_lengths_and_prompts(name, tokenizer, record):
    conversation = read(record)
    rows = Rows(One(record), tokenizer, DataConfig(template=name), VisionConfig(image_size=14))
    found = rows.lengths()
    if conversation is None or conversation.rounds[0].answer is None:
        for call in (lambda: rows.read(0, CAPACITY), lambda: examine(One(record), 0)):
            with pytest.raises(BadSample, match="record: "):
                call()
        with pytest.raises(TooManyFaults):  # as training does before its first step
            rows.plan((4,), 0)
        assert (found.tokens[0], found.images[0]) == (0, 0)
        return
    examine(One(record), 0)
    _, tokenized = rows.read(0, CAPACITY)
    assert_right(conversation, tokenized, TEMPLATES[name], tokenizer, len(record.images))
    assert (found.tokens[0], found.images[0]) == (len(tokenized.ids), len(record.images))
    batch, faults = rows.build([[0]], len(tokenized.ids), len(record.images))
    assert faults == ()
    np.testing.assert_array_equal(batch.tokens[0], tokenized.ids)
    np.testing.assert_array_equal(batch.loss_mask[0], tokenized.loss_mask)
    np.testing.assert_array_equal(batch.image_positions[0], tokenized.image_positions)

    last = conversation.rounds[-1]
    if record.images or not any(IMAGE in round.parts[0] for round in conversation.rounds):
        pairs = [(IMAGE.join(round.parts), round.answer) for round in conversation.rounds]
        model = Model(ModelConfig(), {}, tokenizer, name)
        prompt = model.ask([*pairs[:-1], (pairs[-1][0], None)], list(record.images), system=conversation.system)
        asked = dataclasses.replace(
            conversation, rounds=(*conversation.rounds[:-1], dataclasses.replace(last, answer=None))
        )
        np.testing.assert_array_equal(prompt.ids, tokenize(asked, TEMPLATES[name], tokenizer).ids)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(record=records())
def test_what_is_read_is_right_in_llamas_tokens(llama, record):
    conversation = read(record)
    if conversation is not None:
        tokenized = tokenize(conversation, TEMPLATES["vicuna_v1"], llama)
        assert_right(conversation, tokenized, TEMPLATES["vicuna_v1"], llama, len(record.images))


def assert_right(conversation, tokenized, template, tokenizer, images):
    """One placeholder per image, special tokens from the template alone, supervision on the answers alone."""
    ids = tokenized.ids
    assert conversation.images == len(tokenized.image_positions) == len(tokenized.questions) == images
    np.testing.assert_array_equal(np.flatnonzero(ids == 0), tokenized.image_positions)
    pieces = text_pieces(conversation, template, tokenizer)
    assert len(ids) == sum(tokenizer.lengths(pieces)) + images + 1

    answers = [round.answer for round in conversation.rounds if round.answer is not None]
    open_turn = template.user + template.assistant
    written = f"<s>{template.system}" + (open_turn + template.end + template.after) * len(answers)
    written += open_turn * (len(conversation.rounds) - len(answers))
    known = {
        tokenizer._backend.token_to_id(name)
        for name in ("<s>", "</s>", "<pad>", "<unk>", *re.findall(SPECIAL, str(TEMPLATES)))
    }
    assert [id for id in ids.tolist() if id in known and id] == special_ids(written, tokenizer)

    edges = np.flatnonzero(np.diff(tokenized.loss_mask.astype(int), prepend=0, append=0)).reshape(-1, 2)
    if template.caption and len(conversation.rounds) > 1:
        return  # nothing parts the end of a caption from what follows it
    assert len(edges) == len(answers)
    for (start, end), answer in zip(edges, answers, strict=True):
        expected = answer.encode("utf-8", "replace").decode()
        assert tokenizer.decode(ids[start:end]).split() == expected.split()

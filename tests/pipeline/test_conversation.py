"""Conversations to tokens: what is supervised, where images go, what is refused."""

import itertools
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltallava_jax.data.conversation import IMAGE, TEMPLATES, rounds, tokenize
from deltallava_jax.errors import BadSample

PAIRS = [
    (f"{IMAGE}\nwhat color is the shape?", "blue"),
    ("is there a triangle in the image?", "no"),
    ("Describe {it}.\nIn detail!", "A blue circle, ünïcode 🟦 and\ntwo lines"),
    ("What is written there?", ""),
]
# Without "<": the name of a special token in a text is that token.
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<"), min_size=1, max_size=12)

INSTRUCT = {name: template for name, template in TEMPLATES.items() if not template.caption}
each_template = pytest.mark.parametrize("template", INSTRUCT.values(), ids=INSTRUCT)


def supervised(tokenized) -> list[list[int]]:
    """The ids of each contiguous run of supervised tokens."""
    edges = np.flatnonzero(np.diff(tokenized.loss_mask.astype(int), prepend=0, append=0))
    return [tokenized.ids[a:b].tolist() for a, b in edges.reshape(-1, 2)]


def assert_supervises(tokenized, answers, template, tokenizer):
    """The supervised runs are the answers, each closed by its end token and nothing else."""
    (end,), _ = tokenizer.encode(template.end)
    runs = supervised(tokenized)
    assert [run[-1] for run in runs] == [end] * len(answers)
    assert [tokenizer.decode(run[:-1]) for run in runs] == [answer.strip() for answer in answers]
    assert not any(end in run[:-1] for run in runs)


@each_template
@pytest.mark.parametrize("turns", [1, 2, 4])
def test_exactly_the_answers_and_their_ends_are_supervised(template, turns, tokenizer):
    tokenized = tokenize(PAIRS[:turns], template, tokenizer)
    assert tokenized.ids.shape == tokenized.loss_mask.shape
    assert (tokenized.ids.dtype, tokenized.loss_mask.dtype) == (np.int32, bool)
    assert_supervises(tokenized, [answer for _, answer in PAIRS[:turns]], template, tokenizer)


@each_template
@settings(max_examples=60, deadline=None, derandomize=True)
@given(pairs=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4))
def test_exactly_the_answers_are_supervised_in_any_conversation(template, tokenizer, pairs):
    assert_supervises(tokenize(pairs, template, tokenizer), [answer for _, answer in pairs], template, tokenizer)


def test_the_text_is_the_templates(tokenizer):
    decoded = tokenizer.decode(tokenize(PAIRS[:2], TEMPLATES["vicuna_v1"], tokenizer).ids)
    assert decoded == (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed,"
        " and polite answers to the user's questions. USER: \nwhat color is the shape? ASSISTANT: blueUSER: "
        "is there a triangle in the image? ASSISTANT: no"
    )
    brief = tokenize(PAIRS[:2], TEMPLATES["brief"], tokenizer).ids
    assert brief[0] == tokenizer.bos
    assert tokenizer.decode(brief) == "what color is the shape? blueis there a triangle in the image? no"


@each_template
@pytest.mark.parametrize("turns", [1, 2, 4])
def test_a_prompt_is_the_beginning_of_the_conversation_it_asks_for(template, turns, tokenizer):
    (*earlier, (question, _)) = pairs = PAIRS[:turns]
    full, prompt = tokenize(pairs, template, tokenizer), tokenize([*earlier, (question, None)], template, tokenizer)
    length = len(prompt.ids)
    np.testing.assert_array_equal(prompt.ids, full.ids[:length])
    np.testing.assert_array_equal(prompt.loss_mask, full.loss_mask[:length])
    after = len(tokenizer.encode(template.after)[0])
    assert full.loss_mask[length : len(full.ids) - after].all()  # what is left is the answer
    assert len(supervised(prompt)) == turns - 1


# ------------------------------------------------------------------ images


@each_template
@pytest.mark.parametrize(
    ("question", "images"),
    [
        ("no image here?", 0),
        (f"{IMAGE}\nwhat is it?", 1),
        (f"what is it?\n{IMAGE}", 1),
        (f"{IMAGE}{IMAGE} which of the two?", 2),
        (f"is {IMAGE} left of {IMAGE} or of {IMAGE}", 3),
    ],
)
def test_placeholders_stand_where_the_markers_stood(template, question, images, tokenizer):
    tokenized = tokenize([("hello", "yes"), (question, "no")], template, tokenizer)
    assert tokenized.image_positions.shape == (images,) and tokenized.image_positions.dtype == np.int32
    np.testing.assert_array_equal(np.flatnonzero(tokenized.ids == 0), tokenized.image_positions)
    assert not tokenized.loss_mask[tokenized.image_positions].any()
    bounds = [*tokenized.image_positions, len(tokenized.ids)]
    pieces = [tokenizer.decode(tokenized.ids[a + 1 : b]) for a, b in itertools.pairwise(bounds)]
    expected = template.turn(question) + template.answer("no") + template.after
    plain = [re.sub(r"<\|.+?\|>|</s>", "", piece).strip() for piece in expected.split(IMAGE)[1:]]
    assert pieces == plain  # special tokens are left out of what is decoded
    assert_supervises(tokenized, ["yes", "no"], template, tokenizer)


def test_an_image_adds_one_token(tokenizer):
    with_image, without = (tokenize([(q, "no")], TEMPLATES["brief"], tokenizer) for q in (f"{IMAGE}\nwhat?", "\nwhat?"))
    assert with_image.ids[1:2].tolist() == [0]
    np.testing.assert_array_equal(np.delete(with_image.ids, 1), without.ids)
    np.testing.assert_array_equal(np.delete(with_image.loss_mask, 1), without.loss_mask)


# ------------------------------------------------------------------ independent rounds


@pytest.mark.parametrize(
    ("name", "front"),
    [
        pytest.param("brief", f"{IMAGE}\n", id="brief, image"),
        pytest.param("brief", f"{IMAGE}\n{IMAGE}\n", id="brief, two images"),
        pytest.param("brief", "", id="brief, text"),
        pytest.param("vicuna_v1", "", id="vicuna_v1, text"),
    ],
)
def test_the_shared_part_and_one_round_are_that_question_asked_alone(name, front, tokenizer):
    bare = [("what color is the shape?", "blue"), ("which?\nOne word.", "a red circle"), ("is it teal?", "no")]
    pairs = [(front + bare[0][0], bare[0][1]), *bare[1:]]
    tokenized = tokenize(pairs, TEMPLATES[name], tokenizer)
    assert tokenized.rounds.dtype == np.int32 and set(np.diff(tokenized.rounds)) == {0, 1}
    assert not tokenized.rounds[tokenized.image_positions].any()
    for number, (question, answer) in enumerate(bare, start=1):
        alone = tokenize([(front + question, answer)], TEMPLATES[name], tokenizer)
        seen = np.isin(tokenized.rounds, (0, number))
        np.testing.assert_array_equal(tokenized.ids[seen], alone.ids)
        np.testing.assert_array_equal(tokenized.loss_mask[seen], alone.loss_mask)
        assert tokenized.loss_mask[tokenized.rounds == number].any()


@each_template
def test_images_of_later_rounds_are_in_their_round(template, tokenizer):
    pairs = [("no image", "yes"), (f"{IMAGE}\nwhat?", "one"), (f"like {IMAGE}?", None)]
    tokenized = tokenize(pairs, template, tokenizer)
    assert tokenized.rounds[tokenized.image_positions].tolist() == [2, 3]
    assert tokenized.rounds[0] == 0 and tokenized.rounds[-1] == 3


# ------------------------------------------------------------------ rounds


def turns(*values):
    return [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]


def test_rounds_pairs_questions_with_answers():
    assert rounds(turns("a", "b", "c", "d")) == [("a", "b"), ("c", "d")]
    assert rounds(turns("a", "b", "c")) == [("a", "b"), ("c", None)]
    assert rounds([{"from": "gpt", "value": "hello"}, *turns("a", "b")]) == [("a", "b")]


def test_the_one_image_of_a_turn_goes_before_its_text():
    for value in (f"{IMAGE}\nwhat?", f"what? {IMAGE}", f"{IMAGE}what?", f" {IMAGE}\r\nwhat? \n"):
        assert rounds(turns(value, "b")) == [(f"{IMAGE}\nwhat?", "b")]
    assert rounds(turns(IMAGE, " b ")) == [(IMAGE, " b ")]
    assert rounds(turns(f"is {IMAGE} like {IMAGE}?", "b")) == [(f"is {IMAGE} like {IMAGE}?", "b")]


@pytest.mark.parametrize(
    ("conversation", "words"),
    [
        ([], "empty"),
        (turns("a", "b")[1:], "empty"),
        (turns("a", "b", "c", " \n"), "turn 3 is empty"),
        (turns("", "b"), "turn 0 is empty"),
        (turns("a", "b")[:1] * 2, "turn 1 is from 'human', expected 'gpt'"),
        ([{"from": "system", "value": "a"}], "turn 0 is from 'system', expected 'human'"),
        ([{"value": "a"}], "turn 0 is from None, expected 'human'"),
        (turns("a", None), "turn 1 .* text value"),
        (turns("a", 7), "turn 1 .* text value"),
        ([{"from": "human"}], "turn 0 .* text value"),
    ],
)
def test_a_broken_conversation_says_what_is_wrong(conversation, words):
    with pytest.raises(BadSample, match=words):
        rounds(conversation)


def test_a_turn_that_is_no_object():
    with pytest.raises(BadSample, match="turn 0"):
        rounds(["what is it?", "a shape"])


def test_half_a_surrogate_pair_does_not_stop_the_run(tokenizer):
    tokenize([("what?", "a \ud83d shape")], TEMPLATES["brief"], tokenizer)


# ------------------------------------------------------------------ questions, for systems that read them


@each_template
def test_each_image_knows_its_question(template, tokenizer):
    pairs = [(f"{IMAGE}\n{IMAGE}\nwhat color is the shape?", "blue"), (f"is there {IMAGE} a triangle?", "no")]
    tokenized = tokenize(pairs, template, tokenizer)
    asked = [tokenizer.decode(tokenized.ids[start:end]) for start, end in tokenized.questions]
    assert asked == ["what color is the shape?"] * 2 + ["a triangle?"]
    assert tokenize([("no image", "yes")], template, tokenizer).questions.shape == (0, 2)

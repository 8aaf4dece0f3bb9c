"""Conversations to tokens: what is supervised, where images go, what is refused."""

import itertools
import re
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltallava_jax.data.conversation import (
    IMAGE,
    TEMPLATES,
    Conversation,
    Round,
    end_ids,
    prompt_conversation,
    question_ids,
    read_turns,
    tokenize,
)
from deltallava_jax.errors import BadSample, ConfigError

PAIRS = [
    (f"{IMAGE}\nwhat color is the shape?", "blue"),
    ("is there a triangle in the image?", "no"),
    ("Describe {it}.\nIn detail!", "A blue circle, ünïcode 🟦 and\ntwo lines"),
    ("What is written there?", ""),
]
TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)

INSTRUCT = {name: template for name, template in TEMPLATES.items() if not template.caption}
each_template = pytest.mark.parametrize("template", INSTRUCT.values(), ids=INSTRUCT)


def talk(pairs) -> Conversation:
    """With an image for each marker of a question."""
    return prompt_conversation(pairs, sum(question.count(IMAGE) for question, _ in pairs))


def supervised(tokenized) -> list[list[int]]:
    """The ids of each contiguous run of supervised tokens."""
    edges = np.flatnonzero(np.diff(tokenized.loss_mask.astype(int), prepend=0, append=0))
    return [tokenized.ids[a:b].tolist() for a, b in edges.reshape(-1, 2)]


def assert_supervises(tokenized, answers, template, tokenizer):
    """The supervised runs are the answers, each closed by its end token and nothing else."""
    (end,) = end_ids(template, tokenizer)
    runs = supervised(tokenized)
    assert [run[-1] for run in runs] == [end] * len(answers)
    assert [tokenizer.decode(run[:-1]) for run in runs] == [answer.strip() for answer in answers]
    assert not any(end in run[:-1] for run in runs)


@each_template
@pytest.mark.parametrize("turns", [1, 2, 4])
def test_exactly_the_answers_and_their_ends_are_supervised(template, turns, tokenizer):
    tokenized = tokenize(talk(PAIRS[:turns]), template, tokenizer)
    assert tokenized.ids.shape == tokenized.loss_mask.shape
    assert (tokenized.ids.dtype, tokenized.loss_mask.dtype) == (np.int32, bool)
    assert_supervises(tokenized, [answer for _, answer in PAIRS[:turns]], template, tokenizer)


@each_template
@settings(max_examples=60, deadline=None, derandomize=True)
@given(pairs=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4))
def test_exactly_the_answers_are_supervised_in_any_conversation(template, tokenizer, pairs):
    assert_supervises(tokenize(talk(pairs), template, tokenizer), [answer for _, answer in pairs], template, tokenizer)


def test_the_text_is_the_templates(tokenizer):
    decoded = tokenizer.decode(tokenize(talk(PAIRS[:2]), TEMPLATES["vicuna_v1"], tokenizer).ids)
    assert decoded == (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed,"
        " and polite answers to the user's questions. USER: \nwhat color is the shape? ASSISTANT: blueUSER: "
        "is there a triangle in the image? ASSISTANT: no"
    )
    brief = tokenize(talk(PAIRS[:2]), TEMPLATES["brief"], tokenizer).ids
    assert brief[0] == tokenizer.bos
    assert tokenizer.decode(brief) == "what color is the shape? blueis there a triangle in the image? no"


@each_template
@pytest.mark.parametrize("turns", [1, 2, 4])
def test_a_prompt_is_the_beginning_of_the_conversation_it_asks_for(template, turns, tokenizer):
    (*earlier, (question, _)) = pairs = PAIRS[:turns]
    full, prompt = (
        tokenize(talk(pairs), template, tokenizer),
        tokenize(talk([*earlier, (question, None)]), template, tokenizer),
    )
    length = len(prompt.ids)
    np.testing.assert_array_equal(prompt.ids, full.ids[:length])
    np.testing.assert_array_equal(prompt.loss_mask, full.loss_mask[:length])
    after = len(tokenizer.encode(tokenizer.named(template.after))[0])
    assert full.loss_mask[length : len(full.ids) - after].all()  # what is left is the answer
    assert len(supervised(prompt)) == turns - 1


# ------------------------------------------------------------------ images


@each_template
@pytest.mark.parametrize(
    ("question", "images"),
    [
        ("no image here?", 0),
        (f"{IMAGE}\nwhat is it?", 1),
        (f"what is it?\n{IMAGE}{IMAGE}", 2),
        (f"{IMAGE}{IMAGE} which of the two?", 2),
        (f"is {IMAGE} left of {IMAGE} or of {IMAGE}", 3),
    ],
)
def test_placeholders_stand_where_the_markers_stood(template, question, images, tokenizer):
    tokenized = tokenize(talk([("hello", "yes"), (question, "no")]), template, tokenizer)
    assert tokenized.image_positions.shape == (images,) and tokenized.image_positions.dtype == np.int32
    np.testing.assert_array_equal(np.flatnonzero(tokenized.ids == 0), tokenized.image_positions)
    assert not tokenized.loss_mask[tokenized.image_positions].any()
    bounds = [*tokenized.image_positions, len(tokenized.ids)]
    pieces = [tokenizer.decode(tokenized.ids[a + 1 : b]) for a, b in itertools.pairwise(bounds)]
    expected = template.user.format(question) + template.assistant + template.lead + "no" + template.end
    plain = [re.sub(r"<\|.+?\|>|</s>", "", piece).strip() for piece in expected.split(IMAGE)[1:]]
    assert pieces == plain  # special tokens are left out of what is decoded
    assert_supervises(tokenized, ["yes", "no"], template, tokenizer)


def test_an_image_adds_one_token(tokenizer):
    with_image, without = (
        tokenize(talk([(q, "no")]), TEMPLATES["brief"], tokenizer) for q in (f"{IMAGE}\nwhat?", "\nwhat?")
    )
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
    tokenized = tokenize(talk(pairs), TEMPLATES[name], tokenizer)
    assert tokenized.rounds.dtype == np.int32 and set(np.diff(tokenized.rounds)) == {0, 1}
    assert not tokenized.rounds[tokenized.image_positions].any()
    for number, (question, answer) in enumerate(bare, start=1):
        alone = tokenize(talk([(front + question, answer)]), TEMPLATES[name], tokenizer)
        seen = np.isin(tokenized.rounds, (0, number))
        np.testing.assert_array_equal(tokenized.ids[seen], alone.ids)
        np.testing.assert_array_equal(tokenized.loss_mask[seen], alone.loss_mask)
        assert tokenized.loss_mask[tokenized.rounds == number].any()


@each_template
def test_images_of_later_rounds_are_in_their_round(template, tokenizer):
    pairs = [("no image", "yes"), (f"{IMAGE}\nwhat?", "one"), (f"like {IMAGE}?", None)]
    tokenized = tokenize(talk(pairs), template, tokenizer)
    assert tokenized.rounds[tokenized.image_positions].tolist() == [2, 3]
    assert tokenized.rounds[0] == 0 and tokenized.rounds[-1] == 3


# ------------------------------------------------------------------ records


def turns(*values):
    return [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]


def pairs_of(conversation: Conversation) -> list[tuple[str, str | None]]:
    return [(IMAGE.join(each.parts), each.answer) for each in conversation.rounds]


def test_turns_are_questions_and_answers():
    assert pairs_of(read_turns(turns("a", "b", "c", "d"), 0)) == [("a", "b"), ("c", "d")]
    assert pairs_of(read_turns(turns("a", "b", "c"), 0)) == [("a", "b"), ("c", None)]
    found = read_turns([{"from": "gpt", "value": "hello"}, *turns("a", "b")], 0)
    assert found == Conversation((Round(("a",), "b"),), notes=("greeting",))


def test_the_one_image_of_a_turn_goes_before_its_text():
    for value in (f"{IMAGE}\nwhat?", f"what? {IMAGE}", f"{IMAGE}what?", f" {IMAGE}\r\nwhat? \n"):
        assert read_turns(turns(value, "b"), 1).rounds == (Round(("", "\nwhat?"), "b"),)
    assert read_turns(turns(IMAGE, " b "), 1).rounds == (Round(("", ""), " b "),)
    assert read_turns(turns(f"is {IMAGE} like {IMAGE}?", "b"), 2).rounds == (Round(("is ", " like ", "?"), "b"),)


@pytest.mark.parametrize(
    ("values", "images", "words"),
    [
        ((f"{IMAGE}\nMake it blue.", f"{IMAGE}\nNow it is blue."), 2, "turn 1 is not from 'human' but holds <image>"),
        ((f"{IMAGE}\nMake it blue.", f"{IMAGE}\nNow it is blue."), 1, "turn 1 is not from 'human' but holds <image>"),
        (("Make it blue.", f"{IMAGE}\nNow it is blue."), 1, "turn 1 is not from 'human' but holds <image>"),
        ((f"{IMAGE}{IMAGE} which?", "one"), 1, "2 <image> markers, but 1 images"),
        ((f"{IMAGE} which?", "one"), 2, "1 <image> markers, but 2 images"),
        ((f"{IMAGE} which?", "one", f"and {IMAGE}{IMAGE}?", "two"), 2, "3 <image> markers, but 2 images"),
    ],
)
def test_places_are_the_records_images_or_a_fault(values, images, words):
    with pytest.raises(BadSample, match=words) as caught:
        read_turns(turns(*values), images)
    assert caught.value.kind == "markers"


def test_a_place_before_any_question_is_a_fault_too():
    for speaker in ("gpt", "system"):
        with pytest.raises(BadSample, match="turn 0 is not from 'human' but holds <image>"):
            read_turns([{"from": speaker, "value": f"{IMAGE} here"}, *turns("a", "b")], 1)


def test_the_marker_is_text_in_a_record_without_images(tokenizer):
    values = f"What does {IMAGE} do in an RSS feed? ", f"{IMAGE} holds the channel's picture."
    conversation = read_turns(turns(*values), 0)
    assert conversation == Conversation((Round(values[:1], values[1]),), notes=("literal",))
    tokenized = tokenize(conversation, TEMPLATES["vicuna_v1"], tokenizer)
    assert not len(tokenized.image_positions) and (tokenized.ids > 0).all()
    assert tokenizer.decode(tokenized.ids[tokenized.loss_mask]) == values[1]


def test_images_without_a_marker_go_before_the_first_question():
    for images in (1, 2):
        found = read_turns(turns("what?", "a shape", "sure?", "yes"), images)
        assert (
            found.rounds == read_turns(turns(f"{IMAGE}\n" * images + "what?", "a shape", "sure?", "yes"), images).rounds
        )
        assert found.images == images and found.notes == ("unmarked",)
    assert read_turns(turns("", "a caption"), 1).rounds == (Round(("", ""), "a caption"),)


@pytest.mark.parametrize(
    ("values", "images", "rounds", "silent"),
    [
        (("a", "b", "c", " \n", "d", "e"), 0, [("a", "b"), ("d", "e")], 1),
        (("a", "b", "c", ""), 0, [("a", "b")], 1),
        (("", "b", "c", "d", "e"), 0, [("c", "d"), ("e", None)], 1),
        (("", "", "c", "d", " "), 0, [("c", "d")], 2),
        # The images of a round that is left out: of the next one, or of an open question at the end.
        ((f"{IMAGE}\na", "", "c", "d"), 1, [(f"{IMAGE}\nc", "d")], 1),
        ((f"{IMAGE}\na", "", f"{IMAGE}\nc", "d"), 2, [(f"{IMAGE}\n{IMAGE}\nc", "d")], 1),
        ((f"{IMAGE}\na", "b", f"{IMAGE}\nc", ""), 2, [(f"{IMAGE}\na", "b"), (f"{IMAGE}\nc", None)], 1),
        ((f"{IMAGE}\na", "b", f"{IMAGE} c", "", "d", ""), 2, [(f"{IMAGE}\na", "b"), (f"{IMAGE}\nd", None)], 2),
    ],
)
def test_a_round_that_says_nothing_is_left_out_and_counted(values, images, rounds, silent):
    found = read_turns(turns(*values), images)
    assert pairs_of(found) == rounds and found.notes == ("silent",) * silent and found.images == images


def test_a_system_turn_is_the_conversations_system_text(tokenizer):
    system, named = "Answer in one word.", tokenizer.named
    conversation = read_turns([{"from": "system", "value": system}, *turns(f"{IMAGE}\nwhat?", "blue")], 1)
    for name, front in [
        ("vicuna_v1", f"{system} USER: "),
        ("chatml", named("<|im_start|>system\n") + system + named("<|im_end|>\n<|im_start|>user\n")),
        ("brief", f"{system}\n"),
    ]:
        tokenized = tokenize(conversation, TEMPLATES[name], tokenizer)
        (place,) = tokenized.image_positions
        assert tokenized.ids[:place].tolist() == [tokenizer.bos, *tokenizer.encode(front)[0]]
        assert tokenizer.decode(tokenized.ids[tokenized.loss_mask]) == "blue"
    assert read_turns([{"from": "system", "value": ""}, *turns("a", "b")], 0).system is None


def test_independent_rounds_share_the_system_text(tokenizer):
    pairs = [("what?", "blue"), ("which?", "a circle")]
    tokenized = tokenize(prompt_conversation(pairs, 0, "One word."), TEMPLATES["brief"], tokenizer)
    for number, pair in enumerate(pairs, start=1):
        alone = tokenize(prompt_conversation([pair], 0, "One word."), TEMPLATES["brief"], tokenizer)
        np.testing.assert_array_equal(tokenized.ids[np.isin(tokenized.rounds, (0, number))], alone.ids)


@pytest.mark.parametrize("value", ["<video>\nwhat?", "what is it? <video>", " <video> "])
def test_a_video_is_a_fault_of_its_own(value):
    with pytest.raises(BadSample, match="turn 0 is about a video, which is not read") as caught:
        read_turns(turns(value, "red"), 0)
    assert caught.value.kind == "video"
    assert read_turns(turns("How does <video> work in HTML?", "So."), 0).images == 0


@pytest.mark.parametrize(
    ("conversation", "words"),
    [
        ([], "empty"),
        (turns("a", "b")[1:], "empty"),
        ([{"from": "system", "value": "a"}], "empty"),
        (turns("a", " \n"), "turn 1 is empty"),
        (turns("", "b"), "turn 0 is empty"),
        (turns("a", "b")[:1] * 2, "turn 1 is from 'human', expected 'gpt'"),
        ([*turns("a", "b"), {"from": "system", "value": "a"}], "turn 2 is from 'system', expected 'human'"),
        ([{"value": "a"}], "turn 0 is from None, expected 'human'"),
        (turns("a", None), "turn 1 has a value of type NoneType, expected a text value"),
        (turns("a", 7), "turn 1 has a value of type int, expected a text value"),
        (turns("a", ["b"]), "turn 1 has a value of type list, expected a text value"),
        ([{"from": "human"}], "turn 0 has a value of type NoneType"),
        (["what is it?", "a shape"], "turn 0 is of type str"),
        ([*turns("a"), 3], "turn 1 is of type int"),
        ({"from": "human"}, "the conversation is of type dict, expected a list of turns"),
        (None, "the conversation is of type NoneType"),
    ],
)
def test_a_broken_conversation_says_what_is_wrong(conversation, words):
    with pytest.raises(BadSample, match=words) as caught:
        read_turns(conversation, 0)
    assert caught.value.kind == "malformed"


def test_half_a_surrogate_pair_does_not_stop_the_run(tokenizer):
    tokenize(talk([("what?", "a \ud83d shape")]), TEMPLATES["brief"], tokenizer)


# ------------------------------------------------------------------ prompts


def test_a_prompt_has_its_images_where_it_marks_them_or_before_the_last_question():
    assert prompt_conversation([("a", "b"), ("c", None)], 2).rounds == (
        Round(("a",), "b"),
        Round(("", "\n", "\nc"), None),
    )
    assert prompt_conversation([(f"a {IMAGE}", "b"), ("c", None)], 1).rounds == (
        Round(("", "\na"), "b"),
        Round(("c",), None),
    )
    assert prompt_conversation([(f"a {IMAGE} b {IMAGE}", None)], 2).rounds == (Round(("a ", " b ", ""), None),)
    for question, images in ((IMAGE, 0), (IMAGE, 2), (IMAGE * 2, 1)):
        with pytest.raises(ConfigError, match=f"<image> markers, but {images} images are given"):
            prompt_conversation([(question, None)], images)


def test_an_answer_of_the_history_is_text():
    said = f"The tag is {IMAGE}."
    assert prompt_conversation([("a", said), ("c", None)], 1).rounds == (Round(("a",), said), Round(("", "\nc"), None))


# ------------------------------------------------------------------ questions, for systems that read them


@each_template
def test_each_image_knows_its_question(template, tokenizer):
    pairs = [(f"{IMAGE}\n{IMAGE}\nwhat color is the shape?", "blue"), (f"is there {IMAGE} a triangle?", "no")]
    tokenized = tokenize(talk(pairs), template, tokenizer, question_length=20)
    words = ["what color is the shape?"] * 2 + ["is there  a triangle?"]
    assert tokenized.questions.shape == (3, 20) and (tokenized.questions[:, 0] == tokenizer.bos).all()
    for ids, text in zip(tokenized.questions, words, strict=True):
        assert ids[ids >= 0].tolist() == [tokenizer.bos, *tokenizer.encode(text)[0]]  # as a text by itself
    nothing = tokenize(talk([("no image", "yes"), (f"{IMAGE}\n", "no")]), template, tokenizer, question_length=3)
    assert nothing.questions.tolist() == [[-1, -1, -1]]
    assert tokenize(talk(pairs), template, tokenizer).questions.shape == (3, 0)  # for systems that read none


def test_a_question_is_whole_up_to_the_limit_and_it_is_said_where_it_is_cut(tokenizer):
    ids, text = [tokenizer.bos, *tokenizer.encode("is there a triangle?")[0]], "\nis there a triangle? "
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert question_ids(text, tokenizer, len(ids)).tolist() == ids
    with pytest.warns(UserWarning, match=r"longer than the 3 tokens .*\(projector.question_length\)"):
        assert question_ids(text, tokenizer, 3).tolist() == ids[:3]


@pytest.mark.parametrize("question", ["what <image> is it?", "<image>\nwhat is it?", "what is it? ", "<image>"])
def test_a_prompt_has_the_form_that_was_trained_on(question):
    turns = [{"from": "human", "value": question}]
    assert prompt_conversation([(question, None)], 1).rounds == read_turns(turns, 1).rounds

"""Conversations against the ids and labels of LLaVA's own code (testdata/README.md)."""

import dataclasses

import numpy as np
import pytest

from deltallava_jax.data import tokens
from deltallava_jax.data.conversation import IMAGE, TEMPLATES, Round, prompt_conversation, read_turns, tokenize
from deltallava_jax.errors import BadSample
from tests import golden

CASES = {case["name"]: case for case in golden.read_json("conversation")["cases"]}
IMAGE_ID = -200
# Where the original masks the whole sample, or collapses two images into one, ours differs.
MASKED = ("eos_string_inside", "assistant_string_inside")


@pytest.fixture(scope="module")
def llama():
    return tokens.load(golden.DATA / "llama_tokenizer")


def conversation(case):
    return read_turns(case["source"], sum(turn["value"].count(IMAGE) for turn in case["source"]))


def ours(case, template, tokenizer):
    """(ids with the original's image id, supervised spans)"""
    found = tokenize(conversation(case), TEMPLATES[template], tokenizer)
    ids = found.ids.copy()
    ids[found.image_positions] = IMAGE_ID
    edges = np.flatnonzero(np.diff(found.loss_mask.astype(int), prepend=0, append=0))
    return ids.tolist(), edges.reshape(-1, 2).tolist()


@pytest.mark.parametrize("name", [name for name in CASES if name not in (*MASKED, "empty_answer", "two_images")])
def test_vicuna_v1(name, llama):
    expected = CASES[name]["vicuna_v1"]
    ids, spans = ours(CASES[name], "vicuna_v1", llama)
    length = expected["n"]  # the original cuts a text without image at 2048
    assert ids[:length] == expected["input_ids"] and (length == len(ids) or length == 2048)
    assert [[a, min(b, length)] for a, b in spans if a < length] == expected["supervised_spans"]


CAPTIONS = {name: case["plain"] for name, case in CASES.items() if case["plain"] and "input_ids" in case["plain"]}


@pytest.mark.parametrize("name", sorted(CAPTIONS.keys() - {"empty_answer", "two_images", "eos_string_inside"}))
def test_plain(name, llama):
    expected = CAPTIONS[name]
    ids, spans = ours(CASES[name], "plain", llama)
    assert ids == expected["input_ids"] and spans == expected["supervised_spans"]


def test_the_right_span_where_the_original_masks_the_sample(llama):
    expected = CASES["assistant_string_inside"]["vicuna_v1"]
    assert expected["all_masked"] and expected["mismatch_warning"]
    ids, ((start, end),) = ours(CASES["assistant_string_inside"], "vicuna_v1", llama)
    assert ids == expected["input_ids"] and end == len(ids) and ids[-1] == llama.eos
    assert ids[:start] == expected["generation_input_ids"]
    assert llama.decode(ids[start:end]) == "The text reads USER: hi ASSISTANT: hello."


def test_the_name_of_the_end_token_in_an_answer_is_text(llama):
    """The original trains the end token there, and masks the sample."""
    expected = CASES["eos_string_inside"]["vicuna_v1"]
    assert expected["all_masked"] and expected["input_ids"].count(llama.eos) == 2
    ids, ((start, end),) = ours(CASES["eos_string_inside"], "vicuna_v1", llama)
    assert ids[:start] == expected["generation_input_ids"]
    assert end == len(ids) and ids.index(llama.eos) == end - 1
    assert llama.decode(ids[start:end]) == "It says </s> in red letters."


def test_an_empty_answer_is_refused_where_the_original_masks_it(llama):
    assert CASES["empty_answer"]["vicuna_v1"]["all_masked"]
    with pytest.raises(BadSample, match="turn 1 is empty"):
        ours(CASES["empty_answer"], "vicuna_v1", llama)


def test_two_images_of_a_turn_stay_two(llama):
    ids, spans = ours(CASES["two_images"], "vicuna_v1", llama)
    expected = CASES["two_images"]["vicuna_v1"]  # there the second one is lost
    at = ids.index(IMAGE_ID)
    assert ids[at : at + 4] == [IMAGE_ID, 29871, 13, IMAGE_ID]  # the newline between them stays
    assert ids[:at] + ids[at + 3 :] == expected["input_ids"] and spans == [
        [a + 3, b + 3] for a, b in expected["supervised_spans"]
    ]


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("empty_answer", "two_images")])
def test_prompts(name, llama):
    read = conversation(CASES[name])
    (*earlier, last) = read.rounds
    prompt = dataclasses.replace(read, rounds=(*earlier, Round(last.parts, None)))
    found = tokenize(prompt, TEMPLATES["vicuna_v1"], llama)
    found.ids[found.image_positions] = IMAGE_ID
    assert found.ids.tolist() == CASES[name]["vicuna_v1"]["generation_input_ids"] or len(found.ids) > 2048


def test_the_image_is_after_35_tokens(llama):
    found = tokenize(prompt_conversation([("what?", "a")], 1), TEMPLATES["vicuna_v1"], llama)
    assert found.image_positions.tolist() == [35]


def test_queccs_question_is_the_originals(llama):
    """llava_arch.py tokenizes the question's text by itself (locuslab/llava-token-compression)."""
    prompt = prompt_conversation([("<image>\nWhat is it?", None)], 1)
    found = tokenize(prompt, TEMPLATES["vicuna_v1"], llama, question_length=8)
    assert found.questions.tolist() == [[1, 1724, 338, 372, 29973, -1, -1, -1]]

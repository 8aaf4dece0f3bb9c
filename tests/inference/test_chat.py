"""Texts: streamed pieces, stop texts, cancelling; and chats, whose carried caches equal a fresh prefill."""

import inspect
import textwrap
import time

import numpy as np
import pytest
from models import model, picture, visual
from PIL import Image

import deltallava_jax
from deltallava_jax.data.conversation import TEMPLATES, end_ids
from deltallava_jax.errors import BadSample, ConfigError
from deltallava_jax.inference.generate import Engine, Text, bucket, prompt_batch
from deltallava_jax.inference.model import Model
from deltallava_jax.inference.sampling import Sampling

QUESTION = "what color is the shape?"


def test_streamed_is_whole():
    pieces = []
    answer = model().stream(picture(), QUESTION, max_new_tokens=30)
    streamed = list(answer)
    whole = model().generate(picture(), QUESTION, max_new_tokens=30, on_text=pieces.append)
    assert "".join(streamed) == whole == "".join(pieces) == answer.text
    assert len(streamed) > 5 and answer.tokens == 30 and answer.finish == "length"
    assert 0 < answer.seconds_to_first <= answer.seconds


def test_the_seconds_of_an_answer_are_not_those_of_its_reader():
    answer, began, slept = model().stream(picture(), QUESTION, max_new_tokens=9), time.perf_counter(), 0
    for _ in answer:
        time.sleep(0.05)
        slept += 0.05
    assert slept > 0.1 and 0 < answer.seconds <= time.perf_counter() - began - (slept - 0.05)


def test_an_image_is_a_file_its_bytes_pixels_or_a_picture(tmp_path):
    file = tmp_path / "a.png"
    Image.fromarray(picture()).save(file)
    forms = (file, str(file), file.read_bytes(), picture(), Image.open(file), [picture()])
    assert len({model().generate(form, QUESTION, max_new_tokens=8) for form in forms}) == 1
    with pytest.raises(BadSample, match="float64 .*expected uint8 .height, width, 3."):
        model().generate(np.zeros((4, 4, 3)), QUESTION)


@pytest.mark.parametrize("documented", [Model.generate, Model.stream, Model.chat])
def test_the_example_of_a_docstring_runs(documented, workdir, tmp_path, monkeypatch):
    code = "\n".join(line for line in inspect.getdoc(documented).splitlines() if line.startswith("    "))
    assert "load(" in code and f".{documented.__name__}(" in code
    for name in ("shape.png", "a.png", "b.png"):
        Image.fromarray(picture()).save(tmp_path / name)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "easy_vqa").symlink_to(workdir)
    monkeypatch.chdir(tmp_path)
    exec(textwrap.dedent(code), {"deltallava_jax": deltallava_jax})


def test_a_stop_text_ends_the_answer_and_is_no_part_of_it():
    whole = model().generate(picture(), QUESTION, max_new_tokens=30)
    stop = whole[8:11]
    answer = model().stream(picture(), QUESTION, max_new_tokens=30, stop=[stop, "never said"])
    pieces = list(answer)
    assert "".join(pieces) == whole[: whole.index(stop)] and answer.finish == "stop"


def test_half_characters_and_beginnings_of_stop_texts_are_held_back():
    tokenizer = model().tokenizer
    ids = tokenizer.encode("é red, redder")[0]
    text = Text(tokenizer, end=2, stop=("redd!",))
    pieces = [text.add(token) for token in ids] + [text.close()]
    assert "".join(pieces) == "é red, redder" and not any("\ufffd" in piece for piece in pieces)
    assert text.finish == "length"
    text = Text(tokenizer, end=2, stop=("redd",))
    pieces = [text.add(token) for token in ids if text.finish is None]
    assert "".join(pieces) == "é red, " and text.finish == "stop"


def test_a_cancelled_answer_ends_early():
    answer = model().stream(picture(), QUESTION, max_new_tokens=30)
    for _ in answer:
        answer.cancel()
    assert answer.tokens < 30 and answer.finish == "cancelled"


@pytest.mark.parametrize(
    ("template", "turn"), [("chatml", "length"), ("brief", "stop"), ("brief", "cancelled"), ("brief", "end")]
)
def test_a_carried_cache_equals_a_fresh_prefill(turn, template, monkeypatch):
    """However the answer before ends; a later turn may bring an image of its own."""
    one = model(template=template)
    if turn == "end":  # a token of the answer ends it
        ids = one.stream(picture(0), QUESTION, max_new_tokens=5)
        ids.whole()
        monkeypatch.setattr(type(one), "end", ids.said[3])
    encoded, encode = [], Engine.encode
    counted = lambda self, x, *a, **k: encoded.append(len(x)) or encode(self, x, *a, **k)
    monkeypatch.setattr(Engine, "encode", counted)
    text = one.generate(picture(0), QUESTION, max_new_tokens=20, budget=4)
    stop = text[5:8] if turn == "stop" else "never"
    encoded.clear()
    chat, conversation, shown = one.chat(budget=4, max_new_tokens=20, stop=stop), [], []
    ending = end_ids(TEMPLATES[template], one.tokenizer)
    images = (picture(0), picture(2) if turn == "length" else None)
    for number, image in enumerate(images):
        answer = chat.stream(QUESTION, image)
        for _ in answer:
            if turn == "cancelled":
                answer.cancel()
        asked = one.ask([(QUESTION, None)], image, continues=number > 0)
        if number:
            conversation += ending
        places = [len(conversation) + place for place in asked.image_positions]
        conversation += asked.ids.tolist()
        shown += [(place, image) for place in places]
        conversation += answer.ids
    monkeypatch.setattr(Engine, "encode", encode)
    assert encoded == [1, turn == "length"]
    conversation = conversation[: len(conversation) - len(answer.ids)]
    batch = prompt_batch([fresh(conversation, [place for place, _ in shown])], bucket(len(conversation)))
    seen = visual(one.engine, [picture for _, picture in shown], 4)
    (expected,) = one.engine.tokens(batch, *seen, Sampling(max_new_tokens=len(answer.said)), end=one.end)
    assert answer.said == expected


def fresh(ids, places):
    from deltallava_jax.data.conversation import Tokenized

    nothing = np.zeros(len(ids), np.int32)
    questions = np.zeros((len(places), 2), np.int32)
    return Tokenized(np.array(ids, np.int32), nothing > 0, np.array(places, np.int32), nothing, questions)


def test_a_chat_begins_anew_after_a_reset():
    chat = model().chat(max_new_tokens=8)
    first = chat.ask(QUESTION, picture())
    assert chat.ask(QUESTION) != first
    chat.reset()
    assert chat.ask(QUESTION, picture()) == first


def test_a_chat_under_fastv_takes_its_images_first():
    chat = model(fastv=True).chat(max_new_tokens=8)
    assert chat.ask(QUESTION, picture()) and chat.ask("is it red?")
    with pytest.raises(ConfigError, match="FastV chooses .* begin anew for a new image"):
        chat.ask(QUESTION, picture(1))

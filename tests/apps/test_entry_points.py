"""The same conversation has the same token ids from data rows, Python, a chat and the server, by every template."""

import argparse
import base64
import json
import re
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from deltallava_jax.apps import protocol, serve
from deltallava_jax.config import DataConfig
from deltallava_jax.data import tokens
from deltallava_jax.data.conversation import IMAGE, TEMPLATES
from deltallava_jax.data.pipeline import Rows
from deltallava_jax.data.records import Record
from deltallava_jax.errors import BadSample
from deltallava_jax.inference.generate import Answer
from deltallava_jax.inference.model import Chat, Model
from deltallava_jax.inference.sampling import GREEDY
from deltallava_jax.inference.text import Text
from tests.inference.models import TEXTS, model, picture

FIRST, ANSWER, NEXT = "is </s> it <|im_end|> red?", "<s> yes <|eot_id|>{}", "what color is the shape?<pad>"


@pytest.fixture(scope="module")
def trained():
    """A tokenizer with the special tokens of all templates."""
    backend = tokens.train(TEXTS, 300)._backend
    strings = " ".join(f"{one.system_format}{one.user}{one.assistant}{one.end}" for one in TEMPLATES.values())
    backend.add_special_tokens(sorted(set(re.findall(r"<\|\w+\|>", strings))))
    return tokens.Tokenizer(backend)


@pytest.fixture(scope="module")
def loaded(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    trained.save(folder / "tokenizer.json")
    return tokens.load(folder)


@pytest.fixture(scope="module")
def png():
    file = BytesIO()
    Image.fromarray(picture()).save(file, "PNG")
    return file.getvalue()


def of_data(tokenizer, template, system, turns, images):
    turns = [{"from": ("human", "gpt")[number % 2], "value": turn} for number, turn in enumerate(turns)]
    turns[0]["value"] = f"{IMAGE}\n" * len(images) + turns[0]["value"]
    record = Record("0", tuple(images), ([{"from": "system", "value": system}] if system else []) + turns)
    return Rows([record], tokenizer, DataConfig(template=template), model().cfg.vision).read(0, capacity=10_000)[1]


def of_python(one, system, turns, images):
    first, answered, last = turns
    return one.ask([(f"{IMAGE}\n" * len(images) + first, answered), (last, None)], images, system=system)


def of_server(one, system, turns, images):
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    uris = [f"data:image/png;base64,{base64.b64encode(image).decode()}" for image in images]
    first = [{"type": "image_url", "image_url": {"url": uri}} for uri in uris] + [{"type": "text", "text": turns[0]}]
    asked = [{"role": "system", "content": system}] if system else []
    asked += [{"role": "user", "content": first}, {"role": "assistant", "content": turns[1]}]
    asked += [{"role": "user", "content": turns[2]}]
    fields = protocol.parse(json.dumps({"messages": asked}).encode())
    return serve.prompt_of(one, fields["messages"], parser.parse_args(["tiny"]))[0]


def of_chat(one, turns, images, monkeypatch):
    """The ids that a chat's cache holds when it is to answer the second question, if the first was answered so."""
    asked, following = [], []
    monkeypatch.setattr(Model, "answer", lambda self, prompt, *_, **__: asked.append(prompt))
    real = Chat._next_turn
    monkeypatch.setattr(Chat, "_next_turn", lambda *a: following.append(real(*a)) or following[-1])
    chat, template = one.chat(), TEMPLATES[one.template]
    chat.stream(turns[0], images)
    chat.last = answer = Answer(one.engine, None, Text(one.tokenizer, one.end), GREEDY)
    answer.slots = "as if it had answered"
    answer.decoded = [*one.tokenizer.encode(template.lead + turns[1])[0], one.end]
    for token in answer.decoded:
        answer._text.add(token)
    chat.stream(turns[2])
    (first,), (batch,) = asked, following
    return np.concatenate([first.ids, answer.ids, batch.tokens[0][batch.segments[0] > 0]])


@pytest.mark.parametrize("system", [None, "Be </s> <image> brief."], ids=["", "system"])
@pytest.mark.parametrize("template", TEMPLATES)
def test_every_entry_point_gives_the_same_ids(template, system, trained, loaded, png, monkeypatch):
    whole = model()
    one = Model(whole.cfg, whole.params, loaded, template)
    for images in ([], [png]):
        turns = [FIRST, ANSWER, NEXT]
        expected = of_python(one, system, turns, images)
        assert len(expected.image_positions) == len(images)
        entry_points = [of_server(one, system, turns, images)]
        if not (images and system):  # a system text with a marker is refused where a record has images
            entry_points.append(of_data(trained, template, system, turns, images))
        for found in entry_points:
            np.testing.assert_array_equal(found.ids, expected.ids)
            np.testing.assert_array_equal(found.image_positions, expected.image_positions)
        if system is None and not TEMPLATES[template].caption:  # a caption's next question would be nothing
            np.testing.assert_array_equal(of_chat(one, turns, images, monkeypatch), expected.ids)
        monkeypatch.undo()


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_marker_where_no_image_can_be_is_text_or_refused(template, trained, loaded, png):
    whole = model()
    one = Model(whole.cfg, whole.params, loaded, template)
    turns = ["what does <image> do?", "a <image> b", NEXT]
    served = of_server(one, None, turns, [])
    np.testing.assert_array_equal(served.ids, of_data(trained, template, None, turns, []).ids)
    assert not len(served.image_positions) and (served.ids != 0).all()
    turns[0] = FIRST
    np.testing.assert_array_equal(of_server(one, None, turns, [png]).ids, of_python(one, None, turns, [png]).ids)
    with pytest.raises(BadSample, match="is not from 'human' but holds <image>"):
        of_data(trained, template, None, turns, [png])

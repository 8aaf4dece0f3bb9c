"""Requests that the server accepts or refuses, by name and before it computes anything."""

import base64
import copy
import http.client
import json
import random
import re
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from deltallava_jax.apps import protocol
from tests.apps.servers import PATH, QUESTION, messages, metrics, post, reply
from tests.inference.models import model


@pytest.mark.parametrize(
    ("change", "status", "words"),
    [
        (b"{", 400, "not JSON"),
        (b"\xff\xfe\x00", 400, "not JSON"),
        (b"[1]", 400, "the body=.1.; expected an object .JSON."),
        (b"{" + b" " * 300_000, 413, "more than 200,000 bytes"),
        ({"messages": []}, 400, "messages=..; expected a list that is not empty"),
        ({"max_tokens": 3}, 400, "messages: expected a list"),
        ({"messages": [7]}, 400, r"messages.0.=7; expected an object"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, 400, r"messages.0..role='assistant'"),
        ({"messages": [{"role": "tool", "content": "a"}]}, 400, r"messages.0..role='tool'; expected system"),
        ({"messages": messages() + [{"role": "assistant", "content": "a"}]}, 400, "last one is from the assistant"),
        ({"messages": messages() + [{"role": "system", "content": "a"}]}, 400, r"messages.1..role='system'"),
        ({"messages": [{"role": "user", "content": {}}]}, 400, "expected a text or a list"),
        ({"messages": [{"role": "user", "content": "a", "name": "b"}]}, 400, r"messages.0..name='b' is not offered"),
        ({"messages": [{"role": "user", "content": "a", "contents": "b"}]}, 400, "did you mean 'content'"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, 400, r"content.0..type='audio'"),
        ({"messages": messages(), "top_kk": 3}, 400, "'top_kk' is not known here; did you mean 'top_k'"),
        ({"messages": messages(), "response_format": {"type": "json_object"}}, 400, "response_format=.*not offered"),
        ({"messages": messages(), "tools": [{"type": "function"}], "tool_choice": "required"}, 400, "^tools="),
        ({"messages": messages(), "tool_choice": "required"}, 400, "^tool_choice='required' is not offered"),
        ({"messages": messages(), "logprobs": True}, 400, "^logprobs=True is not offered here; accepted: false, null"),
        ({"messages": messages(), "logit_bias": {"5": 1}}, 400, "^logit_bias="),
        ({"messages": messages(), "frequency_penalty": 0.5}, 400, "^frequency_penalty=0.5"),
        ({"messages": messages(), "min_p": 0.1}, 400, "^min_p=0.1"),
        ({"messages": messages(), "stop_token_ids": [5]}, 400, "^stop_token_ids="),
        ({"messages": messages(), "ignore_eos": True}, 400, "^ignore_eos=True"),
        ({"messages": messages(), "stream": True, "stream_options": True}, 400, "^stream_options=True; expected"),
        ({"messages": messages(), "stream": True, "stream_options": [1]}, 400, "^stream_options=.1.; expected"),
        ({"messages": messages(), "stream": "yes"}, 400, "^stream='yes'; expected true or false"),
        ({"messages": messages(), "temperature": 10**400}, 400, "^temperature=10"),
        ({"messages": messages(), "model": "gpt"}, 404, "'gpt' is not served"),
        ({"messages": messages(), "max_tokens": 1000}, 400, "do not fit into a slot of 96"),
        ({"messages": messages(), "max_tokens": "9"}, 400, "^max_tokens='9'"),
        ({"messages": messages(text="red " * 300)}, 400, "do not fit into a slot of 96"),
        ({"messages": messages(), "temperature": -1}, 400, "temperature=-1"),
        ({"messages": messages(), "stop": 3}, 400, "stop=3"),
        ({"messages": messages(), "budget": "x"}, 400, "budget='x'"),
        ({"messages": messages(), "n": 2}, 400, "^n=2"),
        ({"image": "http://example.org/a.png"}, 400, "expected a data URI"),
        ({"image": "data:image/png;base64,###"}, 400, "image_url"),
        ({"image": "data:image/png;base64,aGVsbG8="}, 400, "cannot be read"),
        ({"image": "bomb"}, 400, "2000 x 2000 pixels; at most 10,000"),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_refused(address, change, status, words):
    if isinstance(change, dict) and "image" in change:
        url = change["image"]
        if url == "bomb":
            file = BytesIO()
            Image.new("1", (2000, 2000)).save(file, "PNG")
            url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
        change = {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]}
    found, answer = post(address, change)
    assert found == status and re.search(words, answer["error"]["message"])


POOL = (True, False, 0, 1, -1, 2.5, float("inf"), float("nan"), "", "x", [], ["x"], [1], {}, {"x": 1})
NEUTRAL = {  # a value of the pool -> the fields that may have it
    "0": "top_logprobs frequency_penalty presence_penalty min_p min_tokens priority temperature top_k seed",
    "1": "n best_of length_penalty temperature top_p top_k repetition_penalty seed max_tokens max_completion_tokens "
    "budget",
    "-1": "seed top_k",
    "2.5": "temperature repetition_penalty",
    "True": "skip_special_tokens spaces_between_special_tokens add_generation_prompt parallel_tool_calls stream",
    "False": "logprobs ignore_eos include_stop_str_in_output continue_final_message add_special_tokens echo "
    "use_beam_search store parallel_tool_calls stream",
    "": "model user safety_identifier prompt_cache_key prompt_cache_retention request_id",
    "x": "user safety_identifier prompt_cache_key prompt_cache_retention request_id stop",
    "[]": "tools functions stop_token_ids bad_words stop",
    "['x']": "stop",
    "{}": "logit_bias chat_template_kwargs mm_processor_kwargs metadata stream_options",
    "{'x': 1}": "metadata",
}
ACCEPTED = {(value, name) for value, names in NEUTRAL.items() for name in names.split()}


def test_any_field_with_any_value_is_parsed_or_refused_by_name_and_the_server_keeps_running(address):
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=60)

    def ask(body):
        connection.request("POST", PATH, json.dumps(body))
        found = connection.getresponse()
        return found.status, json.load(found)

    sound, before = {"messages": messages(), "max_tokens": 1}, metrics(address)
    for name in protocol.FIELDS:
        for value in POOL:
            if (str(value), name) in ACCEPTED:
                protocol.parse(json.dumps({**sound, name: value}).encode())
                continue
            status, found = ask({**sound, name: value})
            expected = 404 if name == "model" and isinstance(value, str) else 400
            assert status == expected and found["error"]["message"].startswith(name), (name, value, found)
    assert metrics(address)["requests_total"] == before["requests_total"]

    draw, statuses = random.Random(0), set()
    for _ in range(200):
        body = {"messages": [*copy.deepcopy(messages(0)), {"role": "assistant", "content": "no"}, *messages()]}
        body |= {"max_tokens": 1, "stream_options": {"include_usage": True}, "stop": ["q"]}
        node = body
        while True:  # somewhere in the tree
            key = draw.choice(list(node) if isinstance(node, dict) else range(len(node)))
            if isinstance(node[key], (dict, list)) and node[key] and draw.random() < 0.8:
                node = node[key]
                continue
            node[key] = draw.choice(POOL)
            break
        statuses.add(ask(body)[0])
    assert statuses <= {200, 400, 404} and 400 in statuses
    assert reply(address, QUESTION) == model().generate(None, QUESTION, max_new_tokens=6)
    assert metrics(address)["running"] == metrics(address)["errors_total"] == 0


def test_the_page_has_the_table_of_fields():
    assert protocol.format_fields() in (Path(__file__).parents[2] / "docs" / "serving.md").read_text()

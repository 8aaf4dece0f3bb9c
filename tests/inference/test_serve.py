"""The server, asked by the official client and by clients that send what they should not."""

import argparse
import asyncio
import base64
import copy
import http.client
import json
import random
import re
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import pytest
from models import model, picture
from PIL import Image

uvicorn = pytest.importorskip("uvicorn")
pytest.importorskip("starlette")

from deltallava_jax.apps import protocol, serve  # noqa: E402
from deltallava_jax.data.conversation import Conversation, Round  # noqa: E402
from deltallava_jax.inference.sampling import Sampling  # noqa: E402

PATH = "/v1/chat/completions"
QUESTION = "what color is the shape?"


def app_of(*arguments, one=None):
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    options = parser.parse_args(["tiny", "--slots=3", "--context=96", *arguments])
    return serve.make_app(one or model(), options)


@contextmanager
def running(*arguments, one=None):
    """The server in a thread; its address."""
    server = uvicorn.Server(uvicorn.Config(app_of(*arguments, one=one), port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.02)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def address():
    with running("--max-pixels=10000", "--max-body=200000") as address:
        yield address


def uri(seed: int = 0, form: str = "PNG") -> str:
    file = BytesIO()
    Image.fromarray(picture(seed)).save(file, form)
    return f"data:image/{form.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def messages(seed=None, text=QUESTION):
    image = [] if seed is None else [{"type": "image_url", "image_url": {"url": uri(seed)}}]
    return [{"role": "user", "content": [*image, {"type": "text", "text": text}]}]


def post(address, body, key=None, path=PATH):
    """(status, what the server says)."""
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})
    try:
        with urllib.request.urlopen(urllib.request.Request(address + path, body, headers), timeout=120) as found:
            return found.status, json.load(found)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def said(address, *turns, **fields):
    """The answer to turns, a user's and an assistant's by turns, or messages."""
    roles = ("user", "assistant") * len(turns)
    asked = [
        turn if isinstance(turn, dict) else {"role": role, "content": turn}
        for role, turn in zip(roles, turns, strict=False)
    ]
    status, found = post(address, {"messages": asked, "max_tokens": 6, **fields})
    assert status == 200, found
    return found["choices"][0]["message"]["content"]


def answer(conversation, images=(), one=None, **settings):
    """What the model says to a conversation."""
    one, settings = one or model(), Sampling(**{"max_new_tokens": 6, **settings})
    return one.answer(one.prompt(conversation), one.pixels(list(images)), settings).whole()


def watched(address) -> dict:
    text = urllib.request.urlopen(f"{address}/metrics").read().decode()
    return {name.removeprefix("deltallava_"): float(value) for name, value in map(str.rsplit, text.splitlines())}


def test_without_a_seed_each_answer_is_another_and_its_seed_repeats_it(address):
    ask = lambda **more: post(address, {"messages": messages(), "max_tokens": 6, "temperature": 1, **more})[1]
    text = lambda found: found["choices"][0]["message"]["content"]
    answers = [ask() for _ in range(8)]
    assert len(set(map(text, answers))) > 1
    assert text(ask(seed=answers[2]["seed"])) == text(answers[2])
    assert len({text(ask(temperature=0)) for _ in range(2)}) == 1


def test_the_first_limit_that_is_given_holds_and_without_one_the_room_left(address):
    tokens = lambda **limits: post(address, {"messages": messages(), **limits})[1]["usage"]["completion_tokens"]
    assert tokens(max_completion_tokens=None, max_tokens=3) == 3
    assert tokens(max_completion_tokens=2, max_tokens=3) == 2
    expected = model().stream(None, QUESTION, max_new_tokens=96 - 16)
    expected.whole()
    assert tokens(max_completion_tokens=None) == expected.tokens > 30


def test_what_clients_send_is_read_as_they_mean_it(address):
    expected = model().generate(None, QUESTION, max_new_tokens=6)
    for more in ({"model": None}, {"model": ""}, {"seed": -1}, {"top_k": -1}, {"temperature": None, "stop": None}):
        assert said(address, QUESTION, **more) == expected
    lines = "\r\n".join(re.findall(".{1,76}", uri().partition(",")[2]))
    broken = {"role": "user", "content": [{"type": "image_url", "image_url": f"data:image/png;base64,{lines}"}]}
    broken["content"].append({"type": "text", "text": QUESTION})
    assert said(address, broken) == model().generate(picture(), QUESTION, max_new_tokens=6)
    user, assistant = ({"role": role, "content": "red?"} for role in ("user", "assistant"))
    system = {"role": "developer", "content": [{"type": "text", "text": "is"}, {"type": "text", "text": "it"}]}
    whole = {"role": "assistant", "content": "no", "refusal": None, "tool_calls": None, "annotations": []}
    found = said(address, system, user, user, assistant, whole, user)
    rounds = (Round(("red?\nred?",), "red?\nno"), Round(("red?",), None))
    assert found == answer(Conversation(rounds, system="is\nit"))


def test_text_is_text_and_an_image_has_one_place(address):
    """``<image>`` in a history once made a place that no picture filled: NaN in the cache and an empty answer."""
    first = messages(0, "<image>")[0]
    rounds = (Round(("", "\n<image>"), "a <image>?"), Round(("</s> red?",), None))
    found = said(address, first, "a <image>?", "</s> red?")
    assert found == answer(Conversation(rounds), [picture()])
    assert said(address, "<image>") == answer(Conversation((Round(("<image>",), None),)))


def test_a_decoder_alone_continues_a_text_and_needs_a_template_for_more():
    from test_chat import decoder_alone

    bare = decoder_alone()
    turns = [{"role": role, "content": "red?"} for role in ("user", "assistant", "user")]
    with running(one=bare) as address:
        assert said(address, "red?") == bare.generate(None, "red?", max_new_tokens=6)
        for asked, words in (
            (turns, "--template"),
            ([{"role": "system", "content": "short"}, *turns[:1]], "--template"),
            (messages(0), "no vision tower"),
        ):
            status, found = post(address, {"messages": asked})
            assert status == 400 and words in found["error"]["message"]
        status, found = post(address, {"messages": turns[:1], "budget": 4})
        assert status == 400 and found["error"]["message"].startswith("budget=4: the model has no vision tower")
    with running(one=decoder_alone("brief")) as address:
        assert said(address, *turns) == answer(Conversation((Round(("red?",), "red?"), Round(("red?",), None))))


def test_web_pages_may_ask_by_an_option(address):
    def preflight(address):
        headers = {"origin": "http://page.example", "access-control-request-method": "POST"}
        asked = urllib.request.Request(address + PATH, headers=headers, method="OPTIONS")
        with urllib.request.urlopen(asked) as found:
            return found.headers["access-control-allow-origin"]

    with pytest.raises(urllib.error.HTTPError, match="405"):
        preflight(address)
    with running("--cors", "http://page.example", "http://other.example") as open_to_pages:
        assert preflight(open_to_pages) == "http://page.example"


def test_a_stream_that_nobody_reads_frees_its_slot():
    """Its first event already cannot be sent."""
    app = app_of()

    async def call(method, path, send, body=b""):
        scope = {"type": "http", "method": method, "path": path, "raw_path": path.encode(), "query_string": b"",
                 "headers": [], "root_path": "", "scheme": "http", "server": ("a", 1), "client": ("b", 1),
                 "http_version": "1.1", "asgi": {"version": "3.0", "spec_version": "2.4"}}  # fmt: skip

        async def receive():
            return {"type": "http.request", "body": body, "more_body": False}

        await app(scope, receive, send)

    async def gone(_):
        raise OSError("gone")

    async def metrics():
        found = []

        async def keep(message):
            found.append(message.get("body", b""))

        await call("GET", "/metrics", keep)
        return b"".join(found).decode()

    async def scene():
        body = json.dumps({"messages": messages(), "stream": True, "max_tokens": 80}).encode()
        with pytest.raises(BaseException, match="gone|Disconnect|^$"):
            await call("POST", PATH, gone, body)
        while "requests_total 1" not in (found := await metrics()) and "cancelled_total 1" not in found:
            await asyncio.sleep(0.02)
        assert "cancelled_total 1" in await metrics()
        async with app.router.lifespan_context(app):
            pass

    asyncio.run(scene())


def test_the_official_client(address):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none")
    assert [one.id for one in client.models.list()] == ["tiny"] and client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="'gpt-5' is not served here; 'tiny' is"):
        client.models.retrieve("gpt-5")
    expected = model().generate(picture(), QUESTION, max_new_tokens=12, budget=4)
    ask = dict(model="tiny", messages=messages(0), max_tokens=12, extra_body={"budget": 4})
    whole = client.chat.completions.create(**ask)
    assert whole.choices[0].message.content == expected and whole.choices[0].finish_reason == "length"
    assert whole.usage.completion_tokens == 12
    assert whole.usage.prompt_tokens == len(model().ask([(f"<image>\n{QUESTION}", None)], picture()).ids) - 1 + 4
    pieces = list(client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices) == expected
    assert len(pieces) > 4 and pieces[-1].usage.completion_tokens == 12
    text = [{"role": "system", "content": "red?"}, *messages(), {"role": "assistant", "content": "yes"}, *messages()]
    assert client.chat.completions.create(model="tiny", messages=text, max_tokens=4).choices[0].message.content
    with pytest.raises(openai.BadRequestError, match="delta makes 16, 4, 1 tokens an image, not 5"):
        client.chat.completions.create(**{**ask, "extra_body": {"budget": 5}})


def test_many_at_a_time_get_what_each_gets_alone(address):
    """More than there are slots; images, budgets and settings mixed; some are gone before their answer."""
    settings = [dict(), dict(temperature=1.0, seed=3), dict(temperature=0.8, top_k=9, seed=4), dict(stop=["e"])]
    asks = [(index % 4 if index % 3 else None, (16, 4, 1)[index % 3], settings[index % 4]) for index in range(10)]

    def served(ask):
        seed, budget, more = ask
        status, found = post(address, {"messages": messages(seed), "max_tokens": 10, "budget": budget, **more})
        assert status == 200, found
        return found["choices"][0]["message"]["content"]

    def leaves(_):
        body = json.dumps({"messages": messages(1), "max_tokens": 60, "stream": True}).encode()
        with urllib.request.urlopen(address + "/v1/chat/completions", body, timeout=120) as found:
            found.readline()

    with ThreadPoolExecutor(13) as pool:
        left = [pool.submit(leaves, index) for index in range(3)]
        answers = list(pool.map(served, asks))
        for one in left:
            one.result()
    for (seed, budget, more), answer in zip(asks, answers, strict=True):
        image = None if seed is None else picture(seed)
        assert answer == model().generate(image, QUESTION, max_new_tokens=10, budget=budget, **more)


@pytest.mark.parametrize(
    ("change", "status", "words"),
    [
        (b"{", 400, "no JSON"),
        (b"\xff\xfe\x00", 400, "no JSON"),
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


def test_any_field_with_any_value_is_read_or_refused_by_name_and_the_server_lives_on(address):
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=60)

    def ask(body):
        connection.request("POST", PATH, json.dumps(body))
        found = connection.getresponse()
        return found.status, json.load(found)

    sound, before = {"messages": messages(), "max_tokens": 1}, watched(address)
    for name in protocol.FIELDS:
        for value in POOL:
            if (str(value), name) in ACCEPTED:
                protocol.read(json.dumps({**sound, name: value}).encode())
                continue
            status, found = ask({**sound, name: value})
            expected = 404 if name == "model" and isinstance(value, str) else 400
            assert status == expected and found["error"]["message"].startswith(name), (name, value, found)
    assert watched(address)["requests_total"] == before["requests_total"]

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
    assert said(address, QUESTION) == model().generate(None, QUESTION, max_new_tokens=6)
    assert watched(address)["running"] == watched(address)["errors_total"] == 0


def test_the_page_has_the_table_of_fields():
    assert protocol.table() in (Path(__file__).parents[2] / "docs" / "serving.md").read_text()


def test_health_metrics_and_the_key(address):
    read = lambda path: urllib.request.urlopen(address + path).read().decode()
    assert read("/health") == "ok"
    values = dict(line.rsplit(" ", 1) for line in read("/metrics").splitlines())
    assert {"deltallava_requests_total", "deltallava_running", "deltallava_tokens_total"} <= set(values)
    with running("--api-key=secret") as closed:
        body = {"messages": messages(), "max_tokens": 2}
        assert post(closed, body)[0] == post(closed, body, "other")[0] == 401
        assert post(closed, body, "secret")[0] == 200


def test_shutting_down_answers_what_was_asked():
    with ThreadPoolExecutor(1) as pool:
        with running() as address:
            asked = pool.submit(post, address, {"messages": messages(2), "max_tokens": 40})
            while "deltallava_running 0" in urllib.request.urlopen(address + "/metrics").read().decode():
                time.sleep(0.01)
                assert not asked.done()
        status, found = asked.result()
    assert status == 200 and found["usage"]["completion_tokens"] == 40

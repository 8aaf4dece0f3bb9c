"""The server, used by the official client and by clients that send bad requests."""

import asyncio
import json
import re
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest

from deltallava_jax.data.conversation import Conversation, Round
from deltallava_jax.inference.sampling import Sampling
from tests.apps.servers import PATH, QUESTION, app_of, messages, post, reply, running, uri
from tests.inference.models import decoder_alone, model, picture


def answer(conversation, images=(), one=None, **settings):
    """The model's answer to a conversation."""
    one, settings = one or model(), Sampling(**{"max_new_tokens": 6, **settings})
    return one.answer(one.prompt(conversation), one.pixels(list(images)), settings).whole()


def test_without_a_seed_each_answer_is_another_and_its_seed_repeats_it(address):
    ask = lambda **more: post(address, {"messages": messages(), "max_tokens": 6, "temperature": 1, **more})[1]
    text = lambda found: found["choices"][0]["message"]["content"]
    answers = [ask() for _ in range(8)]
    assert len(set(map(text, answers))) > 1
    assert text(ask(seed=answers[2]["seed"])) == text(answers[2])
    assert len({text(ask(temperature=0)) for _ in range(2)}) == 1


def test_the_first_limit_that_is_given_holds_and_without_one_the_space_left(address):
    tokens = lambda **limits: post(address, {"messages": messages(), **limits})[1]["usage"]["completion_tokens"]
    assert tokens(max_completion_tokens=None, max_tokens=3) == 3
    assert tokens(max_completion_tokens=2, max_tokens=3) == 2
    expected = model().stream(None, QUESTION, max_new_tokens=96 - 16)
    expected.whole()
    assert tokens(max_completion_tokens=None) == expected.tokens > 30


def test_requests_of_common_clients_are_understood(address):
    expected = model().generate(None, QUESTION, max_new_tokens=6)
    for more in ({"model": None}, {"model": ""}, {"seed": -1}, {"top_k": -1}, {"temperature": None, "stop": None}):
        assert reply(address, QUESTION, **more) == expected
    lines = "\r\n".join(re.findall(".{1,76}", uri().partition(",")[2]))
    broken = {"role": "user", "content": [{"type": "image_url", "image_url": f"data:image/png;base64,{lines}"}]}
    broken["content"].append({"type": "text", "text": QUESTION})
    assert reply(address, broken) == model().generate(picture(), QUESTION, max_new_tokens=6)
    user, assistant = ({"role": role, "content": "red?"} for role in ("user", "assistant"))
    system = {"role": "developer", "content": [{"type": "text", "text": "is"}, {"type": "text", "text": "it"}]}
    whole = {"role": "assistant", "content": "no", "refusal": None, "tool_calls": None, "annotations": []}
    found = reply(address, system, user, user, assistant, whole, user)
    rounds = (Round(("red?\nred?",), "red?\nno"), Round(("red?",), None))
    assert found == answer(Conversation(rounds, system="is\nit"))


def test_text_is_text_and_an_image_has_one_place(address):
    """``<image>`` in a history once made a place without an image: NaN in the cache and an empty answer."""
    first = messages(0, "<image>")[0]
    rounds = (Round(("", "\n<image>"), "a <image>?"), Round(("</s> red?",), None))
    found = reply(address, first, "a <image>?", "</s> red?")
    assert found == answer(Conversation(rounds), [picture()])
    assert reply(address, "<image>") == answer(Conversation((Round(("<image>",), None),)))


def test_a_decoder_alone_continues_a_text_and_needs_a_template_for_more():
    bare = decoder_alone()
    turns = [{"role": role, "content": "red?"} for role in ("user", "assistant", "user")]
    with running(one=bare) as address:
        assert reply(address, "red?") == bare.generate(None, "red?", max_new_tokens=6)
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
        assert reply(address, *turns) == answer(Conversation((Round(("red?",), "red?"), Round(("red?",), None))))


def test_web_pages_may_send_requests_by_an_option(address):
    def preflight(address):
        headers = {"origin": "http://page.example", "access-control-request-method": "POST"}
        asked = urllib.request.Request(address + PATH, headers=headers, method="OPTIONS")
        with urllib.request.urlopen(asked) as found:
            return found.headers["access-control-allow-origin"]

    with pytest.raises(urllib.error.HTTPError, match="405"):
        preflight(address)
    with running("--cors", "http://page.example", "http://other.example") as open_to_pages:
        assert preflight(open_to_pages) == "http://page.example"


def test_a_stream_without_a_reader_frees_its_slot():
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
    """More than there are slots; images, budgets and settings mixed; some disconnect before their answer."""
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


def test_health_metrics_and_the_key(address):
    read = lambda path: urllib.request.urlopen(address + path).read().decode()
    assert read("/health") == "ok"
    values = dict(line.rsplit(" ", 1) for line in read("/metrics").splitlines())
    assert {"deltallava_requests_total", "deltallava_running", "deltallava_tokens_total"} <= set(values)
    with running("--api-key=secret") as closed:
        body = {"messages": messages(), "max_tokens": 2}
        assert post(closed, body)[0] == post(closed, body, "other")[0] == 401
        assert post(closed, body, "secret")[0] == 200


def test_shutting_down_answers_pending_requests():
    with ThreadPoolExecutor(1) as pool:
        with running() as address:
            asked = pool.submit(post, address, {"messages": messages(2), "max_tokens": 40})
            while "deltallava_running 0" in urllib.request.urlopen(address + "/metrics").read().decode():
                time.sleep(0.01)
                assert not asked.done()
        status, found = asked.result()
    assert status == 200 and found["usage"]["completion_tokens"] == 40

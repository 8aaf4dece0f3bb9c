"""The server, asked by the official client and by clients that send what they should not."""

import argparse
import base64
import json
import re
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from io import BytesIO

import pytest
from models import model, picture
from PIL import Image

uvicorn = pytest.importorskip("uvicorn")
pytest.importorskip("starlette")

from deltallava_jax.apps import serve  # noqa: E402

QUESTION = "what color is the shape?"


@contextmanager
def running(*arguments):
    """The server in a thread; its address."""
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    options = parser.parse_args(["tiny", "--slots=3", "--context=96", *arguments])
    server = uvicorn.Server(uvicorn.Config(serve.make_app(model(), options), port=0, log_level="warning"))
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


def post(address, body, key=None, path="/v1/chat/completions"):
    """(status, what the server says)."""
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})
    try:
        with urllib.request.urlopen(urllib.request.Request(address + path, body, headers), timeout=120) as found:
            return found.status, json.load(found)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_the_official_client(address):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none")
    assert [one.id for one in client.models.list()] == ["tiny"]
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
        (b"[1]", 400, "no JSON object"),
        (b"{" + b" " * 300_000, 413, "more than 200,000 bytes"),
        ({"messages": []}, 400, "messages: expected a list"),
        ({"messages": [7]}, 400, r"messages.0. has role None"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, 400, "role 'assistant'"),
        ({"messages": messages() + [{"role": "assistant", "content": "a"}]}, 400, "not from the user"),
        ({"messages": [{"role": "user", "content": {}}]}, 400, "expected a text or a list"),
        ({"messages": messages(text="<image>")}, 400, "1 <image> markers, but 0 images"),
        ({"messages": messages(), "model": "gpt"}, 404, "'gpt' is not served"),
        ({"messages": messages(), "max_tokens": 1000}, 400, "do not fit into a slot of 96"),
        ({"messages": messages(), "max_tokens": "9"}, 400, "max_new_tokens='9'"),
        ({"messages": messages(), "temperature": -1}, 400, "temperature=-1"),
        ({"messages": messages(), "stop": 3}, 400, "stop=3"),
        ({"messages": messages(), "budget": "x"}, 400, "budget='x'"),
        ({"messages": messages(), "n": 2}, 400, "one answer"),
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

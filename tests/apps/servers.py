"""A server of the tiny model, and requests to it."""

import argparse
import base64
import json
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from io import BytesIO

import pytest
from PIL import Image

from tests.inference.models import model, picture

uvicorn = pytest.importorskip("uvicorn")
pytest.importorskip("starlette")

from deltallava_jax.apps import serve  # noqa: E402

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


def uri(seed: int = 0, form: str = "PNG") -> str:
    file = BytesIO()
    Image.fromarray(picture(seed)).save(file, form)
    return f"data:image/{form.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def messages(seed=None, text=QUESTION):
    image = [] if seed is None else [{"type": "image_url", "image_url": {"url": uri(seed)}}]
    return [{"role": "user", "content": [*image, {"type": "text", "text": text}]}]


def post(address, body, key=None, path=PATH):
    """(status, the response)."""
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})
    try:
        with urllib.request.urlopen(urllib.request.Request(address + path, body, headers), timeout=120) as found:
            return found.status, json.load(found)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def reply(address, *turns, **fields):
    """The answer to alternating texts of user and assistant, or messages."""
    roles = ("user", "assistant") * len(turns)
    conversation = [
        turn if isinstance(turn, dict) else {"role": role, "content": turn}
        for role, turn in zip(roles, turns, strict=False)
    ]
    status, found = post(address, {"messages": conversation, "max_tokens": 6, **fields})
    assert status == 200, found
    return found["choices"][0]["message"]["content"]


def metrics(address) -> dict:
    text = urllib.request.urlopen(f"{address}/metrics").read().decode()
    return {name.removeprefix("deltallava_"): float(value) for name, value in map(str.rsplit, text.splitlines())}

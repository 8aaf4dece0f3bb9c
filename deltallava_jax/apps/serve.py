"""A server with OpenAI's protocol: chat completions with texts and images, streamed or whole, for many at a time.

    python -m deltallava_jax serve runs/easy_vqa --port 8000
    curl localhost:8000/v1/chat/completions -d '{"messages": [{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,'$(base64 -w0 shape.png)'"}},
        {"type": "text", "text": "what color is the shape?"}]}]}'

Needs requirements-serve.txt. Images come as data URIs (image_url). Beside OpenAI's fields a request may hold budget
(visual tokens an image), top_k and repetition_penalty; temperature is 0 by default. /health and /metrics (Prometheus)
watch it; an API key is asked for if --api-key or DELTALLAVA_API_KEY gives one. SIGTERM answers what was asked first."""

from __future__ import annotations

import argparse
import asyncio
import base64
import binascii
import hmac
import itertools
import json
import os
import sys
import time
import uuid
from contextlib import asynccontextmanager
from io import BytesIO
from pathlib import Path

import numpy as np

from deltallava_jax.data.conversation import IMAGE
from deltallava_jax.errors import BadSample, ConfigError
from deltallava_jax.inference.sampling import Sampling


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, metavar="DIR", help="a workdir, or a Hugging Face or LLaVA folder")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--name", help="of the model in the protocol; the folder's by default")
    parser.add_argument("--api-key", default=os.environ.get("DELTALLAVA_API_KEY"), help="asked of every request")
    parser.add_argument("--slots", type=int, default=8, help="requests answered at a time")
    parser.add_argument("--context", type=int, default=1024, help="tokens of a prompt and its answer, images included")
    parser.add_argument("--waiting", type=int, default=256, help="requests that may wait; further ones get 429")
    parser.add_argument("--max-body", type=int, default=2**24, help="bytes of a request")
    parser.add_argument("--max-pixels", type=int, default=2**24, help="of an image")
    parser.add_argument("--max-images", type=int, default=8, help="of a request")
    parser.add_argument("--dtype", help="of weights and computing, e.g. bfloat16; the model's own by default")
    parser.add_argument("--tensor", type=int, default=1, help="devices that share every layer, for a large model")


def main(options: argparse.Namespace) -> None:
    try:
        import uvicorn
    except ImportError as error:
        raise ConfigError(f"{error}; serving needs: pip install -r requirements-serve.txt") from error
    from deltallava_jax import load

    print(f"loading {options.model}", file=sys.stderr)
    model = load(options.model, dtype=options.dtype, tensor=options.tensor)
    app = make_app(model, options)
    uvicorn.run(app, host=options.host, port=options.port, timeout_graceful_shutdown=60, log_level="info")


def make_app(model, options: argparse.Namespace):
    """The ASGI application; its scheduler lives as long as it does."""
    from starlette.applications import Starlette
    from starlette.responses import JSONResponse, PlainTextResponse, StreamingResponse
    from starlette.routing import Route

    from deltallava_jax.errors import Busy
    from deltallava_jax.inference.scheduler import Request, Scheduler
    from deltallava_jax.models import projectors

    name, created = options.name or options.model.resolve().name, int(time.time())
    scheduler = Scheduler(model, rows=options.slots, context=options.context, waiting=options.waiting)
    decoding = asyncio.Semaphore(2)  # images in memory at a time
    refused: dict[int, int] = {}

    def guarded(handler):
        async def handle(request):
            try:
                if options.api_key is not None:
                    given = request.headers.get("authorization", "").removeprefix("Bearer ")
                    if not hmac.compare_digest(given.encode(), options.api_key.encode()):
                        raise RequestRefused(401, "wrong or missing API key")
                return await handler(request)
            except RequestRefused as error:
                refused[error.status] = refused.get(error.status, 0) + 1
                return failure(error.status, str(error))

        return handle

    def failure(status: int, message: str):
        kind = "server_error" if status >= 500 else "invalid_request_error"
        return JSONResponse({"error": {"message": message, "type": kind, "code": status}}, status)

    async def completions(http):
        fields = parsed(await body_of(http, options.max_body))
        if fields.get("model", name) != name:
            raise RequestRefused(404, f"model {fields['model']!r} is not served here; {name!r} is")
        loop, pieces = asyncio.get_running_loop(), asyncio.Queue()
        on_piece = lambda text, end: loop.call_soon_threadsafe(pieces.put_nowait, (text, end))
        try:
            async with decoding:
                asked, pixels = await asyncio.to_thread(prompt_of, model, fields, options)
            request = Request(asked, pixels, integer(fields, "budget"), sampling_of(fields), on_piece)
            scheduler.submit(request)
        except (ConfigError, BadSample) as error:
            raise RequestRefused(400, str(error)) from error
        except Busy as error:
            raise RequestRefused(429, str(error)) from error
        about = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": name}
        read = len(asked.ids)
        if len(pixels):
            read += len(pixels) * (projectors.check_budget(model.cfg.projector, request.budget) - 1)
        usage = lambda: {
            "prompt_tokens": read,
            "completion_tokens": request.tokens,
            "total_tokens": read + request.tokens,
        }
        if fields.get("stream"):
            asks_usage = (fields.get("stream_options") or {}).get("include_usage")
            events = streamed(request, pieces, about, usage if asks_usage else None)
            return StreamingResponse(events, media_type="text/event-stream")
        text = ""
        while True:
            try:
                piece, end = await asyncio.wait_for(pieces.get(), 1.0)
            except TimeoutError:
                if await http.is_disconnected():
                    request.cancelled = True
                    return failure(499, "the client went away")
                continue
            if end == "error":
                return failure(500, piece)
            text += piece
            if end:
                break
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": end}
        return JSONResponse({**about, "object": "chat.completion", "choices": [choice], "usage": usage()})

    async def models(_):
        one = {"id": name, "object": "model", "created": created, "owned_by": "deltallava_jax"}
        return JSONResponse({"object": "list", "data": [one]})

    async def health(_):
        return PlainTextResponse("ok" if scheduler.alive else "dead", 200 if scheduler.alive else 503)

    async def metrics(_):
        values = {f"{key}_total": value for key, value in scheduler.counts.items()}
        values |= {"running": scheduler.running, "waiting": scheduler.waiting}
        values |= {f'refused_total{{status="{status}"}}': count for status, count in sorted(refused.items())}
        return PlainTextResponse("".join(f"deltallava_{key} {value}\n" for key, value in values.items()))

    @asynccontextmanager
    async def lifespan(_):
        yield
        await asyncio.to_thread(scheduler.close)

    routes = [
        Route("/v1/chat/completions", guarded(completions), methods=["POST"]),
        Route("/v1/models", guarded(models)),
        Route("/health", health),
        Route("/metrics", metrics),
    ]
    return Starlette(routes=routes, lifespan=lifespan)


async def streamed(request, pieces: asyncio.Queue, about: dict, usage):
    """Server-sent events of an answer; one that nobody reads any more is cancelled."""
    event = lambda choices, **more: (
        f"data: {json.dumps({**about, 'object': 'chat.completion.chunk', 'choices': choices, **more})}\n\n"
    )  # noqa: E501
    choice = lambda delta, end=None: [{"index": 0, "delta": delta, "finish_reason": end}]
    try:
        yield event(choice({"role": "assistant", "content": ""}))
        end = None
        while end is None:
            piece, end = await pieces.get()
            if end == "error":
                yield f"data: {json.dumps({'error': {'message': piece, 'type': 'server_error', 'code': 500}})}\n\n"
                return
            if piece:
                yield event(choice({"content": piece}))
        yield event(choice({}, end))
        if usage:
            yield event([], usage=usage())
        yield "data: [DONE]\n\n"
    finally:
        request.cancelled = True


# ------------------------------------------------------------------ what a request asks


async def body_of(http, limit: int) -> bytes:
    body = bytearray()
    async for part in http.stream():
        body += part
        if len(body) > limit:
            raise RequestRefused(413, f"a body of more than {limit:,} bytes")
    return bytes(body)


def parsed(body: bytes) -> dict:
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestRefused(400, f"the body is no JSON: {error}") from error
    if not isinstance(fields, dict):
        raise RequestRefused(400, "the body is no JSON object")
    if fields.get("n") not in (None, 1):
        raise RequestRefused(400, "n: one answer a request is given")
    return fields


def integer(fields: dict, name: str) -> int | None:
    value = fields.get(name)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise ConfigError(f"{name}={value!r}; expected a whole number")
    return value


def sampling_of(fields: dict) -> Sampling:
    """Raises ConfigError for a value out of range."""
    given = {name: fields[name] for name in ("temperature", "top_k", "top_p", "repetition_penalty", "seed", "stop")
             if fields.get(name) is not None}  # fmt: skip
    limit = fields.get("max_completion_tokens", fields.get("max_tokens"))
    if limit is not None:
        given["max_new_tokens"] = limit
    if "stop" in given and not isinstance(given["stop"], (str, list)):
        raise ConfigError(f"stop={given['stop']!r}; expected a text or a list of texts")
    return Sampling(**given)


def prompt_of(model, fields: dict, options: argparse.Namespace):
    """(the tokenized conversation, its images' pixels). Raises ConfigError or BadSample."""
    messages = fields.get("messages")
    if not isinstance(messages, list) or not messages:
        raise ConfigError("messages: expected a list that is not empty")
    system, turns, images = [], [], []
    for number, message in enumerate(messages):
        role = message.get("role") if isinstance(message, dict) else None
        if role in ("system", "developer") and not turns:
            system.append(content(message, number, None))
        elif role == ("user", "assistant")[len(turns) % 2]:
            turns.append(content(message, number, images if role == "user" else None))
        else:
            raise ConfigError(f"messages[{number}] has role {role!r}; expected user and assistant in turns")
    if len(turns) % 2 == 0:
        raise ConfigError("messages: the last one is not from the user")
    if len(images) > options.max_images:
        raise ConfigError(f"{len(images)} images; at most {options.max_images} are read")
    pairs = list(itertools.zip_longest(turns[::2], turns[1::2]))
    asked = model.ask(pairs, images, system="\n".join(system))
    for image in images:
        check_pixels(image, options.max_pixels)
    return asked, model.pixels(images) if images else np.zeros((0, 0, 0, 3), np.uint8)


def content(message: dict, number: int, images: list | None) -> str:
    """The text of a message; its images, where they may be, go to ``images`` and before the text."""
    value = message.get("content")
    parts = [{"type": "text", "text": value}] if isinstance(value, str) else value
    if not isinstance(parts, list):
        raise ConfigError(f"messages[{number}].content: expected a text or a list of parts")
    texts, markers = [], ""
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind == "image_url" and images is not None:
            images.append(data_of(part.get("image_url"), number))
            markers += f"{IMAGE}\n"
        else:
            raise ConfigError(f"messages[{number}].content: a part of type {kind!r} is not read here")
    return markers + "\n".join(texts)


def data_of(value, number: int) -> bytes:
    url = value.get("url") if isinstance(value, dict) else value
    head, comma, data = url.partition(",") if isinstance(url, str) else ("", "", "")
    if not comma or not head.startswith("data:image/") or not head.endswith(";base64"):
        raise ConfigError(f"messages[{number}]: image_url: expected a data URI, data:image/png;base64,...")
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ConfigError(f"messages[{number}]: image_url: {error}") from error


def check_pixels(data: bytes, limit: int) -> None:
    """By the header alone, before anything is unpacked."""
    import warnings

    from PIL import Image

    from deltallava_jax.data.images import FORMATS

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the size, which is looked at here
            with Image.open(BytesIO(data), formats=FORMATS) as image:
                width, height = image.size
    except Exception as error:
        raise BadSample(f"an image of {len(data):,} bytes cannot be read; expected {', '.join(FORMATS)}") from error
    if width * height > limit:
        raise BadSample(f"an image of {width} x {height} pixels; at most {limit:,} are read")

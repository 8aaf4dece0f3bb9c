"""An OpenAI-compatible server: chat completions with texts and images, streamed or whole, for many clients at a time.

    python -m deltallava_jax serve runs/easy_vqa --port 8000
    curl localhost:8000/v1/chat/completions -d '{"messages": [{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,'$(base64 -w0 shape.png)'"}},
        {"type": "text", "text": "what color is the shape?"}]}]}'

Needs requirements-serve.txt. Images are data URIs (image_url). Besides OpenAI's fields a request may have budget
(visual tokens per image), top_k and repetition_penalty; temperature is 0 by default; unsupported fields are refused
(docs/serving.md lists all). /health and /metrics (Prometheus) are for monitoring; an API key is required if --api-key
or DELTALLAVA_API_KEY gives one. On SIGTERM it answers pending requests before it exits."""

from __future__ import annotations

import argparse
import asyncio
import hmac
import itertools
import json
import os
import reprlib
import time
import uuid
from contextlib import asynccontextmanager
from io import BytesIO

from deltallava_jax.apps import options as shared
from deltallava_jax.apps import protocol
from deltallava_jax.data.conversation import Conversation, Round
from deltallava_jax.errors import BadSample, ConfigError, RequestRefused, UserError
from deltallava_jax.inference.sampling import Sampling


def add_arguments(parser: argparse.ArgumentParser) -> None:
    shared.add_model(parser)
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 admits other machines")
    parser.add_argument("--port", type=shared.port, default=8000)
    parser.add_argument("--name", help="of the model in the protocol; the folder's by default")
    parser.add_argument("--api-key", default=os.environ.get("DELTALLAVA_API_KEY"), help="required of every request")
    parser.add_argument("--cors", nargs="+", default=[], metavar="ORIGIN", help="web pages to admit; * for all")
    parser.add_argument("--slots", type=int, default=8, help="requests answered at a time")
    parser.add_argument("--context", type=int, default=1024, help="tokens of a prompt and its answer, images included")
    parser.add_argument("--waiting", type=int, default=256, help="requests that may wait; further ones get 429")
    parser.add_argument("--max-body", type=int, default=2**24, help="bytes of a request")
    parser.add_argument("--max-pixels", type=int, default=2**24, help="of an image")
    parser.add_argument("--max-images", type=int, default=8, help="of a request")


def main(options: argparse.Namespace) -> None:
    try:
        import uvicorn
    except ImportError as error:
        raise ConfigError(f"{error}; serving needs: pip install -r requirements-serve.txt") from error
    app = make_app(shared.load_model(options), options)
    uvicorn.run(app, host=options.host, port=options.port, timeout_graceful_shutdown=60, log_level="info")


def make_app(model, options: argparse.Namespace):
    """The ASGI application; its scheduler runs until the application shuts down."""
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.middleware.cors import CORSMiddleware
    from starlette.responses import JSONResponse, PlainTextResponse, StreamingResponse
    from starlette.routing import Route

    from deltallava_jax.inference.scheduler import Request, Scheduler

    name = options.name or options.model.resolve().name
    created = int(time.time())
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
            except UserError as error:
                status = error.status if isinstance(error, RequestRefused) else 400
                refused[status] = refused.get(status, 0) + 1
                return failure(status, str(error))

        return handle

    def failure(status: int, message: str):
        kind = "server_error" if status >= 500 else "invalid_request_error"
        return JSONResponse({"error": {"message": message, "type": kind, "code": status}}, status)

    async def completions(http):
        fields = protocol.parse(await body_of(http, options.max_body))
        describe_model(fields.get("model"))
        loop = asyncio.get_running_loop()
        pieces = asyncio.Queue()

        def on_piece(text: str, end: str | None) -> None:
            loop.call_soon_threadsafe(pieces.put_nowait, (text, end))

        async with decoding:
            prompt, pixels = await asyncio.to_thread(prompt_of, model, fields["messages"], options)
        budget = fields.get("budget")
        capacity = scheduler.answer_capacity(prompt, budget)
        limit = fields.get("max_completion_tokens", fields.get("max_tokens", max(capacity, 1)))
        request = Request(prompt, pixels, budget, sampling_of(fields, limit), on_piece)
        about = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": name}
        about["seed"] = request.sampling.seed
        prompt_tokens = len(prompt.ids) + len(pixels) * (model.engine.budget(budget) - 1)

        def usage() -> dict[str, int]:
            return {
                "prompt_tokens": prompt_tokens,
                "completion_tokens": request.tokens,
                "total_tokens": prompt_tokens + request.tokens,
            }

        if fields.get("stream"):
            include_usage = fields.get("stream_options", {}).get("include_usage")
            answer = Events(request, streamed(pieces, about, usage if include_usage else None))
            scheduler.submit(request)
            return answer
        scheduler.submit(request)
        try:
            text, end = await whole(http, pieces)
        finally:
            request.cancelled = True  # of a client that disconnected; without effect on a finished answer
        if end == "error":
            return failure(500, text)
        if end is None:
            return failure(499, "the client disconnected")
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": end}
        return JSONResponse({**about, "object": "chat.completion", "choices": [choice], "usage": usage()})

    class Events(StreamingResponse):
        """A stream whose request is cancelled however it ends, even before its first event."""

        def __init__(self, request, events):
            super().__init__(events, media_type="text/event-stream")
            self.request = request

        async def __call__(self, *connection) -> None:
            try:
                await super().__call__(*connection)
            finally:
                self.request.cancelled = True

    def describe_model(requested: str | None) -> dict:
        """The protocol's description of the model. Raises RequestRefused where another one is requested."""
        if requested and requested != name:
            raise RequestRefused(404, f"model {reprlib.repr(requested)} is not served here; {name!r} is")
        return {"id": name, "object": "model", "created": created, "owned_by": "deltallava_jax"}

    async def models(http):
        if "name" in http.path_params:
            return JSONResponse(describe_model(http.path_params["name"]))
        return JSONResponse({"object": "list", "data": [describe_model(name)]})

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
        Route("/v1/models/{name:path}", guarded(models)),
        Route("/health", health),
        Route("/metrics", metrics),
    ]
    cors = Middleware(CORSMiddleware, allow_origins=options.cors, allow_methods=["GET", "POST"], allow_headers=["*"])
    return Starlette(routes=routes, lifespan=lifespan, middleware=[cors] if options.cors else [])


async def whole(http, pieces: asyncio.Queue) -> tuple[str, str | None]:
    """(the answer or an error message, its finish reason); the reason is None where the client disconnected."""
    text = ""
    while True:
        try:
            piece, end = await asyncio.wait_for(pieces.get(), 1.0)
        except TimeoutError:
            if await http.is_disconnected():
                return text, None
            continue
        if end == "error":
            return piece, end
        text += piece
        if end:
            return text, end


async def streamed(pieces: asyncio.Queue, about: dict, usage):
    """Server-sent events of an answer."""

    def event(choices: list, **more) -> str:
        return f"data: {json.dumps({**about, 'object': 'chat.completion.chunk', 'choices': choices, **more})}\n\n"

    def choice(delta: dict, end: str | None = None) -> list[dict]:
        return [{"index": 0, "delta": delta, "finish_reason": end}]

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


# ------------------------------------------------------------------ parts of a request


def prompt_of(model, turns: list[protocol.Turn], options: argparse.Namespace):
    """(the tokenized conversation, its images' pixels). Raises UserError."""
    images = [image for turn in turns for image in turn.images]
    if len(images) > options.max_images:
        raise ConfigError(f"messages: {len(images)} images; at most {options.max_images} are accepted")
    prompt = model.prompt(conversation(turns))
    for image in images:
        validate_image_size(image, options.max_pixels)
    return prompt, model.pixels(images)


def conversation(turns: list[protocol.Turn]) -> Conversation:
    """The turns as a conversation, each image on a separate line before the text."""
    system = turns[0].text if turns[0].role == "system" else None
    dialogue = turns[system is not None :]
    rounds = []
    for question, answer in itertools.zip_longest(dialogue[::2], dialogue[1::2]):
        lines = ("",) + ("\n",) * len(question.images)
        rounds.append(Round((*lines[:-1], lines[-1] + question.text), answer and answer.text))
    return Conversation(tuple(rounds), system)


async def body_of(http, limit: int) -> bytes:
    body = bytearray()
    async for part in http.stream():
        body += part
        if len(body) > limit:
            raise RequestRefused(413, f"the body has more than {limit:,} bytes")
    return bytes(body)


def sampling_of(fields: dict, limit: int) -> Sampling:
    names = ("temperature", "top_k", "top_p", "repetition_penalty", "seed", "stop")
    return Sampling(max_new_tokens=limit, **{name: fields[name] for name in names if name in fields})


def validate_image_size(data: bytes, limit: int) -> None:
    """Raises BadSample for an image that is too large or cannot be read, by its header, before it is decoded."""
    import warnings

    from PIL import Image

    from deltallava_jax.data.images import FORMATS

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the size, which is checked here
            with Image.open(BytesIO(data), formats=FORMATS) as image:
                width, height = image.size
    except Exception as error:
        raise BadSample(f"an image of {len(data):,} bytes cannot be read; expected {', '.join(FORMATS)}") from error
    if width * height > limit:
        raise BadSample(f"an image of {width} x {height} pixels; at most {limit:,} are accepted")

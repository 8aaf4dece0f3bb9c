"""The server under load: many clients at a time, some of whom leave early or send what they should not.

    python -m benchmarks.load.serve_load runs/easy_vqa --clients 50 --requests 6

Starts ``python -m deltallava_jax serve`` and asks it with plain HTTP. Of the requests six in ten are sound (texts and
images of easy-VQA's size, all budgets, streamed or whole), one leaves in the middle of its stream, and three are
garbage: no JSON, an oversized image, a decompression bomb, a wrong role. Sound answers are compared with those of
Model.generate. Writes benchmarks/results/serve_load.json; exits 1 if an answer differs, a status is not as it should
be, or the server has died."""

from __future__ import annotations

import argparse
import base64
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zlib
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

from benchmarks.program import RESULTS, ROOT, argument_parser, cores, origin, write_result

QUESTIONS = ("what color is the shape?", "is there a circle?", "what shape is in the image?", "is there a red shape?")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argument_parser(__spec__.name, __doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--requests", type=int, default=6, help="of a client")
    parser.add_argument("--port", type=int, default=8321)
    parser.add_argument("--out", type=Path, default=RESULTS / "serve_load.json")
    return parser.parse_args(arguments)


def drawing(seed: int):
    """A shape on a plain ground, drawn here."""
    from PIL import Image, ImageDraw

    draw = random.Random(seed)
    image = Image.new("RGB", (64, 64), tuple(draw.randrange(200, 256) for _ in range(3)))
    x, y, size = draw.randrange(4, 30), draw.randrange(4, 30), draw.randrange(12, 30)
    shape = draw.choice(("ellipse", "rectangle"))
    getattr(ImageDraw.Draw(image), shape)((x, y, x + size, y + size), fill=draw.choice(("red", "blue", "green")))
    return image


def png(image) -> bytes:
    file = BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def bomb(side: int = 60_000) -> bytes:
    """A small PNG file that says it has 3.6 thousand million pixels."""
    chunk = lambda kind, data: len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")
    header = side.to_bytes(4, "big") * 2 + bytes((8, 2, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(2**20)))
        + chunk(b"IEND", b"")
    )


def messages(text: str, image: bytes | None) -> list[dict]:
    url = image and f"data:image/png;base64,{base64.b64encode(image).decode()}"
    parts = [{"type": "image_url", "image_url": {"url": url}}] if image else []
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def requests_of(client: int, count: int, budgets: tuple[int, ...]):
    """(kind, body, expected status, what Model.generate is asked) for each."""
    draw = random.Random(client)
    for _ in range(count):
        kind = draw.choice(("sound",) * 6 + ("leaves", "json", "bomb", "role"))
        text, seed, budget = draw.choice(QUESTIONS), draw.randrange(8), draw.choice(budgets)
        shown = seed if draw.random() < 0.8 else None
        image = None if shown is None else png(drawing(shown))
        body = {"messages": messages(text, image), "max_tokens": 8, "budget": budget, "stream": draw.random() < 0.5}
        if kind == "sound":
            yield kind, json.dumps(body).encode(), 200, (shown, text, budget)
        elif kind == "leaves":
            yield kind, json.dumps({**body, "stream": True, "max_tokens": 64}).encode(), 200, None
        elif kind == "json":
            yield kind, json.dumps(body).encode()[:-3], 400, None
        elif kind == "bomb":
            yield kind, json.dumps({"messages": messages(text, bomb())}).encode(), 400, None
        else:
            yield kind, json.dumps({"messages": [{"role": "tool", "content": text}]}).encode(), 400, None


def ask(address: str, kind: str, body: bytes) -> tuple[int, str, float]:
    """(status, the answer or message, seconds)."""
    began = time.perf_counter()
    try:
        with urllib.request.urlopen(f"{address}/v1/chat/completions", body, timeout=600) as found:
            if kind == "leaves":
                found.readline()
                return found.status, "", time.perf_counter() - began
            if "event-stream" not in found.headers["content-type"]:
                text = json.load(found)["choices"][0]["message"]["content"]
            else:
                events = [line[6:] for line in found.read().decode().splitlines() if line.startswith("data: {")]
                text = "".join(json.loads(event)["choices"][0]["delta"].get("content") or "" for event in events)
            return found.status, text, time.perf_counter() - began
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)["error"]["message"], time.perf_counter() - began


def memory(process: int) -> float:
    """Megabytes that the process holds now."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def main() -> int:
    options = parse()
    import deltallava_jax
    from deltallava_jax.models import systems

    model = deltallava_jax.load(options.model)
    budgets = systems.budgets(model.cfg.projector)
    address = f"http://127.0.0.1:{options.port}"
    command = [sys.executable, "-m", "deltallava_jax", "serve", str(options.model), f"--port={options.port}"]
    server = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"{address}/health")
                break
            except OSError:
                time.sleep(0.2)
        for budget in budgets:  # compiles
            ask(address, "sound", json.dumps({"messages": messages(QUESTIONS[0], png(drawing(0))), "max_tokens": 2,
                                              "budget": budget}).encode())  # fmt: skip
        before, began = memory(server.pid), time.perf_counter()
        asked = [one for client in range(options.clients) for one in requests_of(client, options.requests, budgets)]
        with ThreadPoolExecutor(options.clients) as pool:
            found = list(pool.map(lambda one: ask(address, one[0], one[1]), asked))
        seconds, after = time.perf_counter() - began, memory(server.pid)
        alive = urllib.request.urlopen(f"{address}/health").read() == b"ok"
        server.send_signal(signal.SIGTERM)
        ended = server.wait(timeout=90)
    finally:
        server.kill()
    expected = {}
    wrong = []
    for (kind, _, status, sound), (got, text, _) in zip(asked, found, strict=True):
        if sound and sound not in expected:
            shown, question, budget = sound
            image = None if shown is None else drawing(shown)
            expected[sound] = model.generate(image, question, budget=budget, max_new_tokens=8)
        if got != status or (sound and text != expected[sound]):
            wrong.append(f"{kind}: {got} {text!r}; expected {status} {expected.get(sound, '')!r}")
    waits = sorted(wait for (kind, *_), (_, _, wait) in zip(asked, found, strict=True) if kind == "sound")
    kinds = [kind for kind, *_ in asked]
    result = {
        **origin(__spec__.name, [options.model.name], f"{cores()}, load {os.getloadavg()[0]:.1f}"),
        "clients": options.clients,
        "requests": {kind: kinds.count(kind) for kind in sorted(set(kinds))},
        "wrong": wrong,
        "alive": alive,
        "exit_status_after_sigterm": ended,
        "seconds": round(seconds, 1),
        "sound_requests_per_second": round(len(waits) / seconds, 1),
        "seconds_to_a_sound_answer": {
            "median": round(statistics.median(waits), 2),
            "95th_percentile": round(waits[int(0.95 * len(waits))], 2),
        },
        "server_megabytes": {"before": round(before), "after": round(after)},
    }
    write_result(options.out, result)
    print(json.dumps(result, indent=2))
    return 0 if alive and not wrong else 1


if __name__ == "__main__":
    sys.exit(main())

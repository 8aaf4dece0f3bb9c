"""OpenAI's chat completions as the server parses them: one table of the fields of a request.

``FIELDS`` has a parser for each field; one that the server does not support accepts only values without effect. null
counts as an absent field. Anything else is refused by name."""

from __future__ import annotations

import base64
import binascii
import json
import reprlib
from collections.abc import Callable
from dataclasses import dataclass

from deltallava_jax.config.checks import nearest
from deltallava_jax.errors import ConfigError, RequestRefused
from deltallava_jax.inference.sampling import Sampling


@dataclass(frozen=True)
class Field:
    """parse(name, value): the parsed value; raises RequestRefused. about: its documentation."""

    parse: Callable[[str, object], object]
    about: str


@dataclass(frozen=True)
class Turn:
    """Consecutive messages of one role. images: files, before the text."""

    role: str
    text: str
    images: tuple[bytes, ...] = ()


def parse(body: bytes) -> dict:
    """{name: value} of the fields that a request gives, ``messages`` as turns. Raises RequestRefused."""
    try:
        given = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestRefused(400, f"the body is not JSON: {error}") from error
    fields = members("the body", given, FIELDS)
    if "messages" not in fields:
        raise RequestRefused(400, "messages: expected a list that is not empty")
    return fields


def members(name: str, given: object, table: dict[str, Field], prefix: str = "") -> dict:
    """The members of an object, each parsed by its entry in a table."""
    if not isinstance(given, dict):
        raise refused(name, given, "an object (JSON)")
    given = {key: value for key, value in given.items() if value is not None}
    for key in given:
        if key not in table:
            raise RequestRefused(400, f"{prefix}{reprlib.repr(key)} is not known here{nearest(key, table)}")
    return {key: table[key].parse(prefix + key, value) for key, value in given.items()}


def refused(name: str, value: object, expected: str) -> RequestRefused:
    return RequestRefused(400, f"{name}={reprlib.repr(value)}; expected {expected}")


# ------------------------------------------------------------------ parsers


def kind(one: type, expected: str) -> Callable[[str, object], object]:
    def parse_value(name: str, value: object):
        if not isinstance(value, one) or isinstance(value, bool) != (one is bool):
            raise refused(name, value, expected)
        return value

    return parse_value


def only(*neutral, why: str = "is not offered here") -> Field:
    """A field that the server does not support, with its values without effect besides null."""
    values = ", ".join(json.dumps(value) for value in (*neutral, None))

    def parse_value(name: str, value: object) -> object:
        if not any(isinstance(value, bool) == isinstance(one, bool) and value == one for one in neutral):
            raise RequestRefused(400, f"{name}={reprlib.repr(value)} {why}; accepted: {values}")
        return value

    return Field(parse_value, f"only {values}")


def setting(field: str, unset: int | None = None, instead: object = None) -> Callable[[str, object], object]:
    """A field of ``Sampling``, with its bounds; ``unset`` is replaced by ``instead``."""

    def parse_value(name: str, value: object) -> object:
        if unset is not None and not isinstance(value, bool) and value == unset:
            return instead
        try:
            return getattr(Sampling(**{field: value}), field)
        except ConfigError as error:
            raise RequestRefused(400, f"{name}{str(error).removeprefix(field)}") from error

    return parse_value


def stream_options(name: str, value: object) -> dict:
    return members(name, value, STREAM_OPTIONS, f"{name}.")


def turns(name: str, value: object) -> list[Turn]:
    """Messages as turns: the system's first where there is one, then the user's and the assistant's, the user's last.
    Messages of one role in a row are one turn."""
    if not isinstance(value, list) or not value:
        raise refused(name, value, "a list that is not empty")
    found: list[Turn] = []
    for number, message in enumerate(value):
        path = f"{name}[{number}]"
        given = members(path, message, MESSAGE, f"{path}.")
        role = "system" if given.get("role") == "developer" else given.get("role")
        if role not in ("system", "user", "assistant"):
            raise refused(f"{path}.role", given.get("role"), "system, developer, user or assistant")
        text, images = content(f"{path}.content", given.get("content"), may_have_images=role == "user")
        before = found[-1] if found else None
        if before and before.role == role:
            found[-1] = Turn(role, f"{before.text}\n{text}", before.images + images)
        elif role == "system" and before or role == "assistant" and (not before or before.role == "system"):
            raise refused(f"{path}.role", role, "system first, then user and assistant in turns")
        else:
            found.append(Turn(role, text, images))
    if found[-1].role != "user":
        raise RequestRefused(400, f"{name}: the last one is from the {found[-1].role}; expected the user's question")
    return found


def content(name: str, value: object, may_have_images: bool) -> tuple[str, tuple[bytes, ...]]:
    """(the text, the images) of a message."""
    if isinstance(value, str):
        return value, ()
    if not isinstance(value, list):
        raise refused(name, value, "a text or a list of parts")
    texts, images = [], []
    for number, part in enumerate(value):
        path = f"{name}[{number}]"
        given = members(path, part, PART, f"{path}.")
        expected = "text or image_url" if may_have_images else "text"
        if given.get("type") == "text" and "text" in given and "image_url" not in given:
            texts.append(given["text"])
        elif given.get("type") == "image_url" and "image_url" in given and "text" not in given and may_have_images:
            images.append(given["image_url"])
        else:
            raise refused(f"{path}.type", given.get("type"), f"{expected}, with a field of that name")
    return "\n".join(texts), tuple(images)


def image_url(name: str, value: object) -> bytes:
    """The file in a data URI; its base64 may have line breaks."""
    url = members(name, value, IMAGE_URL, f"{name}.").get("url") if isinstance(value, dict) else value
    head, comma, data = url.partition(",") if isinstance(url, str) else ("", "", "")
    if not comma or not head.startswith("data:image/") or not head.endswith(";base64"):
        raise refused(name, url, "a data URI, data:image/png;base64,...; the server fetches nothing")
    try:
        return base64.b64decode("".join(data.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestRefused(400, f"{name}: not base64: {error}") from error


# ------------------------------------------------------------------ the tables

text = kind(str, "a text")
flag = kind(bool, "true or false")
number = kind(int, "a whole number")

FIELDS = {
    "messages": Field(
        turns,
        "system (or developer) texts, then user and assistant in turns, the user's last; several of one role in "
        "a row are joined; a user's parts may be images",
    ),
    "model": Field(text, "the served name, null or an empty text"),
    "max_completion_tokens": Field(setting("max_new_tokens"), "maximum number of tokens of the answer"),
    "max_tokens": Field(
        setting("max_new_tokens"), "older name of the same; without either, the space left in the slot"
    ),
    "temperature": Field(setting("temperature"), "0, greedy, by default"),
    "top_p": Field(setting("top_p"), "1, all tokens, by default"),
    "top_k": Field(setting("top_k", -1, 0), "0 or -1, all tokens, by default"),
    "repetition_penalty": Field(setting("repetition_penalty"), "1, none, by default"),
    "seed": Field(
        setting("seed", -1),
        "a whole number below 2^32; without one, or with -1, a random one, returned as the answer's `seed`",
    ),
    "stop": Field(setting("stop"), "a text or a list of texts that end the answer and are not part of it"),
    "budget": Field(number, "visual tokens per image, the projector's most by default"),
    "stream": Field(flag, "true: server-sent events"),
    "stream_options": Field(stream_options, "`include_usage`: true or false"),
    "n": only(1),
    "best_of": only(1),
    "response_format": only({"type": "text"}),
    "tools": only([]),
    "tool_choice": only("none", "auto"),
    "functions": only([]),
    "function_call": only("none", "auto"),
    "logprobs": only(False),
    "top_logprobs": only(0),
    "prompt_logprobs": only(),
    "logit_bias": only({}),
    "frequency_penalty": only(0),
    "presence_penalty": only(0),
    "length_penalty": only(1),
    "min_p": only(0),
    "min_tokens": only(0),
    "stop_token_ids": only([]),
    "bad_words": only([]),
    "allowed_token_ids": only(),
    "ignore_eos": only(False),
    "include_stop_str_in_output": only(False),
    "skip_special_tokens": only(True),
    "spaces_between_special_tokens": only(True),
    "add_generation_prompt": only(True),
    "continue_final_message": only(False),
    "add_special_tokens": only(False),
    "echo": only(False),
    "use_beam_search": only(False),
    "chat_template": only(),
    "chat_template_kwargs": only({}),
    "mm_processor_kwargs": only({}),
    "structured_outputs": only(),
    "guided_json": only(),
    "guided_regex": only(),
    "guided_choice": only(),
    "guided_grammar": only(),
    "truncate_prompt_tokens": only(),
    "documents": only(),
    "modalities": only(["text"]),
    "audio": only(),
    "prediction": only(),
    "web_search_options": only(),
    "reasoning_effort": only("none"),
    "verbosity": only("medium"),
    "service_tier": only("auto", "default"),
    "store": only(False),
    "priority": only(0),
    "parallel_tool_calls": Field(flag, "true or false: there are no tools"),
    "metadata": Field(kind(dict, "an object (JSON)"), "an object, ignored"),
    **{
        name: Field(text, "a text, ignored")
        for name in ("user", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "request_id")
    },
}
STREAM_OPTIONS = {
    "include_usage": Field(flag, ""),
    "continuous_usage_stats": only(False),
    "include_obfuscation": only(False),
}
MESSAGE = {
    "role": Field(text, ""),
    "content": Field(lambda name, value: value, ""),
    "tool_calls": only([]),
    "annotations": only([]),
    **{name: only() for name in ("name", "refusal", "audio", "function_call", "tool_call_id", "reasoning_content")},
}
PART = {"type": Field(text, ""), "text": Field(text, ""), "image_url": Field(image_url, "")}
IMAGE_URL = {
    "url": Field(text, ""),
    "detail": only("auto", why="is not offered here, see budget"),
}


def format_fields() -> str:
    """``FIELDS`` as a Markdown table; fields with the same documentation share a line."""
    lines: dict[str, list[str]] = {}
    for name, field in FIELDS.items():
        lines.setdefault(field.about, []).append(f"`{name}`")
    return "\n".join(
        [
            "| Field | Accepted values |",
            "|---|---|",
            *(f"| {', '.join(names)} | {about} |" for about, names in lines.items()),
        ]
    )

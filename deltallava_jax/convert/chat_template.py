"""Chat templates in Jinja, as in Hugging Face folders: writes ours, recognises those of checkpoints.

A foreign template is recognised by the text that it renders of a small conversation, not by its source."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path

from deltallava_jax.data.conversation import IMAGE, TEMPLATES, Template
from deltallava_jax.errors import ConversionError

FILE = "chat_template.jinja"
FALLBACK = "vicuna_v1"
QUESTION = "What is in the picture?"

# A message's content is a text, or a list of parts, of which the images go before the texts, each on a separate line.
# No characters between the blocks of the source: they would be rendered.
HELPERS = (
    "{% macro words(content) %}{% if content is string %}{{ content }}{% else %}"
    "{% for part in content if part['type'] == 'text' %}{{ '' if loop.first else '\\n' }}{{ part['text'] }}{% endfor %}"
    "{% endif %}{% endmacro %}"
    "{% macro images(content, behind) %}{% if content is string %}"
    "{{ IMAGE * content.count(IMAGE) if behind == '' else '' }}"
    "{% else %}{% for part in content if part['type'] in ('image', 'image_url') %}{{ IMAGE }}{{ behind }}{% endfor %}"
    "{% endif %}{% endmacro %}"
    "{% set ns = namespace(system='', front='') %}"
    "{% for message in messages if message['role'] == 'system' %}"
    "{% set ns.system = ns.system ~ ('\\n' if ns.system else '') ~ words(message['content']) %}{% endfor %}"
)


def to_jinja(template: Template) -> str:
    """The template in Jinja, for messages of the roles system, user and assistant; BOS first if there is one."""
    quoted = json.dumps
    before, _, behind = template.user.partition("{}")
    opening, _, closing = template.system_format.partition("{}")
    question = "{{ ns.front }}{{ images(message['content'], '\\n') }}{{ words(message['content']) }}"
    if template.caption:
        question = "{{ images(message['content'], '') }}"
    if template.system_format:
        system = f"{{{{ {quoted(opening)} ~ (ns.system or {quoted(template.system_text)}) ~ {quoted(closing)} }}}}"
    else:
        system = "{% set ns.front = ns.system ~ '\\n' if ns.system else '' %}"
    text = lambda value: f"{{{{ {quoted(value)} }}}}" if value else ""
    return (
        HELPERS.replace("IMAGE", quoted(IMAGE))
        + "{{ bos_token or '' }}"
        + system
        + "{% for message in messages if message['role'] != 'system' %}"
        + "{% if message['role'] == 'user' %}"
        + text(before) + question + text(behind) + "{% set ns.front = '' %}"
        + "{% elif message['role'] == 'assistant' %}"
        + text(template.assistant + template.lead) + "{{ words(message['content']) }}"
        + text(template.end + template.after)
        + "{% else %}{{ raise_exception('roles are system, user and assistant') }}{% endif %}{% endfor %}"
        + "{% if add_generation_prompt %}" + text(template.assistant) + "{% endif %}"
    )  # fmt: skip


def read_jinja(folder: Path) -> str | None:
    """The Jinja of a folder's chat template, whichever file holds it. Raises ConversionError for a broken file."""
    if (folder / FILE).is_file():
        return (folder / FILE).read_text()
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            try:
                value = json.loads((folder / name).read_text()).get("chat_template")
            except (ValueError, AttributeError) as error:
                raise ConversionError(f"{folder / name} cannot be read: {error}") from error
            if isinstance(value, list):  # several, by name
                value = next((one.get("template") for one in value if one.get("name") == "default"), None)
            if isinstance(value, str):
                return value
    return None


def recognise(jinja: str) -> str | None:
    """The name of our template that renders a question the same way, apart from the system text; None if none does."""
    for content, question in (
        ([{"type": "image"}, {"type": "text", "text": QUESTION}], f"{IMAGE}\n{QUESTION}"),
        (f"{IMAGE}\n{QUESTION}", f"{IMAGE}\n{QUESTION}"),
        (QUESTION, QUESTION),
    ):
        prompt = _render(jinja, [{"role": "user", "content": content}])
        for name, template in TEMPLATES.items() if prompt else ():
            expected = template.user.replace("{}", IMAGE * question.count(IMAGE) if template.caption else question)
            expected += template.assistant
            if prompt == expected or (template.assistant and prompt.endswith(expected)):
                return name
    return None


def _render(jinja: str, messages: list[dict]) -> str | None:
    """The rendered text, None if the template rejects the messages."""
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str):
        raise jinja2.TemplateError(message)

    # As transformers renders them. Its {% generation %} blocks are not Jinja and do not change the text.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, **_: json.dumps(value, ensure_ascii=False)
    environment.globals |= {"raise_exception": refuse, "strftime_now": lambda form: form}
    jinja = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", jinja)
    try:
        template = environment.from_string(jinja)
        return template.render(messages=messages, add_generation_prompt=True, bos_token="", eos_token="")
    except (jinja2.TemplateError, TypeError, ValueError, AttributeError, KeyError):
        return None


def template_of(folder: Path) -> str:
    """The name of our template that matches a checkpoint's chat template, else ``FALLBACK``: the first LLaVA models
    have no chat template. Warns if the fallback does not fit the checkpoint."""
    jinja = read_jinja(folder)
    tokenizer = folder / "tokenizer.json"
    name = recognise(jinja) if jinja is not None else None
    if name is not None:
        return name
    problem = None
    if jinja is not None:
        problem = "its chat template matches none of the known ones"
    elif tokenizer.is_file() and json.dumps(TEMPLATES[FALLBACK].end) not in tokenizer.read_text():
        problem = f"it has no chat template, and its tokenizer has no {TEMPLATES[FALLBACK].end}"
    if problem:
        known = ", ".join(TEMPLATES)
        warnings.warn(f"{folder} is prompted as {FALLBACK}, but {problem}; known: {known}", stacklevel=2)
    return FALLBACK

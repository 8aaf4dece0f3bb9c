"""Texts: streamed pieces, stop texts, cancelling; and chats, whose carried caches equal a fresh prefill."""

import inspect
import textwrap
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import deltallava_jax
from deltallava_jax.data.conversation import TEMPLATES, end_ids
from deltallava_jax.errors import BadSample, ConfigError
from deltallava_jax.inference.generate import Clock, Engine, bucket, prompt_batch
from deltallava_jax.inference.model import Model
from deltallava_jax.inference.sampling import Sampling
from tests.inference.models import decoder_alone, model, picture, visual

QUESTION = "what color is the shape?"


def test_streamed_is_whole():
    pieces = []
    answer = model().stream(picture(), QUESTION, max_new_tokens=30)
    streamed = list(answer)
    whole = model().generate(picture(), QUESTION, max_new_tokens=30, on_text=pieces.append)
    assert "".join(streamed) == whole == "".join(pieces) == answer.text
    assert len(streamed) > 5 and answer.tokens == 30 and answer.finish == "length"
    assert 0 < answer.seconds_to_first <= answer.seconds


def test_the_seconds_of_an_answer_exclude_its_readers():
    answer, began, slept = model().stream(picture(), QUESTION, max_new_tokens=9), time.perf_counter(), 0
    for _ in answer:
        time.sleep(0.05)
        slept += 0.05
    assert slept > 0.1 and 0 < answer.seconds <= time.perf_counter() - began - (slept - 0.05)


def test_an_image_is_a_file_its_bytes_pixels_or_a_picture(tmp_path):
    file = tmp_path / "a.png"
    Image.fromarray(picture()).save(file)
    forms = (file, str(file), file.read_bytes(), picture(), Image.open(file), [picture()])
    assert len({model().generate(form, QUESTION, max_new_tokens=8) for form in forms}) == 1
    with pytest.raises(BadSample, match="float64 .*expected uint8 .height, width, 3."):
        model().generate(np.zeros((4, 4, 3)), QUESTION)


@pytest.mark.parametrize("documented", [Model.generate, Model.stream, Model.chat])
def test_the_example_of_a_docstring_runs(documented, workdir, tmp_path, monkeypatch):
    code = "\n".join(line for line in inspect.getdoc(documented).splitlines() if line.startswith("    "))
    assert "load(" in code and f".{documented.__name__}(" in code
    for name in ("shape.png", "a.png", "b.png"):
        Image.fromarray(picture()).save(tmp_path / name)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "easy_vqa").symlink_to(workdir)
    monkeypatch.chdir(tmp_path)
    exec(textwrap.dedent(code), {"deltallava_jax": deltallava_jax})


def test_without_a_seed_each_answer_is_another_and_its_seed_repeats_it():
    ask = lambda **more: model().stream(picture(), QUESTION, max_new_tokens=8, temperature=1.0, **more)
    answers = [ask() for _ in range(8)]
    assert len({answer.whole() for answer in answers}) > 1
    assert ask(seed=answers[3].seed).whole() == answers[3].text
    assert len({model().generate(picture(), QUESTION, max_new_tokens=8) for _ in range(2)}) == 1


@pytest.mark.parametrize("seed", [None, 2**32 - 1])
def test_in_a_chat_each_turn_has_its_own_seed(seed):
    chat, seeds = model().chat(max_new_tokens=8, temperature=1.0, seed=seed), []
    for _ in range(2):
        chat.ask(QUESTION)
        seeds.append(chat.last.seed)
    assert seeds == [seed, 0] if seed else len(set(seeds)) == 2


@pytest.mark.parametrize(
    ("arguments", "settings", "error", "words"),
    [
        ((QUESTION, picture()), {}, TypeError, "prompt is of type ndarray; expected a text"),
        ((QUESTION, __file__), {}, ConfigError, "images='what color.*not a file but prompt=.*swapped"),
        ((None, None), {}, TypeError, "prompt is of type NoneType"),
        ((5, QUESTION), {}, TypeError, "images holds a value of type int; expected files"),
        (([picture(), None], QUESTION), {}, TypeError, "images holds a value of type NoneType"),
        (({"url": "a.png"}, QUESTION), {}, TypeError, "images holds a value of type dict"),
        ((None, QUESTION), {"tempratur": 1}, TypeError, "unknown argument 'tempratur'; did you mean 'temperature'"),
        ((None, QUESTION), {"stop": 5}, ConfigError, "stop=5; expected a text"),
        ((None, QUESTION), {"max_new_tokens": "x"}, ConfigError, "max_new_tokens='x'; expected a whole number"),
        ((None, QUESTION), {"budget": "x"}, ConfigError, "budget='x'; expected a whole number"),
        ((None, QUESTION), {"budget": 4.0}, ConfigError, "budget=4.0; expected a whole number"),
        ((None, QUESTION), {"budget": True}, ConfigError, "budget=True; expected a whole number"),
        ((None, QUESTION), {"budget": 5}, ConfigError, "budget: delta makes 16, 4, 1"),
    ],
)
def test_bad_arguments_are_named(arguments, settings, error, words):
    images, prompt = arguments
    with pytest.raises(error, match=words):
        model().stream(images, prompt, **settings)
    with pytest.raises(error, match=words):
        model().chat(**settings).stream(prompt, images)


def test_a_model_describes_itself_in_three_lines():
    lines = repr(model()).splitlines()
    assert len(lines) == 3 and all(len(line) < 120 for line in lines)
    total = sum(leaf.size for leaf in jax.tree.leaves(model().params["decoder"]))
    assert f"decoder {total / 1000:.3g}K" in lines[0] and "delta projector" in lines[0] and "float32" in lines[0]
    assert "16, 4, 1" in lines[1] and f"{model().tokenizer.vocab_size} tokens; template: brief" in lines[2]


def test_compiling_is_timed_separately():
    clock, function = Clock(), jax.jit(lambda x: jnp.sin(x) + 1.25)
    with clock:
        function(jnp.ones(3)).block_until_ready()
    compiling = clock.compiling
    with clock:
        function(jnp.ones(3)).block_until_ready()
    assert clock.compiling == compiling > 0 and clock.seconds > 0
    nested, before = Clock(), time.perf_counter()
    with nested:
        jax.jit(lambda x: jax.jit(lambda y: jnp.cos(y) * 3.5)(x) - 1)(jnp.ones(4))
    assert nested.seconds >= 0 and nested.compiling <= time.perf_counter() - before  # nested spans count once


def test_a_decoder_alone_continues_one_text_and_needs_a_template_for_more():
    bare = decoder_alone()
    templated = decoder_alone("brief")
    ids = lambda text: bare.tokenizer.encode(text)[0]
    pairs = [("red?", "yes"), ("blue?", None)]
    assert bare.ask([("red?", None)]).ids.tolist() == [bare.tokenizer.bos, *ids("red?")]
    with pytest.raises(ConfigError, match="a decoder alone continues one text; for earlier turns .*--template"):
        bare.ask(pairs)
    assert templated.ask(pairs).ids.tolist() == model().ask(pairs).ids.tolist()
    assert (bare.end, templated.end) == (bare.tokenizer.eos,) * 2
    with pytest.raises(ConfigError, match="budget=4: the model has no vision tower"):
        bare.stream(None, "red?", budget=4)
    with pytest.raises(ConfigError, match="no vision tower"):
        templated.stream(picture(), "red?")


def test_another_template(workdir):
    loaded = deltallava_jax.load(workdir, template="vicuna_v1")
    assert loaded.template == "vicuna_v1" and deltallava_jax.load(workdir).template == "brief"
    with pytest.raises(ConfigError, match="template is 'vicuna'; did you mean 'vicuna_v1'"):
        deltallava_jax.load(workdir, template="vicuna")
    with pytest.raises(ConfigError, match="template chatml ends answers with <|im_end|>, which is not a token of this"):
        deltallava_jax.load(workdir, template="chatml")


def test_a_stop_text_ends_the_answer_and_is_no_part_of_it():
    whole = model().generate(picture(), QUESTION, max_new_tokens=30)
    stop = whole[8:11]
    answer = model().stream(picture(), QUESTION, max_new_tokens=30, stop=[stop, "never generated"])
    pieces = list(answer)
    assert "".join(pieces) == whole[: whole.index(stop)] and answer.finish == "stop"


def test_a_cancelled_answer_ends_early():
    answer = model().stream(picture(), QUESTION, max_new_tokens=30)
    for _ in answer:
        answer.cancel()
    assert answer.tokens < 30 and answer.finish == "cancelled"


@pytest.mark.parametrize(
    ("template", "turn"), [("chatml", "length"), ("brief", "stop"), ("brief", "cancelled"), ("brief", "end")]
)
def test_a_carried_cache_equals_a_fresh_prefill(turn, template, monkeypatch):
    """However the previous answer ends; a later turn may bring its own image."""
    one = model(template=template)
    if turn == "end":  # a token of the answer ends it
        ids = one.stream(picture(0), QUESTION, max_new_tokens=5)
        ids.whole()
        monkeypatch.setattr(type(one), "end", ids.decoded[3])
    encoded, encode = [], Engine.encode
    counted = lambda self, x, *a, **k: encoded.append(len(x)) or encode(self, x, *a, **k)
    monkeypatch.setattr(Engine, "encode", counted)
    text = one.generate(picture(0), QUESTION, max_new_tokens=20, budget=4)
    stop = text[5:8] if turn == "stop" else "never"
    encoded.clear()
    chat, conversation, shown = one.chat(budget=4, max_new_tokens=20, stop=stop), [], []
    ending = end_ids(TEMPLATES[template], one.tokenizer)
    images = (picture(0), picture(2) if turn == "length" else None)
    for number, image in enumerate(images):
        answer = chat.stream(QUESTION, image)
        for _ in answer:
            if turn == "cancelled":
                answer.cancel()
        asked = one.ask([(QUESTION, None)], image, continues=number > 0)
        if number:
            conversation += ending
        places = [len(conversation) + place for place in asked.image_positions]
        conversation += asked.ids.tolist()
        shown += [(place, image) for place in places]
        conversation += answer.ids
    monkeypatch.setattr(Engine, "encode", encode)
    assert encoded == [1, turn == "length"]
    conversation = conversation[: len(conversation) - len(answer.ids)]
    batch = prompt_batch([fresh(conversation, [place for place, _ in shown])], bucket(len(conversation)))
    encoded = visual(one.engine, [picture for _, picture in shown], 4)
    (expected,) = one.engine.tokens(batch, *encoded, Sampling(max_new_tokens=len(answer.decoded)), end=one.end)
    assert answer.decoded == expected


def fresh(ids, places):
    from deltallava_jax.data.conversation import Tokenized

    nothing = np.zeros(len(ids), np.int32)
    questions = np.zeros((len(places), 0), np.int32)
    return Tokenized(np.array(ids, np.int32), nothing > 0, np.array(places, np.int32), nothing, questions)


def test_a_chat_starts_over_after_a_reset():
    chat = model().chat(max_new_tokens=8)
    first = chat.ask(QUESTION, picture())
    assert chat.ask(QUESTION) != first
    chat.reset()
    assert chat.ask(QUESTION, picture()) == first


def test_a_chat_under_fastv_takes_its_images_first():
    chat = model(fastv=True).chat(max_new_tokens=8)
    assert chat.ask(QUESTION, picture()) and chat.ask("is it red?")
    with pytest.raises(ConfigError, match="FastV selects .* reset the conversation for a new image"):
        chat.ask(QUESTION, picture(1))

"""How a model is prompted travels with it: chat template, ends of an answer, padding; read from others' folders, and
written so that transformers makes our prompts."""

import dataclasses
import functools
import json
import shutil
import warnings

import jax
import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")

from transformers import AutoModelForImageTextToText, AutoProcessor, LogitsProcessor  # noqa: E402

import deltallava_jax  # noqa: E402
from deltallava_jax.config import Config, DataConfig, to_dict  # noqa: E402
from deltallava_jax.convert.card import write_card  # noqa: E402
from deltallava_jax.convert.export import write_hf, write_llava  # noqa: E402
from deltallava_jax.convert.read import read  # noqa: E402
from deltallava_jax.convert.workdir import open_model, write_workdir  # noqa: E402
from deltallava_jax.data import tokens  # noqa: E402
from deltallava_jax.data.conversation import TEMPLATES, end_id, prompt_conversation, tokenize  # noqa: E402
from deltallava_jax.inference.model import Model  # noqa: E402
from deltallava_jax.training.checkpoints import Checkpoints  # noqa: E402
from deltallava_jax.training.step import TrainState  # noqa: E402
from tests.convert.checkpoints import TEXTS_END  # noqa: E402

QUESTION, LONGER = "What is in the picture?", "The shape is green, is it not? What is in the picture, on a blue square?"


@pytest.fixture(scope="module")
def export(chat_model, tmp_path_factory):
    """export(projector, template, bos, write): the folder of a model that was trained on the template."""
    root = tmp_path_factory.mktemp("exports")

    @functools.cache
    def made(projector, template, bos, write):
        folder = root / f"{projector}_{template}_{bos}_{write.__name__}".replace("<s>", "s")
        folder.mkdir()
        write(dataclasses.replace(chat_model(projector, bos), template=template), folder)
        return folder

    return lambda projector, template, bos="<s>", write=write_hf: made(projector, template, bos, write)


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(5)
    return [Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)) for _ in range(2)]


def turn(role: str, *parts) -> dict:
    """A message of texts and images."""
    content = [{"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part}
               for part in parts]  # fmt: skip
    return {"role": role, "content": content}


def prepared(processor, messages, **options):
    options = dict(add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt") | options
    return processor.apply_chat_template(messages, **options)


# ------------------------------------------------------------------ written


@pytest.mark.parametrize("system", [None, "Answer in one word."])
@pytest.mark.parametrize("bos", ["<s>", None])
@pytest.mark.parametrize("template", TEMPLATES)
def test_a_chat_in_the_exports_processor_has_our_ids(template, bos, system, export, pictures):
    """Two rounds, a picture in each; contents as lists of parts, and texts as they stand."""
    folder = export("delta", template, bos)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    image = processor.tokenizer.convert_tokens_to_ids("<image>")
    rounds = [("<image>\nWhat is it?", "A small red circle."), ("<image>\nAnd this?\nIs it green?", None)]
    mine = tokenize(prompt_conversation(rounds, 2, system), TEMPLATES[template], tokens.load(folder))
    front = [turn("system", system)] if system else []
    messages = [*front, turn("user", pictures[0], "What is it?"), turn("assistant", "A small red circle."),
                turn("user", pictures[1], "And this?", "Is it green?")]  # fmt: skip
    inputs = prepared(processor, messages)
    assert inputs["input_ids"][0].tolist() == [image if id == 0 else id for id in mine.ids.tolist()]
    assert len(inputs["pixel_values"]) == 2
    texts = [{"role": "system", "content": system}] if system else []
    texts += [{"role": "user", "content": rounds[0][0]}, {"role": "assistant", "content": rounds[0][1]},
              {"role": "user", "content": rounds[1][0]}]  # fmt: skip
    text = processor.apply_chat_template(texts, add_generation_prompt=True, tokenize=False)
    assert processor(text=text)["input_ids"] == inputs["input_ids"].tolist()  # BOS is not put before BOS


def test_answers_are_written_as_they_are_trained(export, pictures):
    """To the end of the last answer: the supervised ids of our own rows."""
    for template in TEMPLATES:
        folder = export("delta", template)
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
        messages = [turn("user", pictures[0], "What is it?"), turn("assistant", "A small red circle.")]
        ids = prepared(processor, messages, add_generation_prompt=False)["input_ids"][0].tolist()
        pairs = [("<image>\nWhat is it?", "A small red circle.")]
        mine = tokenize(prompt_conversation(pairs, 1), TEMPLATES[template], tokens.load(folder)).ids.tolist()
        image = processor.tokenizer.convert_tokens_to_ids("<image>")
        assert ids == [image if id == 0 else id for id in mine]


@pytest.mark.parametrize("write", [write_hf, write_llava])
@pytest.mark.parametrize("template", TEMPLATES)
def test_the_template_travels(template, write, export):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read(export("mlp", template, write=write)).template == template


def test_the_template_travels_through_transformers_and_through_a_workdir(export, tmp_path):
    """What transformers saves is read again; a second export with another template has that."""
    folder, again, work = export("mlp", "chatml"), tmp_path / "again", tmp_path / "work"
    AutoProcessor.from_pretrained(folder).save_pretrained(again)
    AutoModelForImageTextToText.from_pretrained(folder).save_pretrained(again)
    model = read(again)
    assert model.template == "chatml"
    work.mkdir()
    write_workdir(model, work, "work")
    assert deltallava_jax.load(work).template == "chatml"
    for write in (write_hf, write_llava):
        other = tmp_path / write.__name__
        other.mkdir()
        write(dataclasses.replace(open_model(work), template="llama_3"), other)
        assert read(other).template == "llama_3"


# ------------------------------------------------------------------ padding and ends


def test_prompts_of_unequal_length_are_answered_as_each_alone(chat_model, export, pictures):
    """Through an MLP export, which is transformers' own LLaVA; the answers are ours."""
    folder = export("mlp", "vicuna_v1")
    processor = AutoProcessor.from_pretrained(folder)
    theirs = AutoModelForImageTextToText.from_pretrained(folder)
    made = chat_model("mlp")
    ours = Model(made.cfg, made.params, tokens.load(folder), "vicuna_v1", made.aspect)
    chats = [[turn("user", picture, question)] for picture, question in zip(pictures, (QUESTION, LONGER), strict=True)]
    inputs = prepared(processor, chats, padding=True)
    assert (inputs["attention_mask"][0] == 0).any()
    out = theirs.generate(**inputs, do_sample=False, max_new_tokens=8)[:, inputs["input_ids"].shape[1] :]
    expected = [ours.generate(picture, question, max_new_tokens=8)
                for picture, question in zip(pictures, (QUESTION, LONGER), strict=True)]  # fmt: skip
    assert [each.strip() for each in processor.batch_decode(out, skip_special_tokens=True)] == expected


@pytest.mark.parametrize("projector", ["mlp", "delta"])
@pytest.mark.parametrize("template", ["chatml", "llama_3", "vicuna_v1"])
def test_the_end_of_the_template_ends_an_answer(template, projector, export):
    """The decoder's generation_config.json names another token, which still ends texts."""
    folder = export(projector, template)
    tokenizer = tokens.load(folder)
    ends = {end_id(TEMPLATES[template], tokenizer), tokenizer.encode(tokenizer.named(TEXTS_END))[0][0]}
    assert len(ends) == 2
    config, generation = (json.loads((folder / name).read_text()) for name in ("config.json", "generation_config.json"))
    assert set(config["text_config"]["eos_token_id"]) == set(generation["eos_token_id"]) == ends
    assert_ends_at(folder, end_id(TEMPLATES[template], tokenizer))


def test_the_end_of_the_template_in_the_original_layout(export):
    folder = export("mlp", "chatml", write=write_llava)
    end = end_id(TEMPLATES["chatml"], tokens.load(folder))
    for name in ("config.json", "generation_config.json"):
        assert end in json.loads((folder / name).read_text())["eos_token_id"]
    assert json.loads((folder / "config.json").read_text())["max_position_embeddings"] == 640


class Forced(LogitsProcessor):
    """Makes a token the only choice after so many others."""

    def __init__(self, token: int, after: int):
        self.token, self.after, self.calls = token, after, 0

    def __call__(self, ids, scores):
        self.calls += 1
        scores[:, self.token] = torch.inf if self.calls > self.after else -torch.inf
        return scores


def assert_ends_at(folder, token: int) -> None:
    """transformers ends an answer at the token: two tokens and it, where eight were asked for."""
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    ids = torch.tensor([[5, 6, 7]])
    out = model.generate(input_ids=ids, do_sample=False, max_new_tokens=8, logits_processor=[Forced(token, 2)])
    assert out[0, -3:].tolist()[-1] == token
    assert out.shape[1] - (3 if type(model).__name__ == "LlavaForConditionalGeneration" else 0) == 3


def test_what_generation_needs_comes_through_both_stages(chat_model, tmp_path):
    """start -> pretrain -> finetune -> export: the source files are those of the first folder."""
    made, folders = chat_model("mlp"), [tmp_path / name for name in ("start", "pretrain", "finetune")]
    folders[0].mkdir()
    write_workdir(made, folders[0], "start")
    for init_from, folder in zip(folders, folders[1:], strict=False):
        folder.mkdir()
        cfg = Config(name="x", init_from=str(init_from), model=made.cfg, data=DataConfig(template="chatml"))
        (folder / "config.json").write_text(json.dumps(to_dict(cfg)))
        tokens.load(folders[0]).save(folder / "tokenizer.json")
        saver = Checkpoints(folder, create=True)
        saver.save(1, TrainState(jax.numpy.int32(1), made.params, {}, {}), {})
        saver.wait()
        saver.close()
    out = tmp_path / "hf"
    out.mkdir()
    write_hf(open_model(folders[2]), out)
    write_card(made, out, "x", folders[2])
    assert '"init_from": "pretrain"' in (out / "README.md").read_text()
    config = json.loads((out / "config.json").read_text())["text_config"]
    generation = json.loads((out / "generation_config.json").read_text())
    assert (config["max_position_embeddings"], config["pad_token_id"], generation["pad_token_id"]) == (640, 0, 0)
    tokenizer = tokens.load(out)
    for end in (TEXTS_END, "<|im_end|>"):
        assert_ends_at(out, tokenizer.encode(tokenizer.named(end))[0][0])


# ------------------------------------------------------------------ recognised

LOOP = "{% for message in messages %}"
# In the manner of published ones: of Qwen2 and Llama 3, for texts; of LLaVA-1.5, for lists of parts, without a system
# text; one with its own mark of the assistant's text; and one of Mistral's, which matches none of ours.
CHATML = (
    LOOP + "{% if loop.first and message.role != 'system' %}<|im_start|>system\nYou are Qwen.<|im_end|>\n{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_3 = (
    LOOP + "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + "
    "message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}"
    "{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
VICUNA = (
    LOOP + "{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ part['text'] + ' ' }}{% endgeneration %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
MISTRAL = LOOP + "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% endfor %}"


@pytest.mark.parametrize("kind", ["hf", "original"])
@pytest.mark.parametrize("file", ["tokenizer_config.json", "chat_template.json", "chat_template.jinja", "named"])
@pytest.mark.parametrize(("jinja", "template"), [(CHATML, "chatml"), (LLAMA_3, "llama_3"), (VICUNA, "vicuna_v1")])
def test_the_chat_template_of_a_checkpoint_is_recognised(jinja, template, file, kind, export, tmp_path):
    """Its wording is its own; the end of an answer is that of the template."""
    folder = foreign(export("mlp", "brief", write=write_hf if kind == "hf" else write_llava), tmp_path, jinja, file)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read(folder).template == template
    if (file, kind) == ("tokenizer_config.json", "hf"):
        model = deltallava_jax.load(folder)
        assert model.template == template and model.end == end_id(TEMPLATES[template], model.tokenizer)


@pytest.mark.parametrize("jinja", [MISTRAL, "{{ raise_exception('no') }}", "{% if %}", "{{ messages.__class__ }}"])
def test_an_unknown_chat_template_is_warned_of(jinja, export, tmp_path):
    folder = foreign(export("mlp", "chatml"), tmp_path, jinja, "chat_template.jinja")
    with pytest.warns(UserWarning, match="prompted as vicuna_v1, but its chat template .*; known: vicuna_v1, plain"):
        assert read(folder).template == "vicuna_v1"


def test_without_a_chat_template_it_is_the_first_llavas(export, saved, tmp_path):
    folder = foreign(export("mlp", "chatml"), tmp_path, None, "chat_template.jinja")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read(folder).template == "vicuna_v1"
    file = folder / "tokenizer.json"
    file.write_text(file.read_text().replace('"</s>"', '"<|end_of_text|>"'))
    with pytest.warns(
        UserWarning, match="prompted as vicuna_v1, but it has no chat template, and its tokenizer has no </s>"
    ):
        read(folder)


def foreign(source, tmp_path, jinja: str | None, file: str):
    """A copy of a folder with another chat template, or none, in the file."""
    folder = tmp_path / "foreign"
    shutil.copytree(source, folder)
    (folder / "chat_template.jinja").unlink()
    if file.endswith(".jinja") and jinja is not None:
        (folder / file).write_text(jinja)
    elif jinja is not None:
        path = folder / file.replace("named", "tokenizer_config.json")
        values = json.loads(path.read_text()) if path.is_file() else {}
        several = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": jinja}]
        path.write_text(json.dumps(values | {"chat_template": several if file == "named" else jinja}))
    return folder

"""Text and pictures through an export's processor and chat template are what they are here, end to end."""

import dataclasses
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")

from tokenizers import Tokenizer  # noqa: E402
from transformers import (  # noqa: E402
    AutoConfig,
    AutoProcessor,
)

import deltallava_jax  # noqa: E402
from deltallava_jax.config import ASPECTS  # noqa: E402
from deltallava_jax.convert.read import Pretrained, read  # noqa: E402
from deltallava_jax.convert.workdir import compose, read_workdir, write_workdir  # noqa: E402
from deltallava_jax.data import conversation, tokens  # noqa: E402
from deltallava_jax.data.conversation import TEMPLATES, tokenize  # noqa: E402
from deltallava_jax.data.images import load_image  # noqa: E402
from deltallava_jax.inference.model import Model  # noqa: E402
from deltallava_jax.models import vision  # noqa: E402
from tests.convert.checkpoints import (  # noqa: E402
    SIDE,
)
from tests.convert.exports import DELTA, exported, loaded  # noqa: E402

PROMPT = "What is in the picture?"
LONGER = "The shape is green, is it not? What is in the picture, on a blue square?"


@pytest.fixture(scope="session")
def pictures() -> list[Image.Image]:
    """Two pictures of unequal sides, larger than the tower's."""
    rng = np.random.default_rng(5)
    small = [rng.integers(0, 256, (5, 7, 3), dtype=np.uint8), rng.integers(0, 256, (6, 4, 3), dtype=np.uint8)]
    return [Image.fromarray(picture).resize((12 * picture.shape[1], 12 * picture.shape[0])) for picture in small]


def vicuna(question: str) -> str:
    """The prompt that our Model.generate makes."""
    return TEMPLATES["vicuna_v1"].system + f"USER: <image>\n{question} ASSISTANT:"


def ready(model: Pretrained, folder) -> Model:
    """With the tokenizer of the decoder's folder."""
    return Model(model.cfg, model.params, tokens.load(folder), aspect=model.aspect)


def assert_processor_agrees(processor, config, tokenizer, pictures, opened: int = 1):
    """Its text ids are ours, with ``opened`` image tokens for each placeholder; the pixels are of the tower's size."""
    inputs = processor(images=pictures[:1], text=vicuna(PROMPT), return_tensors="pt")
    mine = tokenize(
        conversation.prompt_conversation([(PROMPT, None)], 1), TEMPLATES["vicuna_v1"], tokenizer
    ).ids.tolist()
    token = config.image_token_index
    assert inputs["input_ids"][0].tolist() == [i for x in mine for i in ([token] * opened if x == 0 else [x])]
    assert inputs["pixel_values"].shape == (1, 3, SIDE, SIDE)


@pytest.mark.parametrize("decoder", ["llama_grouped", "qwen2", "llama"])
def test_processor_of_a_delta_export(decoder, composed, saved, pictures, tmp_path):
    """Published tokenizers, with <s> and without, and one that we trained and saved."""
    folder = exported(composed("clip", decoder, "delta", **DELTA), tmp_path / "delta")
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert_processor_agrees(processor, config, tokens.load(saved(decoder)), pictures)


def test_a_tokenizer_of_ours_pads(composed, pictures, tmp_path):
    folder = exported(composed("clip", "llama", "delta", **DELTA), tmp_path / "delta")
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    inputs = processor(text=[PROMPT, LONGER], padding=True, return_tensors="pt")
    assert (inputs["attention_mask"] == 0).sum() == (inputs["input_ids"] == 0).sum() > 0


@pytest.mark.parametrize("aspect", ASPECTS)
@pytest.mark.parametrize("tower, projector", [("clip", "mlp"), ("siglip", "mlp"), ("clip", "delta")])
def test_pictures_are_prepared_as_ours_are(tower, projector, aspect, composed, pictures, tmp_path):
    """Pictures of unequal sides; what training saw is what the export sees, and what is read from it again."""
    model = composed(tower, "llama3", projector, **(DELTA if projector == "delta" else {}))
    assert model.aspect == {"clip": "square", "siglip": "squash"}[tower]
    folder = exported(dataclasses.replace(model, aspect=aspect), tmp_path / "export")
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    for picture in pictures:
        mine = load_image(picture, SIDE, aspect, model.cfg.vision.mean_color)
        mine = vision.normalize(mine[None], model.cfg.vision)[0]
        theirs = processor.image_processor(picture, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
        np.testing.assert_allclose(mine, theirs, atol=1e-5)
    assert read(folder).aspect == aspect


def test_a_processor_that_transformers_saved_says_the_same(composed, tmp_path):
    """It puts the image processor's settings into processor_config.json."""
    model = dataclasses.replace(composed("clip", "llama3", "mlp"), aspect="pad")
    folder = exported(model, tmp_path / "mlp")
    AutoProcessor.from_pretrained(folder).save_pretrained(folder)
    (folder / "preprocessor_config.json").unlink()
    assert read(folder).aspect == "pad"


@pytest.mark.parametrize("through_a_workdir", [False, True])
def test_a_model_trained_on_other_pictures_than_it_came_with(through_a_workdir, saved, opened, pictures, tmp_path):
    """The source's processor crops; the export pads."""
    model, work = dataclasses.replace(opened("llava"), aspect="pad"), tmp_path / "work"
    if through_a_workdir:
        work.mkdir()
        write_workdir(model, work, "work")
        model = read_workdir(work)
    processor = AutoProcessor.from_pretrained(exported(model, tmp_path / "hf"))
    theirs = processor.image_processor(pictures[0], return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    mine = vision.normalize(load_image(pictures[0], SIDE, "pad")[None], model.cfg.vision)[0]
    np.testing.assert_allclose(mine, theirs, atol=1e-5)


@pytest.mark.parametrize("through_a_workdir", [False, True])
def test_a_decoder_without_tokenizer_json(through_a_workdir, saved, tmp_path):
    """Vicuna has tokenizer.model alone; here vocab.json and merges.txt. The export knows the image token."""
    decoder, work = tmp_path / "decoder", tmp_path / "work"
    shutil.copytree(saved("qwen2"), decoder)
    Tokenizer.from_file(str(decoder / "tokenizer.json")).model.save(str(decoder))
    (decoder / "tokenizer.json").unlink()
    config = json.loads((decoder / "tokenizer_config.json").read_text())
    (decoder / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": "Qwen2Tokenizer"}))
    model = compose(saved("clip"), decoder, "mlp", {})
    if through_a_workdir:
        work.mkdir()
        write_workdir(model, work, "work")
        model = read_workdir(work)
    folder = exported(model, tmp_path / "mlp")
    token = AutoConfig.from_pretrained(folder).image_token_index
    processor = AutoProcessor.from_pretrained(folder)
    mine = tokens.load(decoder).encode("What is it?")[0]
    assert processor.tokenizer("<image>What is it?")["input_ids"] == [token, *mine]


def test_special_tokens_of_a_workdir_whose_source_is_gone(composed, tmp_path):
    """The workdir's own tokenizer_config.json has their names: Qwen2's prompts do not begin with <s>."""
    work = tmp_path / "work"
    work.mkdir()
    write_workdir(composed("clip", "qwen2", "mlp"), work, "work")
    shutil.rmtree(work / "source")
    folder = exported(read_workdir(work), tmp_path / "mlp")
    assert tokens.load(work).bos is None
    assert tokens.load(folder).bos is None


def test_processor_of_an_mlp_export(composed, saved, pictures, tmp_path):
    model = composed("clip", "llama_grouped", "mlp")
    folder = exported(model, tmp_path / "mlp")
    processor = AutoProcessor.from_pretrained(folder)
    assert type(processor).__name__ == "LlavaProcessor"
    ours = ready(model, saved("llama_grouped"))
    assert_processor_agrees(processor, AutoConfig.from_pretrained(folder), ours.tokenizer, pictures, 16)
    theirs = loaded(folder)
    inputs = processor(images=pictures[0], text=vicuna(PROMPT), return_tensors="pt")
    out = theirs.generate(**inputs, do_sample=False, max_new_tokens=8, pad_token_id=0)
    text = processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    assert text == ours.generate(pictures[0], PROMPT, max_new_tokens=8)


def test_text_for_pictures_in_a_padded_batch(delta_folder, saved, pictures):
    """Prompts of unequal length, padded by the tokenizer, give the text that our model gives for each."""
    model, folder = delta_folder
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    theirs, ours = loaded(folder), ready(model, saved("llama_grouped"))
    expected = [
        ours.generate(picture, question, budget=4, max_new_tokens=8)
        for picture, question in zip(pictures, (PROMPT, LONGER), strict=True)
    ]
    settings = dict(budget=4, do_sample=False, max_new_tokens=8)
    for picture, question, text in zip(pictures, (PROMPT, LONGER), expected, strict=True):
        inputs = processor(images=picture, text=vicuna(question), return_tensors="pt")
        out = theirs.generate(**inputs, **settings)
        assert [each.strip() for each in processor.batch_decode(out, skip_special_tokens=True)] == [text]
    inputs = processor(
        images=pictures, text=[vicuna(PROMPT), vicuna(LONGER)], padding=True, padding_side="left", return_tensors="pt"
    )
    assert (inputs["attention_mask"] == 0).any()
    out = theirs.generate(**inputs, **settings)
    assert [each.strip() for each in processor.batch_decode(out, skip_special_tokens=True)] == expected


@pytest.fixture(scope="module")
def quecc_folder(composed, tmp_path_factory):
    """(our model, its export) of a system that reads the question, of which it reads the first tokens."""
    settings = dict(scale_factor=(2,), head_dim=16, question_length=12)
    model = composed("clip", "llama_grouped", "quecc", **settings)
    return model, exported(model, tmp_path_factory.mktemp("text") / "quecc_text")


def test_the_processor_finds_the_question_of_each_image(quecc_folder, saved, pictures):
    """Pictures and text are all it needs; the answers are our model's, also in a padded batch."""
    model, folder = quecc_folder
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    theirs, ours, settings = loaded(folder), ready(model, saved("llama_grouped")), dict(do_sample=False)
    questions, answers = (PROMPT, LONGER), []
    for picture, question in zip(pictures, questions, strict=True):
        inputs = processor(images=picture, text=vicuna(question), return_tensors="pt")
        out = theirs.generate(**inputs, max_new_tokens=8, **settings)
        answers += processor.batch_decode(out, skip_special_tokens=True)
        assert answers[-1].strip() == ours.generate(picture, question, max_new_tokens=8)
    texts = [vicuna(question) for question in questions]
    inputs = processor(images=pictures, text=texts, padding=True, padding_side="left", return_tensors="pt")
    assert (inputs["attention_mask"] == 0).any() and (inputs["question_mask"] == 0).any()
    out = theirs.generate(**inputs, max_new_tokens=8, **settings)
    assert processor.batch_decode(out, skip_special_tokens=True) == answers
    assert "question_ids" not in processor(text=[PROMPT], return_tensors="pt")


CONVERSATION = [
    ("<image>\nWhat is in the picture?", "A small red circle."),
    ("The shape is green, is it not? ", "It is."),
    ("What? <image><image>\nOn a blue square?", "A circle on a blue square."),
    ("<image>", "The shape."),
    ("<image>What is in the picture?", None),
]


@pytest.mark.parametrize("decoder", ["llama_grouped", "qwen2", "llama"])
def test_questions_of_a_long_conversation(decoder, composed, saved, tmp_path):
    """Several images, several turns, a turn without words: the tokens that our data pipeline marks."""
    folder = exported(composed("clip", decoder, "quecc", scale_factor=2, head_dim=16), tmp_path / "quecc")
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    template = TEMPLATES["vicuna_v1"]
    rounds = [template.user.format(question) + template.assistant for question, _ in CONVERSATION]
    answers = [f" {answer}{template.end}" for _, answer in CONVERSATION[:-1]] + [""]
    text = template.system + "".join(part for pair in zip(rounds, answers, strict=True) for part in pair)
    tokenizer = tokens.load(saved(decoder))
    mine = tokenize(conversation.prompt_conversation(CONVERSATION, 5), template, tokenizer, question_length=24)
    inputs = processor(text=text)
    found = [
        [token for token, live in zip(ids, mask, strict=True) if live]
        for ids, mask in zip(inputs["question_ids"], inputs["question_mask"], strict=True)
    ]
    assert found == [ids[ids >= 0].tolist() for ids in mine.questions]
    assert [len(ids) > 0 for ids in found] == [True, True, True, False, True]


def test_questions_end_as_in_the_template_of_the_workdir(quecc_folder, saved, pictures, tmp_path):
    """ "brief" has nothing between a question and its answer: in a prompt the question goes on to its end."""
    model, _ = quecc_folder
    work = tmp_path / "work"
    work.mkdir()
    write_workdir(dataclasses.replace(model, template="brief"), work, "work")
    ours = deltallava_jax.load(work)
    assert ours.template == "brief"
    folder = exported(read_workdir(work), tmp_path / "quecc")
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    processor.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "processor_config.json").read_text())
    assert processor.question_end == again["question_end"] == ""
    inputs = processor(images=pictures[0], text=f"<image>\n{LONGER}", return_tensors="pt")
    out = loaded(folder).generate(**inputs, do_sample=False, max_new_tokens=8)
    expected = ours.generate(pictures[0], LONGER, max_new_tokens=8)
    assert processor.batch_decode(out, skip_special_tokens=True)[0].strip() == expected


def test_text_after_a_workdir(delta_folder, saved, pictures, tmp_path):
    """Our own loading of the workdir and of the export answers like the model itself."""
    model, folder = delta_folder
    (tmp_path / "work").mkdir()
    write_workdir(model, tmp_path / "work", "work")
    expected = ready(model, saved("llama_grouped")).generate(pictures[0], PROMPT, budget=4, max_new_tokens=8)
    for path in (tmp_path / "work", folder):
        assert deltallava_jax.load(path).generate(pictures[0], PROMPT, budget=4, max_new_tokens=8) == expected


def test_the_exported_code_needs_no_jax(delta_folder):
    """A fresh process without jax loads model and processor; nor does it import this package."""
    _, folder = delta_folder
    program = f"""
import sys
sys.modules["jax"] = sys.modules["deltallava_jax"] = None
from transformers import AutoModel, AutoProcessor
model = AutoModel.from_pretrained({str(folder)!r}, trust_remote_code=True)
AutoProcessor.from_pretrained({str(folder)!r}, trust_remote_code=True)
assert type(model).__name__ == "DeltaLlavaForConditionalGeneration"
ours = [name for name, module in sys.modules.items() if module and name.split(".")[0] in ("jax", "flax", "jaxlib")]
assert not ours, ours
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

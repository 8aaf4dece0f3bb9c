"""What a conversion makes is used: loaded, asked questions, and imported without torch."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import deltallava_jax
import eval as evaluation_door
from deltallava_jax.config import ASPECTS, workdir_config
from deltallava_jax.convert.tensors import Tensor, find
from deltallava_jax.data.conversation import TEMPLATES, Template, prompt_conversation, tokenize
from deltallava_jax.data.images import load_image
from deltallava_jax.errors import BadSample, ConfigError, ConversionError
from deltallava_jax.inference import model as inference
from deltallava_jax.inference.generate import Engine
from tests.convert.broken import assert_same_params, clip, convert, edit, llama, llava, llava_hf

ROOT = Path(__file__).parents[2]
QUESTION = "what color is the shape?"


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """The same model in three forms; parts; a model with four and with one token an image."""
    root = tmp_path_factory.mktemp("folders")
    made = {"hf": llava_hf(root / "hf"), "llava": llava(root / "llava")}
    made |= {"llama": llama(root / "llama"), "clip": clip(root / "clip"), "workdir": root / "workdir"}
    convert(made["hf"], made["workdir"])
    made["elastic"] = root / "elastic"
    convert("--vision", made["clip"], "--decoder", made["llama"], "--projector", "delta", "--scale-factor", "2,4",
            "--set", "head_dim=16", "--set", "initializer_range=0.2", made["elastic"])  # fmt: skip
    return made


@pytest.fixture(scope="module")
def models(folders):
    return {name: deltallava_jax.load(folder) for name, folder in folders.items()}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> list[Path]:
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    files = [folder / f"{index}.png" for index in range(2)]
    for file in files:
        Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(file)
    return files


def ask(model, images, prompt=QUESTION, **options) -> str:
    return model.generate(images, prompt, **{"max_new_tokens": 6, **options})


# ------------------------------------------------------------------ load


@pytest.mark.parametrize("form", ["llava", "workdir"])
def test_a_model_is_the_same_in_every_form(models, form):
    assert models[form].cfg == models["hf"].cfg and models[form].cfg.whole
    assert_same_params(models[form].params, models["hf"].params)
    assert models[form].template == "vicuna_v1"
    assert models[form].tokenizer.encode(QUESTION) == models["hf"].tokenizer.encode(QUESTION)


def test_parts_are_loaded_too(models):
    assert set(models["llama"].params) == {"decoder"} and models["llama"].tokenizer is not None
    assert set(models["clip"].params) == {"vision"} and models["clip"].tokenizer is None


def test_a_folder_may_be_text_and_dtype_is_that_of_all_parameters_and_of_computing(folders):
    for name in ("llama", "workdir"):
        model = deltallava_jax.load(str(folders[name]), dtype="bfloat16")
        assert {str(leaf.dtype) for leaf in jax.tree.leaves(model.params)} == {"bfloat16"}
        assert model.cfg.dtype == "bfloat16"


@pytest.mark.parametrize("form", ["hf", "llava", "workdir"])
def test_each_device_reads_its_share_alone(form, models, folders, pictures, monkeypatch):
    """What the rules divide lies whole on no device, and is read from its file once."""
    read, read_into = Counter(), Tensor.read_into

    def count(tensor, out, index=()):
        read[tensor.name] += out.nbytes
        read_into(tensor, out, index)

    monkeypatch.setattr(Tensor, "read_into", count)
    model = deltallava_jax.load(folders[form], tensor=2)
    assert_same_params(model.params, models[form].params)
    whole = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(model.params):
        parts = [shard.data.nbytes for shard in leaf.addressable_shards]
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        divided = re.search(r"decoder/.*(kernel|embedding)|layers/.*(kernel|\b(q|k|v|up)/bias)", name)
        assert parts == [leaf.nbytes // 2 if divided else leaf.nbytes] * 2, name
        whole += not divided
    assert 0 < whole < len(jax.tree.leaves(model.params)) // 2
    for tensor in find(folders[form]).values() if form != "workdir" else ():
        if "proj.weight" in tensor.name and "layers" in tensor.name:
            assert read[tensor.name] == tensor.bytes
    assert ask(model, pictures[0]) == ask(models[form], pictures[0])


def test_the_template_is_the_workdirs(folders, tmp_path):
    shutil.copytree(folders["workdir"], tmp_path / "brief")
    values = json.loads((tmp_path / "brief" / "config.json").read_text())
    values["data"]["template"] = "brief"
    edit(tmp_path / "brief", data=values["data"])
    assert deltallava_jax.load(tmp_path / "brief").template == "brief"


CLIP_PROCESSOR = {"size": {"shortest_edge": 32}, "do_center_crop": True, "crop_size": {"height": 32, "width": 32}}
SQUASHING = {"size": {"height": 32, "width": 32}}


@pytest.mark.parametrize(
    ("make", "option", "file", "settings", "aspect"),
    [
        (llava_hf, None, None, None, "square"),
        (llava_hf, None, "preprocessor_config.json", CLIP_PROCESSOR, "square"),
        (llava_hf, None, "preprocessor_config.json", {"size": 32}, "square"),
        (llava_hf, None, "preprocessor_config.json", SQUASHING, "squash"),
        (llava_hf, None, "preprocessor_config.json", CLIP_PROCESSOR | {"do_pad": True}, "pad"),
        (llava_hf, None, "processor_config.json", {"image_processor": CLIP_PROCESSOR | {"do_pad": True}}, "pad"),
        (llava_hf, None, "processor_config.json", {"image_token": "<image>"}, "square"),
        (llava_hf, "pad", "preprocessor_config.json", CLIP_PROCESSOR, "pad"),
        (llava, None, None, None, "square"),
        (llava, "pad", None, None, "pad"),
        (llava, "square", None, None, "square"),
        (llava, "square", "some/tower/preprocessor_config.json", SQUASHING, "squash"),
        (llava, "pad", "some/tower/preprocessor_config.json", SQUASHING, "pad"),
    ],
)
def test_how_images_become_square_is_taken_over(make, option, file, settings, aspect, tmp_path):
    """From config.json or the image processor, of the model or of its tower, into a workdir and loaded models."""
    source = make(tmp_path / "source", **({} if option is None else {"image_aspect_ratio": option}))
    if file is not None:
        (source / file).write_text(json.dumps(settings))
    convert(source, tmp_path / "work")
    assert workdir_config(tmp_path / "work").data.aspect == aspect
    assert deltallava_jax.load(source).aspect == deltallava_jax.load(tmp_path / "work").aspect == aspect


def test_a_composed_model_has_the_towers_aspect(folders, tmp_path):
    shutil.copytree(folders["clip"], tmp_path / "clip")
    (tmp_path / "clip" / "preprocessor_config.json").write_text(json.dumps(SQUASHING))
    convert("--vision", tmp_path / "clip", "--decoder", folders["llama"], "--projector", "mlp", tmp_path / "work")
    assert workdir_config(tmp_path / "work").data.aspect == "squash"


def test_loading_what_is_not_there_or_no_model(tmp_path):
    with pytest.raises(ConversionError, match=f"{tmp_path / 'none'} does not exist"):
        deltallava_jax.load(tmp_path / "none")
    with pytest.raises(ConversionError, match="holds no weights; expected model.safetensors"):
        deltallava_jax.load(tmp_path)
    with pytest.raises(ConversionError, match="give its folder with --vision"):
        deltallava_jax.load(llava(tmp_path / "llava", tower=""))


# ------------------------------------------------------------------ generate


@pytest.fixture
def prompted(monkeypatch) -> list:
    """The prompts, tokenized, that models are given."""
    prompts, prompt_batch = [], inference.prompt_batch

    def recorded(batch, length):
        prompts.extend(batch)
        return prompt_batch(batch, length)

    monkeypatch.setattr(inference, "prompt_batch", recorded)
    return prompts


def assert_same_prompt(prompt, text: str, template: Template, tokenizer) -> None:
    expected = tokenize(prompt_conversation([(text, None)], text.count("<image>")), template, tokenizer)
    np.testing.assert_array_equal(prompt.ids, expected.ids)
    np.testing.assert_array_equal(prompt.image_positions, expected.image_positions)


def test_the_prompt_is_the_images_and_the_text_in_the_models_template(models, pictures, prompted):
    model = models["workdir"]
    ask(model, pictures)
    (prompt,) = prompted
    assert_same_prompt(prompt, f"<image>\n<image>\n{QUESTION}", TEMPLATES["vicuna_v1"], model.tokenizer)
    assert len(prompt.image_positions) == 2 and prompt.ids[0] == model.tokenizer.bos


def test_an_image_is_a_path_text_or_a_picture_alone_or_in_a_list(models, pictures):
    model, file = models["workdir"], pictures[0]
    picture = Image.open(file)
    answer = ask(model, file)
    for images in (str(file), picture, picture.convert("RGBA"), [file], (file,), [picture]):
        assert ask(model, images) == answer
    assert ask(models["hf"], file) == ask(models["llava"], file) == answer


@pytest.mark.parametrize("aspect", ASPECTS)
def test_an_image_becomes_square_as_in_training(aspect, models, pictures, monkeypatch):
    shown, encode = [], Engine.encode
    monkeypatch.setattr(Engine, "encode", lambda self, *a, **k: shown.append(a[0]) or encode(self, *a, **k))
    ask(dataclasses.replace(models["workdir"], aspect=aspect), pictures[0])
    np.testing.assert_array_equal(shown[0][0], load_image(pictures[0], 32, aspect))


def test_the_answer_depends_on_which_images_in_which_order(models, pictures):
    model, (a, b) = models["workdir"], pictures
    answers = [ask(model, images) for images in (a, b, [a, b], [b, a], [Image.open(a), b], None)]
    assert len(set(answers)) == 5 and answers[2] == answers[4]
    assert ask(model, []) == answers[5]  # no image


def test_a_budget_is_the_largest_unless_it_is_named(models, pictures):
    model, file = models["elastic"], pictures[0]
    assert ask(model, file) == ask(model, file, budget=4) != ask(model, file, budget=1)
    with pytest.raises(ConfigError, match="delta makes 4, 1 tokens an image, not 9"):
        ask(model, file, budget=9)
    with pytest.raises(ConfigError, match="mlp makes 16 tokens an image, not 4"):
        ask(models["hf"], file, budget=4)


def test_a_decoder_alone_continues_the_prompt_as_it_stands(models, prompted):
    model = models["llama"]
    answer = ask(model, None)
    (prompt,) = prompted
    assert_same_prompt(prompt, QUESTION, Template(user="{}", assistant=""), model.tokenizer)
    assert answer == ask(model, []) != ask(model, None, "is there a circle?")


def test_an_image_for_a_decoder_alone(models, pictures):
    with pytest.raises(ConfigError, match="no vision tower, so it takes no images"):
        ask(models["llama"], pictures[0])


def test_a_tower_alone_cannot_answer(models, pictures):
    with pytest.raises(ConfigError, match="no decoder, so it cannot answer"):
        ask(models["clip"], pictures[0])


def test_without_a_tokenizer(folders, tmp_path):
    shutil.copytree(folders["llama"], tmp_path / "llama")
    (tmp_path / "llama" / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match="holds no tokenizer; put its tokenizer.json beside the weights"):
        ask(deltallava_jax.load(tmp_path / "llama"), None)


def test_an_image_that_cannot_be_read_is_named(models, pictures, tmp_path):
    (tmp_path / "cut.png").write_bytes(pictures[0].read_bytes()[:100])
    for name, kind in (("cut.png", "truncated"), ("none.png", "FileNotFoundError")):
        with pytest.raises(BadSample, match=f"image {tmp_path / name}: .*{kind}"):
            ask(models["workdir"], [pictures[0], tmp_path / name])


@pytest.mark.parametrize("count", [1, 0])
def test_a_marker_in_the_prompt_is_no_image_that_is_missing(models, pictures, count):
    """A prompt with <image> in it is refused, or answered as if the marker stood for the image given."""
    model, images = models["workdir"], pictures[:count]
    try:
        answer = ask(model, images, f"<image>\n{QUESTION}")
    except (ConfigError, BadSample) as error:
        assert "<image>" in str(error)
    else:
        assert count and answer == ask(model, images)


@pytest.mark.parametrize("part", ["llama", "clip"])
def test_eval_of_a_part_alone_is_refused_in_words(folders, tmp_path, part):
    convert(folders[part], tmp_path / "part")
    with pytest.raises(ConfigError, match="projector"):
        evaluation_door.main(evaluation_door.parse(["--workdir", str(tmp_path / "part")]))


# ------------------------------------------------------------------ imports


def test_loading_and_asking_brings_in_neither_torch_nor_transformers(folders):
    program = """
import sys
import deltallava_jax
found = sorted({"torch", "transformers", "jax", "numpy"} & set(sys.modules))
assert not found, f"import deltallava_jax imports {found}"
for folder in sys.argv[1:]:
    model = deltallava_jax.load(folder)
    found = sorted({"torch", "transformers", "tensorflow"} & set(sys.modules))
    assert not found, f"load({folder!r}) imports {found}"
model.generate(None, "is there a circle?", max_new_tokens=2)
assert not {"torch", "transformers"} & set(sys.modules)
"""
    command = [sys.executable, "-c", program, *(folders[name] for name in ("workdir", "llama"))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr

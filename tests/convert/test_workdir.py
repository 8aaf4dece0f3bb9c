"""What a conversion makes is used: loaded and asked questions, imported without torch, trained from.

The runs of train.py are in this process and on one device; most stop before the first step."""

import dataclasses
import itertools
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
import tiny
from broken import clip, convert, edit, llama, llava, llava_hf
from PIL import Image

import deltallava_jax
import eval as evaluation_door
import train as door
from deltallava_jax.analysis import plan as analysis
from deltallava_jax.config import ASPECTS, workdir_config
from deltallava_jax.convert.read import Pretrained
from deltallava_jax.convert.tensors import Tensor, find
from deltallava_jax.convert.workdir import compose, read_workdir, write_workdir
from deltallava_jax.data import sources, tokens
from deltallava_jax.data.conversation import TEMPLATES, Template, asked, tokenize
from deltallava_jax.data.images import load_image
from deltallava_jax.errors import BadSample, CheckpointError, ConfigError, ConversionError
from deltallava_jax.inference import model as inference
from deltallava_jax.inference.generate import Engine
from deltallava_jax.models import vlm
from deltallava_jax.models.names import flatten
from deltallava_jax.parallel import mesh
from deltallava_jax.training import loop
from deltallava_jax.training.checkpoints import Checkpoints
from deltallava_jax.training.step import TrainStep

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


def assert_same_params(ours, theirs) -> None:
    ours, theirs = (dict(jax.tree_util.tree_leaves_with_path(tree)) for tree in (ours, theirs))
    assert set(ours) == set(theirs)
    for path, leaf in theirs.items():
        assert ours[path].dtype == leaf.dtype, path
        np.testing.assert_array_equal(np.asarray(ours[path]), np.asarray(leaf), err_msg=str(path))


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
    expected = tokenize(asked([(text, None)], text.count("<image>")), template, tokenizer)
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
    with pytest.raises(ConfigError, match="no vision tower, so it cannot read images"):
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


# ------------------------------------------------------------------ training from it

# Four tokens an image and one layer of each kind: what a test of a training run can wait for.
SMALL = {
    "model.vision.image_size": 16, "model.vision.layers": 1, "model.projector.name": "mlp", "model.projector.grid": 2,
    "model.projector.select_layer": -1, "model.decoder.layers": 1, "training.steps": 2, "training.checkpoint_every": 1,
}  # fmt: skip


def parse(workdir, **settings):
    changes = {**SMALL, **{key.replace("__", "."): value for key, value in settings.items()}}
    arguments = [f"--config.{path}={value}" for path, value in changes.items()]
    return door.parse(["--config", str(tiny.FILE), "--workdir", str(workdir), *arguments])


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """source(dtype): a converted workdir with a model that the SMALL configuration describes, and its parameters."""
    root = tmp_path_factory.mktemp("converted")
    cfg, _ = parse(root)
    (root / "tokenizer").mkdir()
    tokens.train(["what color is the shape? red", "yes no circle"], 301).save(root / "tokenizer" / "tokenizer.json")

    def source(dtype="float32"):
        params = vlm.init_params(cfg.model, jax.random.key(5))
        params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
        if not (root / dtype).exists():
            (root / dtype).mkdir()
            kept = sorted((root / "tokenizer").iterdir())
            write_workdir(Pretrained(cfg.model, params, kept=kept), root / dtype, "source")
        return root / dtype, params

    return source


class Few:
    """The first records of easy-VQA."""

    def __init__(self, source):
        self.source = source

    def __len__(self):
        return 64

    def __getitem__(self, index):
        return self.source[index]

    def texts(self):
        return self.source.texts()[:64]


@pytest.fixture
def run(monkeypatch):
    """run(workdir, **settings): train.py on one device and on few records."""
    make_mesh, training_source = mesh.make_mesh, sources.training_source
    monkeypatch.setattr(mesh, "make_mesh", lambda cfg: make_mesh(cfg, jax.devices()[:1]))
    monkeypatch.setattr(sources, "training_source", lambda cfg: Few(training_source(cfg)))
    return lambda workdir, **settings: door.main(*parse(workdir, **settings))


@pytest.fixture
def begin(run, monkeypatch):
    """begin(workdir, **settings): train.py up to its first step. Returns the train state that it begins with."""
    states, init_state = [], loop.init_state

    def recorded(*arguments):
        states.append(init_state(*arguments))
        return states[-1]

    monkeypatch.setattr(loop, "init_state", recorded)
    monkeypatch.setattr(loop, "elements", lambda *_, **__: iter(()))
    monkeypatch.setattr(TrainStep, "compile", lambda *_: None)
    monkeypatch.setattr(analysis, "memory_table", lambda *_: "")

    def begin(workdir, **settings):
        run(workdir, **settings)
        return states[-1]

    return begin


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_first_state_has_the_parameters_of_the_source(source, begin, tmp_path, dtype):
    folder, params = source(dtype)
    state = begin(tmp_path / "run", init_from=folder, optimizer__frozen="('vision/', 'embed/')")
    trained, frozen, params = flatten(state.trained), flatten(state.frozen), flatten(params)
    assert set(frozen) == {path for path in params if path.startswith("vision/") or "embed/" in path}
    assert set(trained) | set(frozen) == set(params) and not set(trained) & set(frozen)
    for path, leaf in params.items():
        own, kind = (frozen, "bfloat16") if path in frozen else (trained, "float32")
        assert own[path].dtype == kind
        np.testing.assert_array_equal(np.asarray(own[path]), np.asarray(leaf.astype(kind)), err_msg=path)
    assert int(state.step) == 0


def test_the_tokenizer_is_the_sources(source, begin, tmp_path):
    folder, _ = source()
    begin(tmp_path / "run", init_from=folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "run" / name).read_text() == (folder / name).read_text()
    assert json.loads((tmp_path / "run" / "config.json").read_text())["init_from"] == str(folder)


def test_a_source_of_another_model_is_refused_with_both_sides(source, begin, tmp_path):
    folder, _ = source()
    with pytest.raises(ConfigError, match=f"{folder} holds another model: model.decoder.mlp_width is 96 now, and 64"):
        begin(tmp_path / "run", init_from=folder, model__decoder__mlp_width=96)


def test_training_in_the_converted_workdir_itself_is_refused(source, begin, tmp_path):
    shutil.copytree(source()[0], tmp_path / "model")
    before = {path: path.read_bytes() for path in sorted((tmp_path / "model").rglob("*")) if path.is_file()}
    with pytest.raises(CheckpointError) as error:
        begin(tmp_path / "model")
    assert "holds parameters alone; train in another --workdir" in str(error.value)
    assert f"--config.init_from={tmp_path / 'model'}" in str(error.value)
    after = {path: path.read_bytes() for path in sorted((tmp_path / "model").rglob("*")) if path.is_file()}
    assert after == before


@pytest.mark.parametrize("kind", ["nowhere", "empty", "hf", "unfinished"])
def test_a_source_without_checkpoints_is_refused_in_words_and_left_as_it_is(source, begin, tmp_path, kind):
    folder = tmp_path / "source"
    if kind == "hf":
        llava_hf(folder)
    elif kind == "unfinished":
        shutil.copytree(source()[0], folder)
        shutil.rmtree(folder / "checkpoints" / "0")
    elif kind == "empty":
        folder.mkdir()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises((CheckpointError, ConfigError, tokens.TokenizerError)) as error:
        begin(tmp_path / "run", init_from=folder)
    assert "init_from" in str(error.value) and str(folder) in str(error.value)
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    assert sorted(tmp_path.rglob("*")) == before, "the source was changed"


def test_a_new_model_takes_the_projector_alone_from_a_trained_run(source, tmp_path):
    folder, params = source()
    cfg, _ = parse(tmp_path)
    trained = vlm.init_params(cfg.model, jax.random.key(6))
    (tmp_path / "stage1").mkdir()
    write_workdir(Pretrained(cfg.model, trained), tmp_path / "stage1", "stage1")
    model = compose(folder, folder, str(tmp_path / "stage1"), {})
    for path, leaf in flatten(model.params).items():
        expected = flatten(trained if path.startswith("projector/") else params)[path]
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(expected), err_msg=path)


def test_a_tokenizer_with_more_tokens_than_the_decoder_is_refused(source, begin, tmp_path):
    folder = shutil.copytree(source()[0], tmp_path / "source")
    values = json.loads((folder / "config.json").read_text())
    values["model"]["decoder"]["vocab_size"] = 260
    edit(folder, model=values["model"])
    with pytest.raises(ConfigError, match="decoder.vocab_size=260, but .*tokenizer.json has 2.. tokens"):
        begin(tmp_path / "run", init_from=folder, model__decoder__vocab_size=260)


def test_a_trained_run_resumes_without_its_source_and_keeps_what_was_frozen(source, run, monkeypatch, tmp_path, capsys):
    original, params = source()
    folder, workdir, elements = tmp_path / "source", tmp_path / "run", loop.elements
    shutil.copytree(original, folder)
    settings = dict(init_from=folder, optimizer__frozen="vision/", optimizer__warmup_ratio=0.0)
    with monkeypatch.context() as patch:  # stopped after the first step of two
        patch.setattr(loop, "elements", lambda *a, **k: itertools.islice(elements(*a, **k), 1))
        run(workdir, **settings)
    trained = read_workdir(workdir)
    assert_same_params(trained.params["vision"], params["vision"])  # every bit, though training held bfloat16
    assert trained.params["decoder"]["layers"]["q"]["kernel"].dtype == "float32"
    assert not np.array_equal(trained.params["projector"]["up"]["kernel"], params["projector"]["up"]["kernel"])

    shutil.rmtree(folder)
    run(workdir, **settings)
    assert "resuming from step 1 of 2" in capsys.readouterr().err
    assert Checkpoints(workdir).latest() == 2 and len((workdir / "metrics.jsonl").read_text().splitlines()) == 2
    alone = read_workdir(workdir)
    assert f"began with {folder}, which is not there any more" in capsys.readouterr().err
    assert_same_params(alone.params["vision"], jax.tree.map(lambda leaf: leaf.astype("bfloat16"), params["vision"]))
    assert alone.cfg == trained.cfg == parse(workdir)[0].model

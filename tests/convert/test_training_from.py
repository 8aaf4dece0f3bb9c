"""Training begins from a converted model: its parameters and tokenizer, and what cannot be its source.

The runs of train.py are in this process and on one device; most stop before the first step."""

import itertools
import json
import shutil

import jax
import numpy as np
import pytest

import train
from deltallava_jax.analysis import plan as analysis
from deltallava_jax.convert.read import Pretrained
from deltallava_jax.convert.workdir import compose, open_model, read_workdir, write_workdir
from deltallava_jax.data import sources, tokens
from deltallava_jax.errors import CheckpointError, ConfigError, ConversionError
from deltallava_jax.models import vlm
from deltallava_jax.models.names import flatten
from deltallava_jax.parallel import mesh
from deltallava_jax.training import loop
from deltallava_jax.training.checkpoints import Checkpoints
from deltallava_jax.training.step import TrainStep
from deltallava_jax.workdir import Workdir
from tests import tiny
from tests.convert.broken import assert_same_params, convert, edit, llava_hf

# Four tokens an image and one layer of each kind: what a test of a training run can wait for.
SMALL = {
    "model.vision.image_size": 16, "model.vision.layers": 1, "model.projector.name": "mlp", "model.projector.grid": 2,
    "model.projector.select_layer": -1, "model.decoder.layers": 1, "training.steps": 2, "training.checkpoint_every": 1,
}  # fmt: skip


def parse(workdir, **settings):
    changes = {**SMALL, **{key.replace("__", "."): value for key, value in settings.items()}}
    arguments = [f"--config.{path}={value}" for path, value in changes.items()]
    return train.parse(["--config", str(tiny.FILE), "--workdir", str(workdir), *arguments])


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
    return lambda workdir, **settings: train.main(*parse(workdir, **settings))


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
    monkeypatch.setattr(analysis, "format_memory", lambda *_: "")

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
    with pytest.raises(ConfigError, match=f"{folder} holds a different model: model.decoder.mlp_width is 96, and 64"):
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
    assert f"note: {folder}, which {workdir} was initialized from, is missing: " in capsys.readouterr().err
    assert_same_params(alone.params["vision"], jax.tree.map(lambda leaf: leaf.astype("bfloat16"), params["vision"]))
    assert alone.cfg == trained.cfg == parse(workdir)[0].model


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_trained_adapters_are_exported_beside_their_base(dtype, source, run, tmp_path):
    """The workdir holds trained parts alone: the export's base is the source to the bit, with the new projector."""
    folder, params = source(dtype)
    work = tmp_path / "run"
    run(work, init_from=folder, optimizer__frozen="('^vision/', '^decoder/')", lora__rank=2, lora__targets="q,down")
    model = read_workdir(work)
    assert set(model.adapters) == {f"decoder/layers/{name}/lora_{x}" for name in ("q", "down") for x in "ab"}
    assert any(np.abs(leaf).max() > 0 for path, leaf in model.adapters.items() if path.endswith("_b"))
    assert not np.array_equal(model.params["projector"]["up"]["kernel"], params["projector"]["up"]["kernel"])
    for part in ("vision", "decoder"):
        assert_same_params(model.params[part], params[part])
    convert(work, tmp_path / "peft", "--to", "peft")
    again = open_model(tmp_path / "peft")
    for part in ("vision", "projector"):
        assert_same_params(again.params[part], model.params[part])
    assert_same_params(again.params["decoder"]["layers"], params["decoder"]["layers"])
    assert_same_params(again.adapters, model.adapters)
    convert(work, tmp_path / "merged", "--merge")
    assert_same_params(read_workdir(tmp_path / "merged").params, Workdir(work).params())


def test_an_adapters_folder_of_llava_has_no_place_for_other_trained_parts(source, run, tmp_path, capsys):
    folder, _ = source("float32")
    run(tmp_path / "run", init_from=folder, optimizer__frozen="('^vision/',)", lora__rank=2, lora__targets="q,down")
    assert "parameters beside adapters and projector train whole, e.g. decoder/" in capsys.readouterr().err
    for layout, name in (("llava", "llava-lora"), ("orbax", "other")):
        with pytest.raises(ConversionError, match="other parameters were trained, e.g. decoder/embed/embedding"):
            convert(tmp_path / "run", tmp_path / name, "--to", layout)
    convert(tmp_path / "run", tmp_path / "peft", "--to", "peft")

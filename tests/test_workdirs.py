"""What a workdir holds: begun, compared, found again from anywhere, its results."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import train as training
from deltallava_jax.config import Config, OptimizerConfig, RopeScaling, override, to_dict
from deltallava_jax.convert.read import Pretrained
from deltallava_jax.convert.workdir import read_workdir, write_workdir
from deltallava_jax.data import tokens
from deltallava_jax.errors import CheckpointError, ConfigError
from deltallava_jax.models.names import flatten
from deltallava_jax.training.checkpoints import Checkpoints
from deltallava_jax.training.optimizer import split
from deltallava_jax.training.step import TrainState
from deltallava_jax.workdir import Workdir
from tests import tiny

FROZEN = ("^vision/",)
TOKENIZER = tokens.train(["what color is the shape? red"], 300)


def config(**changes) -> Config:
    return override(tiny.get_config(), {key.replace("__", "."): str(value) for key, value in changes.items()})


def a_source(folder: Path, seed: int = 0) -> dict:
    """A converted workdir with files of its own. Returns its parameters."""
    cfg, kept = config(), folder.parent / "kept"
    params = tiny.random_params(cfg.model, seed)
    folder.mkdir(parents=True)
    kept.mkdir(exist_ok=True)
    TOKENIZER.save(kept / "tokenizer.json")
    (kept / "generation_config.json").write_text('{"eos_token_id": 7}')
    model = Pretrained(cfg.model, params, kept=sorted(kept.iterdir()), hf={"max_position_embeddings": 77})
    write_workdir(model, folder, folder.name)
    return params


def trained_from(source: str | Path, folder: Path, params: dict, *, begins: bool = True) -> None:
    """A workdir as training from ``source`` with a frozen tower leaves it. begins: config.json is what training writes,
    else as versions up to 0.1.0 wrote it."""
    cfg = dataclasses.replace(config(), init_from=str(source), optimizer=OptimizerConfig(frozen=FROZEN))
    if begins:
        Workdir(folder).begin(cfg, list)
    else:
        folder.mkdir(parents=True)
        Workdir(folder).write(cfg, TOKENIZER)
    trained, frozen = split(params, OptimizerConfig(frozen=FROZEN))
    save(folder, jax.tree.map(lambda leaf: leaf + 0.125, trained), frozen)
    assert {leaf.dtype for leaf in jax.tree.leaves(frozen)} == {jnp.dtype(jnp.bfloat16)}


def save(folder: str | Path, trained: dict, frozen: dict | None = None) -> None:
    saver = Checkpoints(folder, create=True)
    saver.save(3, TrainState(jnp.int32(3), trained, frozen or {}, {"count": jnp.int32(3)}), {})
    saver.wait()
    saver.close()


def assert_tower(workdir: Path, params: dict, dtype: str = "float32") -> None:
    found = flatten(Workdir(workdir).params())
    tower = {path: leaf for path, leaf in flatten(params).items() if path.startswith("vision/")}
    for path, leaf in tower.items():
        assert found[path].dtype == dtype
        np.testing.assert_array_equal(np.asarray(found[path]), np.asarray(leaf.astype(dtype)), err_msg=path)


# ------------------------------------------------------------------ the workdir that a run began with


@pytest.mark.parametrize("begins", [True, False])
def test_a_source_by_a_relative_path_is_found_from_another_folder(tmp_path, monkeypatch, capsys, begins):
    """Its frozen parameters to the bit, and the files beside the original weights, through two stages."""
    home, away = tmp_path / "home", tmp_path / "away"
    params = a_source(home / "runs" / "start")
    monkeypatch.chdir(home)
    trained_from("runs/start", home / "runs" / "pretrain", params, begins=begins)
    trained_from("runs/pretrain", home / "runs" / "finetune", params, begins=begins)
    away.mkdir()
    monkeypatch.chdir(away)
    for name in ("pretrain", "finetune"):
        assert_tower(home / "runs" / name, params)
        model = read_workdir(home / "runs" / name)
        assert "generation_config.json" in {file.name for file in model.kept}
        assert model.hf == {"max_position_embeddings": 77} and model.cfg == config().model
    if begins:
        shutil.rmtree(home / "runs" / "pretrain")
        shutil.rmtree(home / "runs" / "start")  # the files were carried along
        assert read_workdir(home / "runs" / "finetune").hf == {"max_position_embeddings": 77}
    else:
        assert capsys.readouterr().err == ""


def test_runs_that_are_moved_together_find_each_other(tmp_path, capsys):
    params = a_source(tmp_path / "here" / "start")
    trained_from(tmp_path / "here" / "start", tmp_path / "here" / "run", params)
    (tmp_path / "here").rename(tmp_path / "there")
    assert_tower(tmp_path / "there" / "run", params)
    assert capsys.readouterr().err == ""


def test_a_source_that_is_gone_is_said(tmp_path, capsys):
    params = a_source(tmp_path / "start")
    trained_from(tmp_path / "start", tmp_path / "run", params, begins=False)
    shutil.rmtree(tmp_path / "start")
    assert_tower(tmp_path / "run", params, "bfloat16")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"note: {tmp_path / 'start'}, which {tmp_path / 'run'} was initialized from, is missing: ")
    assert "(vision)" in line and "bfloat16" in line
    read_workdir(tmp_path / "run")
    assert "is missing, and so are its source files" in capsys.readouterr().err


def test_a_source_that_was_made_anew_is_not_taken_for_the_one_of_the_training(tmp_path, capsys):
    params = a_source(tmp_path / "start")
    trained_from(tmp_path / "start", tmp_path / "run", params)
    shutil.rmtree(tmp_path / "start")
    a_source(tmp_path / "start", seed=1)
    assert_tower(tmp_path / "run", params, "bfloat16")
    assert "was initialized from, has changed: " in capsys.readouterr().err


def test_without_a_finished_checkpoint(tmp_path):
    Workdir(tmp_path).write(config(), TOKENIZER)
    for what in (lambda: Workdir(tmp_path).latest, lambda: Workdir(tmp_path).params()):
        with pytest.raises(CheckpointError, match=f"{tmp_path} holds no finished checkpoint; train first"):
            what()
    assert not Workdir(tmp_path).exists and not (tmp_path / "checkpoints").exists()


# ------------------------------------------------------------------ begun and gone on with


@pytest.fixture
def begun(tmp_path):
    """A workdir with a checkpoint."""
    cfg = config()
    Workdir(tmp_path / "run").begin(cfg, lambda: ["what color is the shape? red"])
    save(tmp_path / "run", tiny.random_params(cfg.model))
    return Workdir(tmp_path / "run")


def test_a_run_that_goes_on_is_compared_with_its_beginning(begun):
    written = (begun.path / "config.json").read_text()
    assert begun.config == config() and begun.tokenizer.vocab_size <= 384 and begun.latest == 3
    assert begun.begin(config(), list) == []
    changed = config(optimizer__lr=2e-3, model__dtype="bfloat16", model__remat="full")
    assert begun.begin(changed, list) == [
        "note: model.dtype is 'bfloat16'; the run was started with 'float32'",
        "note: model.remat is 'full'; the run was started with 'dots'",
        "note: optimizer.lr is 0.002; the run was started with 0.001",
    ]
    assert (begun.path / "config.json").read_text() == written


SCALING = RopeScaling(8.0, 1.0, 4.0, 8192)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model__decoder__rope_base": 5000.0}, "model.decoder.rope_base is 5000.0; .* started with 10000.0"),
        ({"model__projector__scale_factor": 2}, "model.projector.scale_factor is 2; .* started with 4"),
        ({"model__vision__heads": 4}, "model.vision.heads is 4; .* started with 2"),
    ],
)
def test_another_model_is_refused(begun, changes, told):
    with pytest.raises(ConfigError, match=f"{begun} holds a different model: {told}. Use that"):
        begun.begin(config(**changes), list)


@pytest.mark.parametrize(("key", "now", "then"), [("aspect", "squash", "pad"), ("template", "plain", "brief")])
def test_another_way_to_ask_the_model_is_refused(begun, key, now, then):
    """eval.py and exports read it in config.json."""
    assert getattr(begun.config.data, key) == then
    told = f"data.{key} is {now!r}; the run was started with {then!r}. Resume with --config.data.{key}={then}, or"
    with pytest.raises(ConfigError, match=told):
        begun.begin(config(**{f"data__{key}": now}), list)


def test_a_part_that_is_switched_on_or_off_is_another_model(begun):
    cfg = config()
    scaled = dataclasses.replace(
        cfg, model=dataclasses.replace(cfg.model, decoder=dataclasses.replace(cfg.model.decoder, rope_scaling=SCALING))
    )
    with pytest.raises(ConfigError, match="model.decoder.rope_scaling is {'factor': 8.0.* started with None"):
        begun.begin(scaled, list)
    (begun.path / "config.json").write_text(json.dumps(to_dict(scaled)))
    with pytest.raises(ConfigError, match="model.decoder.rope_scaling is None; .* started with {'factor': 8.0"):
        begun.begin(cfg, list)


def test_the_same_source_by_another_path_is_no_change(begun, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = dataclasses.replace(config(), init_from="run")
    Workdir("second").begin(cfg, list)
    assert json.loads(Path("second/config.json").read_text())["init_from"] == str(tmp_path / "run")
    save("second", tiny.random_params(cfg.model))
    assert Workdir("second").begin(cfg, list) == []


# ------------------------------------------------------------------ the model of a new run


@pytest.mark.parametrize(
    ("key", "now", "there"),
    [
        ("decoder.rope_base", 5000.0, 10000.0),
        ("decoder.mlp_width", 96, 64),
        ("vision.heads", 4, 2),
        ("projector.variant", "paper", "release"),
    ],
)
def test_a_model_that_is_not_the_sources_is_refused_and_nothing_made(begun, tmp_path, key, now, there):
    cfg = dataclasses.replace(config(**{f"model.{key}": now}), init_from=str(begun))
    with pytest.raises(ConfigError) as error:
        Workdir(tmp_path / "new").begin(cfg, list)
    told = f"config.init_from={begun} holds a different model: model.{key} is {now!r}, and {there!r} there. "
    assert str(error.value).startswith(told) and not (tmp_path / "new").exists()


def test_the_number_of_tokens_and_how_it_is_trained_are_free(begun, tmp_path):
    free = {"model__projector__scale_factor": (2, 4), "model__projector__drop_path": 0.3, "model__dtype": "bfloat16"}
    cfg = dataclasses.replace(config(**free), init_from=str(begun))
    assert Workdir(tmp_path / "new").begin(cfg, list) == []
    assert Workdir(tmp_path / "new").config.model == cfg.model


def test_a_configuration_without_a_model_has_the_sources(begun, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("from deltallava_jax import config as c\n\n\ndef get_config():\n    return c.Config(name='mine')\n")

    def parse(workdir, *more):
        return training.parse(["--config", str(file), "--workdir", str(tmp_path / workdir), *more])[0]

    from_source = (f"--config.init_from={begun}",)
    assert parse("new", *from_source).model == config().model
    elastic = parse("new", *from_source, "--config.model.projector.scale_factor=(2,4)").model
    assert elastic == config(model__projector__scale_factor=(2, 4)).model
    assert parse("run").model == config().model  # goes on
    assert parse("new").model == Config().model
    with pytest.raises(ConfigError, match="no config.json"):
        parse("new", f"--config.init_from={tmp_path / 'nowhere'}")
    (tmp_path / "ended" / "checkpoints").mkdir(parents=True)  # before its first checkpoint: the command begins anew
    Workdir(tmp_path / "ended").write(config(model__projector__scale_factor=2), None)
    assert parse("ended", *from_source).model == config().model


# ------------------------------------------------------------------ results


def test_a_part_of_the_questions_takes_the_place_of_no_result(tmp_path):
    workdir = Workdir(tmp_path)
    whole = {"task": "easy_vqa", "budget": 4, "accuracy": 0.9, "n": 128, "limit": 0}
    workdir.write_report(whole)
    workdir.write_report({**whole, "accuracy": 0.1, "n": 16, "limit": 16})
    workdir.write_report({**whole, "accuracy": 0.2}, "blind")
    workdir.write_report({**whole, "accuracy": 0.3, "n": 16, "limit": 16}, "blind")
    names = ("easy_vqa", "easy_vqa_4")
    marks = ("", "_limit16", "_blind", "_blind_limit16")
    assert {file.name for file in workdir.results.iterdir()} == {f"{a}{b}.json" for a in names for b in marks}
    assert [report["accuracy"] for report in workdir.reports()] == [0.9, 0.2]


def test_a_result_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "gqa_4.json").write_text('{"task": ')
    with pytest.raises(ConfigError, match="gqa_4.json cannot be read"):
        Workdir(tmp_path).reports()

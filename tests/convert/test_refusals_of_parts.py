"""Parts, options and destinations that do not fit: one clear message, and nothing is left at the destination."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from deltallava_jax.convert import shards, workdir
from tests.convert import broken
from tests.convert.broken import (
    CLIP,
    assert_has,
    clip,
    clip_weights,
    convert,
    llama,
    llava_hf,
    mlp_weights,
    random,
    refused,
    save,
)

# ------------------------------------------------------------------ composing


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> tuple:
    """Options that give a tower and a decoder."""
    folder = tmp_path_factory.mktemp("parts")
    return "--vision", clip(folder / "clip"), "--decoder", llama(folder / "llama"), "--set", "head_dim=16"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--scale-factor", "3"], ["scale_factor=3", "4x4 patch grid", "valid values: 1, 2, 4"]),
        (["--scale-factor", "2,3"], ["scale_factor=3", "valid values: 1, 2, 4"]),
        (["--scale-factor", "two"], ["scale_factor", "'two'"]),
        (["--set", "rank"], ["--set rank", "KEY=VALUE"]),
        (["--set", "rnk=3"], ["rnk", "did you mean 'rank'"]),
        (["--set", "head_dim=48"], ["head_dim=48", "64"]),
        (["--set", "out_width=16"], ["out_width=16", "decoder.width=32"]),
    ],
)
def test_settings_of_a_new_projector_that_cannot_be(parts, target, options, words):
    assert_has(refused(target, *parts, "--projector", "delta", *options), *words)


@pytest.mark.parametrize(("width", "out"), [(32, 32), (64, 16)])
def test_a_trained_projector_of_another_width(parts, tmp_path, target, width, out):
    shapes = {"0.weight": (out, width), "0.bias": (out,), "2.weight": (out, out), "2.bias": (out,)}
    file = tmp_path / "projector.safetensors"
    save_file(random(shapes, 0), file)
    message = refused(target, *parts, "--projector", file)
    assert_has(message, f"--projector {file}", "in_width=32" if width == 32 else "out_width=16", "needs")
    assert_has(message, 64 if width == 32 else 32)


def test_weights_that_are_no_projector(parts, tmp_path, target):
    file = tmp_path / "projector.safetensors"
    save_file(random({"a.weight": (3, 4), "b.weight": (3, 4)}, 0), file)
    assert_has(refused(target, *parts, "--projector", file), "projector", "a.weight, b.weight")


def test_a_projector_by_a_name_that_is_neither_a_system_nor_a_file(parts, target):
    assert_has(refused(target, *parts, "--projector", "detla"), "detla", "known systems: delta")


def test_a_folder_that_is_not_the_part_it_is_given_as(parts, target):
    _, tower, _, decoder, *_ = parts
    new = "--projector", "delta"
    assert_has(refused(target, "--vision", decoder, "--decoder", decoder, *new), f"--vision {decoder} holds no tower")
    assert_has(refused(target, "--vision", tower, "--decoder", tower, *new), f"--decoder {tower} holds no decoder")
    assert_has(refused(target, *parts, "--projector", decoder), f"{decoder} holds no projector", "known systems: delta")


def test_composing_takes_all_three_parts_and_no_source(parts, target):
    _, tower, _, decoder, *_ = parts
    words = "--vision, --decoder and --projector"
    assert_has(refused(target, "--vision", tower, "--decoder", decoder), words)
    assert_has(refused(target, "--decoder", decoder, "--projector", "delta"), words)
    assert_has(refused(target, *parts, "--projector", "delta", decoder), words)


# ------------------------------------------------------------------ options that do not fit the model


def test_settings_of_a_projector_that_is_not_there(tmp_path, target):
    source = llama(tmp_path / "llama")
    assert_has(refused(target, "--scale-factor", "2", source), "no projector", "scale_factor")


@pytest.fixture(scope="module")
def delta(parts, tmp_path_factory) -> Path:
    """A workdir with a Delta projector of rank 16."""
    folder = tmp_path_factory.mktemp("delta") / "model"
    convert(*parts, "--projector", "delta", "--set", "initializer_range=0.1", folder)
    return folder


@pytest.mark.parametrize("settings", [["name=delta", "head_dim=16"], ["out_width=8"]])
def test_settings_that_the_weights_of_the_projector_do_not_fit(tmp_path, target, settings):
    """What is written must load again."""
    options = [word for setting in settings for word in ("--set", setting)]
    assert_has(refused(target, *options, llava_hf(tmp_path / "llava"), lines=None), "projector")


@pytest.mark.parametrize("to", ["orbax", "hf"])
def test_a_rank_that_the_weights_of_the_projector_do_not_have(delta, target, to):
    assert_has(refused(target, "--set", "rank=4", "--to", to, delta, lines=None), "projector", "(64, 16)", "(64, 4)")


def test_a_rank_that_a_trained_projector_does_not_have(delta, parts, target):
    message = refused(target, *parts, "--set", "rank=4", "--projector", delta, lines=None)
    assert_has(message, "projector", "(64, 16)", "(64, 4)")


@pytest.mark.parametrize("make", [llama, llava_hf])
def test_a_tower_for_a_model_that_names_none(tmp_path, target, make):
    """--vision is for checkpoints that only name their tower; of others it would be ignored, or no model at all."""
    message = refused(target, "--vision", clip(tmp_path / "clip"), make(tmp_path / "source"))
    assert_has(message, "--vision")


def test_a_tower_for_a_workdir(delta, tmp_path, target):
    assert_has(refused(target, "--vision", tmp_path / "nowhere", delta), "--vision")


def test_formats_that_do_not_hold_a_part_alone(tmp_path, target):
    source = llama(tmp_path / "llama")
    assert_has(refused(target, "--to", "llava", source), "--to llava", "no vision, no projector")
    file = tmp_path / "projector.safetensors"
    save_file(mlp_weights(), file)
    assert_has(refused(target, "--to", "hf", file), "--to hf", "only projector")


# ------------------------------------------------------------------ what the tower cannot give


@pytest.mark.parametrize("system", ["prumerge", "prumerge_plus", "fastervlm", "evit", "dynamicvit"])
def test_a_system_that_reads_the_cls_token_is_not_composed_with_a_siglip_tower(tmp_path, target, system):
    state = {name: value for name, value in clip_weights().items() if "class_emb" not in name and "pre_lay" not in name}
    state["vision_model.embeddings.position_embedding.weight"] = np.ones((16, 64), np.float32)
    state["vision_model.embeddings.patch_embedding.bias"] = np.ones(64, np.float32)
    siglip = CLIP | dict(model_type="siglip_vision_model", hidden_act="gelu_pytorch_tanh")
    tower = save(tmp_path / "siglip", siglip, state)
    pruned = ["--set", "prune_layers=(0,)"] if system in ("evit", "dynamicvit") else []
    parts = "--vision", tower, "--decoder", llama(tmp_path / "llama"), "--projector", system, *pruned
    assert_has(refused(target, *parts), "a siglip tower has no CLS token")


@pytest.mark.parametrize(
    ("system", "settings", "words"),
    [
        ("prumerge", "select_layer=-1", "needs queries and keys of the layer after it"),
        ("evit", "prune_layers=(1,)", "expected layers below 1"),
        ("dynamicvit", "prune_layers=(5,)", "expected layers below 1"),
    ],
)
def test_layers_that_the_tower_has_not_are_refused_when_it_is_composed(tmp_path, target, system, settings, words):
    parts = "--vision", clip(tmp_path / "clip"), "--decoder", llama(tmp_path / "llama"), "--projector", system
    assert_has(refused(target, *parts, "--set", settings), words)
    convert(*parts, *(["--set", "prune_layers=(0,)"] if "vit" in system else []), tmp_path / "made")
    assert_has(refused(target, tmp_path / "made", "--set", settings), words)


# ------------------------------------------------------------------ the destination


@pytest.mark.parametrize("to", ["orbax", "hf"])
def test_a_destination_that_exists_already_is_left_as_it_is(tmp_path, to):
    source, target = llama(tmp_path / "llama"), tmp_path / "out" / "model"
    target.mkdir(parents=True)
    (target / "precious.txt").write_text("precious")
    assert_has(refused(target, "--to", to, source), target, "already exists")
    assert (target / "precious.txt").read_text() == "precious"


def test_a_destination_that_is_a_file(tmp_path):
    source, target = llama(tmp_path / "llama"), tmp_path / "out"
    target.write_text("precious")
    assert_has(refused(target, source), target, "already exists")
    assert target.read_text() == "precious"


def test_a_destination_below_a_file(tmp_path):
    source, file = llama(tmp_path / "llama"), tmp_path / "file"
    file.write_text("precious")
    with pytest.raises(broken.KNOWN, match="file"):
        convert(source, file / "model")
    assert file.read_text() == "precious"


def test_a_destination_that_is_taken_shows_before_anything_is_read(tmp_path):
    assert_has(refused(llama(tmp_path / "llama"), tmp_path / "nothing"), "already exists")


def test_an_empty_folder_is_a_destination(tmp_path, target):
    target.mkdir(parents=True)
    convert(llama(tmp_path / "llama"), target)
    assert (target / "checkpoints").is_dir() and [path.name for path in target.parent.iterdir()] == ["model"]


def test_a_number_of_paths_that_is_not_two(tmp_path):
    source = llama(tmp_path / "llama")
    assert_has(refused(source), "a source and a destination", "1 paths")
    assert_has(refused(tmp_path / "out", source, source), "a source and a destination", "3 paths")


# ------------------------------------------------------------------ interrupted


@pytest.mark.parametrize("to", ["hf", "llava"])
def test_interrupted_after_the_first_tensor_nothing_is_left(tmp_path, target, monkeypatch, to):
    source = llava_hf(tmp_path / "llava")
    written = []
    original = shards._write_safetensors

    def interrupted(path, outs, value, bar):
        def one(out):
            if written:
                assert path.is_file() and ".model-unfinished-" in str(path)
                raise KeyboardInterrupt
            written.append(out)
            return value(out)

        original(path, outs, one, bar)

    monkeypatch.setattr(shards, "_write_safetensors", interrupted)
    target.parent.mkdir()
    with pytest.raises(KeyboardInterrupt):
        convert("--to", to, source, target)
    assert written and not list(target.parent.iterdir())
    monkeypatch.undo()
    convert("--to", to, source, target)  # the same command again


def test_interrupted_before_the_checkpoint_is_written_nothing_is_left(tmp_path, target, monkeypatch):
    source = llama(tmp_path / "llama")

    def interrupted(self, params):
        raise KeyboardInterrupt

    monkeypatch.setattr(workdir.Checkpoints, "save_params", interrupted)
    target.parent.mkdir()
    with pytest.raises(KeyboardInterrupt):
        convert(source, target)
    assert not list(target.parent.iterdir())

"""Sections of a config that may be None: the parts of a model, and the scaling of rotary embeddings."""

import argparse
import dataclasses
import json

import pytest

import train
from deltallava_jax.config import (
    Config,
    DecoderConfig,
    ModelConfig,
    RopeScaling,
    VisionConfig,
    from_dict,
    override,
    preset,
    system_config,
    to_dict,
    workdir_config,
)
from deltallava_jax.errors import ConfigError
from tests import tiny

WHOLE = tiny.get_config()
LLAMA3 = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_length=8192)
LLAMA3_TEXT = "{'factor': 8, 'low_freq_factor': 1, 'high_freq_factor': 4.0, 'original_length': 8192}"
SCALED = override(WHOLE, {"model.decoder.rope_scaling": LLAMA3_TEXT})


def assert_error(call, *words):
    with pytest.raises(ConfigError) as caught:
        call()
    message = str(caught.value)
    assert message and "\n" not in message
    for word in words:
        assert word in message, message


# ------------------------------------------------------------------ parts of a model

PARTS = [
    dict(vision=None, projector=None),
    dict(vision=None, decoder=None),
    dict(projector=None, decoder=None),
    dict(vision=None),
    dict(projector=None),
    dict(decoder=None),
    {},
]


@pytest.mark.parametrize("missing", PARTS)
def test_a_model_with_some_of_its_parts_is_json_and_back(missing):
    model = ModelConfig(**missing)
    again = from_dict(ModelConfig, json.loads(json.dumps(to_dict(model))))
    assert again == model and hash(again) == hash(model)
    assert model.whole == (not missing)
    assert all((to_dict(model)[part] is None) == (part in missing) for part in ("vision", "projector", "decoder"))
    config = dataclasses.replace(WHOLE, model=model)
    assert from_dict(Config, to_dict(config)) == config


def test_the_config_of_a_decoder_alone_is_read_back_from_its_workdir(tmp_path):
    config = Config(name="decoder", model=ModelConfig(None, None, SCALED.model.decoder))
    (tmp_path / "config.json").write_text(json.dumps(to_dict(config), indent=2))
    assert workdir_config(tmp_path) == config


def test_a_part_that_is_not_named_has_its_defaults():
    assert from_dict(ModelConfig, {}) == ModelConfig() and ModelConfig().whole
    assert from_dict(ModelConfig, {"vision": None}) == ModelConfig(vision=None)


def test_a_model_of_nothing_is_refused():
    nothing = dict(vision=None, projector=None, decoder=None)
    words = "neither vision nor projector nor decoder"
    assert_error(lambda: ModelConfig(**nothing), words)
    assert_error(lambda: override(WHOLE, {f"model.{part}": "None" for part in nothing}), words)


def test_parts_that_are_there_must_still_fit():
    tower, decoder = VisionConfig(image_size=224), DecoderConfig(width=2048)
    assert_error(lambda: ModelConfig(tower, system_config(), None), "projector.grid=24", "16x16")
    assert_error(lambda: ModelConfig(None, system_config(), decoder), "projector.out_width=4096", "2048")
    assert ModelConfig(tower, None, decoder).vision == tower


def test_parts_are_taken_away_and_given_on_the_command_line():
    decoder = override(WHOLE, {"model.vision": "None", "model.projector": "None"})
    assert decoder.model == dataclasses.replace(WHOLE.model, vision=None, projector=None)
    given = override(decoder, {"model.vision": "tiny", "model.vision.layers": "5"})
    assert given.model.vision == preset(VisionConfig, "tiny", layers=5)


@pytest.mark.parametrize(
    ("path", "word"),
    [("model.vision.layers", "vision"), ("model.projector.rank", "projector"), ("model.vision.layres", "model.vision")],
)
def test_a_setting_of_a_part_that_is_not_there_does_not_make_the_part(path, word):
    """One setting of a tower is no tower: everything else about it would be a guess."""
    decoder = override(WHOLE, {"model.vision": "None", "model.projector": "None"})
    assert_error(lambda: override(decoder, {path: "4"}), word)


@pytest.mark.parametrize("section", ["data", "optimizer", "training", "mesh", "evaluation", "model"])
def test_a_section_that_every_run_needs_cannot_be_none(section):
    assert_error(lambda: override(WHOLE, {section: "None"}), f"config key '{section}' expects", "got None")


@pytest.mark.parametrize("value", ["5", "(1, 2)", "True"])
def test_a_part_that_is_something_else(value):
    assert_error(
        lambda: override(WHOLE, {"model.vision": value}), "'model.vision' expects VisionConfig", f"got {value}"
    )


@pytest.mark.parametrize("missing", PARTS[:-1])
def test_a_model_that_is_not_whole_is_refused_for_training(tmp_path, missing):
    config = override(WHOLE, {f"model.{part}": "None" for part in missing})
    assert_error(lambda: train.main(config, argparse.Namespace(workdir=tmp_path / "run")), *missing)
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------ scaling of rotary positions


def test_rope_scaling_is_json_and_back():
    assert SCALED.model.decoder.rope_scaling == LLAMA3 and WHOLE.model.decoder.rope_scaling is None
    assert from_dict(Config, json.loads(json.dumps(to_dict(SCALED)))) == SCALED


def test_rope_scaling_is_changed_by_field_and_taken_away_again():
    changed = override(SCALED, {"model.decoder.rope_scaling.factor": "2", "model.decoder.layers": "3"})
    assert changed.model.decoder.rope_scaling == dataclasses.replace(LLAMA3, factor=2.0)
    assert changed.model.decoder.layers == 3
    both = {"model.decoder.rope_scaling": LLAMA3_TEXT, "model.decoder.rope_scaling.factor": "4"}
    assert override(WHOLE, both).model.decoder.rope_scaling == dataclasses.replace(LLAMA3, factor=4.0)
    assert override(SCALED, {"model.decoder.rope_scaling": "None"}) == WHOLE


@pytest.mark.parametrize(
    ("config", "path", "text", "words"),
    [
        (WHOLE, "rope_scaling.factor", "8", ["model.decoder.rope_scaling"]),
        (SCALED, "rope_scaling.fctor", "8", ["model.decoder.rope_scaling.fctor", "did you mean 'factor'"]),
        (SCALED, "rope_scaling.factor", "many", ["model.decoder.rope_scaling.factor", "float", "'many'"]),
        (SCALED, "rope_scaling.original_length", "8.5", ["rope_scaling.original_length", "int", "8.5"]),
        (SCALED, "rope_scaling.factor.x", "1", ["section 'model.decoder.rope_scaling.factor'"]),
        (SCALED, "rope_scaling.factor", "0.5", ["decoder.rope_scaling", "factor=0.5", "1 or more"]),
        (SCALED, "rope_scaling.low_freq_factor", "4", ["0 < low_freq_factor < high_freq_factor"]),
        (SCALED, "rope_scaling.original_length", "0", ["original_length=0"]),
        (WHOLE, "rope_scaling", "5", ["'model.decoder.rope_scaling' expects RopeScaling", "got 5"]),
        (WHOLE, "rope_scaling", "llama3", ["RopeScaling", "'llama3'"]),
        (WHOLE, "rope_scaling", "{'factr': 8}", ["model.decoder.rope_scaling.factr", "did you mean 'factor'"]),
        (WHOLE, "rope_scaling", "{'factor': 8}", ["model.decoder.rope_scaling", "low_freq_factor"]),
    ],
)
def test_a_bad_scaling_is_one_clear_line(config, path, text, words):
    assert_error(lambda: override(config, {f"model.decoder.{path}": text}), *words)


def test_a_config_json_that_lacks_a_field_without_a_default_names_it(tmp_path):
    values = to_dict(SCALED)
    del values["model"]["decoder"]["rope_scaling"]["original_length"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert_error(lambda: workdir_config(tmp_path), "rope_scaling", "original_length")

"""Every configuration in configs/ can be run: it loads, its parts fit each other, rows hold the longest image."""

from pathlib import Path

import pytest

from benchmarks.easy_vqa import PROTOCOL
from configs import easy_vqa, emoji, llava
from deltallava_jax.config import STAGES, OptimizerConfig, load_config, override, to_dict
from deltallava_jax.errors import ConfigError
from deltallava_jax.models import llavolta, systems

ROOT = Path(__file__).parents[2] / "configs"
STAGED = [
    f"{file}.py:{system}-{stage}"
    for file, table in (("emoji", emoji), ("llava", llava))
    for system in table.SYSTEMS
    for stage in STAGES
]
CONFIGURATIONS = [
    *(file.name for file in sorted(ROOT.glob("*.py"))),
    *(f"easy_vqa.py:{system}" for system in easy_vqa.SYSTEMS),
    *STAGED,
]


def test_every_file_is_here():
    assert sorted(ROOT.rglob("*.py")) == sorted(ROOT.glob("*.py"))


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_it_loads_and_its_parts_fit(name):
    cfg = load_config(ROOT / name)
    projector = cfg.model.projector
    needs = systems.needs(projector, cfg.model.vision.layers)
    assert 0 < needs.last <= cfg.model.vision.layers
    assert systems.budgets(projector)[0] < cfg.data.row_length
    llavolta.validate(cfg)


@pytest.mark.parametrize("name", STAGED)
def test_a_stage_trains_what_it_should_and_begins_where_the_one_before_ended(name):
    cfg = load_config(ROOT / name)
    file, _, which = name.partition(".py:")
    system, _, stage = which.partition("-")
    run = system if file == "llava" else f"{file}_{system}"
    assert cfg.name == f"{run}_{stage}"
    assert cfg.init_from == f"runs/{run}_{'start' if stage == 'pretrain' else 'pretrain'}"
    assert ("^decoder/" in cfg.optimizer.frozen) == (stage == "pretrain")
    assert file == "emoji" or cfg.data.rows % 8 == 0


def test_every_system_has_a_configuration():
    assert {settings["projector"]["name"] for settings in llava.SYSTEMS.values()} == set(systems.SYSTEMS)


@pytest.mark.parametrize(
    ("short", "whole"),
    [
        ("llava.py", "llava.py:delta-finetune"),
        ("llava.py:pretrain", "llava.py:delta-pretrain"),
        ("llava.py:mqt", "llava.py:mqt-finetune"),
        ("emoji.py", "emoji.py:delta-pretrain"),
        ("emoji.py:mqt", "emoji.py:mqt-finetune"),
        ("pretrain_7b.py", "llava.py:delta-pretrain"),
        ("finetune_7b.py", "llava.py:delta-finetune"),
    ],
)
def test_a_name_is_short_for_another(short, whole):
    assert load_config(ROOT / short) == load_config(ROOT / whole)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("easy_vqa.py:mqtt", "no system 'mqtt'; did you mean 'mqt'.; known: delta, .*, m3, mqt"),
        ("easy_vqa.py:pretrain", "no system 'pretrain'; .*known: delta"),
        ("easy_vqa.py:", "easy_vqa.py:' has nothing after its colon"),
        ("llava.py:mqtt-finetune", "no system 'mqtt'; did you mean 'mqt'.; known: delta, .*, random$"),
        ("llava.py:mqt-pretrian", "no stage 'pretrian'; did you mean 'pretrain'.; known: pretrain, finetune$"),
        ("llava.py:mqt-", "no stage ''; known: pretrain, finetune$"),
        ("llava.py:-pretrain", "no system ''; known: delta"),
        ("llava.py:finetun", "no system or stage 'finetun'; did you mean 'finetune'"),
        ("llava.py:", "llava.py:' has nothing after its colon"),
        ("emoji.py:third", "no system or stage 'third'; known: delta, mqt, pool, token_packer, pretrain, finetune$"),
        ("emoji.py:", "emoji.py:' has nothing after its colon"),
        ("finetune_7b.py:pretrain", "too many positional arguments"),
        # The names of version 0.1.0.
        ("systems/mqt.py", "does not exist; it is configs/easy_vqa.py:mqt now"),
        ("llava_systems/mqt.py", "does not exist; it is configs/llava.py:mqt now"),
        ("llava_systems/mqt.py:pretrain", "does not exist; it is configs/llava.py:mqt-pretrain now"),
    ],
)
def test_an_unknown_name_is_refused_with_what_there_is(name, words):
    with pytest.raises(ConfigError, match=words):
        load_config(ROOT / name)


@pytest.mark.parametrize("system, row_length", [("delta", 256), ("mlp", 512), ("m3", 256)])
def test_the_comparison_of_systems_is_trained_as_its_results_were(system, row_length):
    cfg = override(load_config(ROOT / f"easy_vqa.py:{system}"), {k: str(v) for k, v in PROTOCOL.items()})
    plain = dict(lr=4e-4, final_lr_ratio=0.02, b2=0.99, weight_decay=0.05)
    used = {key: value for key, value in to_dict(cfg.optimizer).items() if not key.startswith("muon_")}
    assert used == {k: v for k, v in to_dict(OptimizerConfig(**plain)).items() if not k.startswith("muon_")}
    assert (cfg.data.rows, cfg.data.row_length, cfg.data.images_per_row) == (4, row_length, 2)

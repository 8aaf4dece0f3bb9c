"""Every configuration in configs/ can be run: it loads, its parts fit each other, rows hold the longest image."""

from pathlib import Path

import pytest

from benchmarks.recipes.easy_vqa import PROTOCOL
from deltallava_jax.config import OptimizerConfig, load_config, override, to_dict
from deltallava_jax.errors import ConfigError
from deltallava_jax.models import llavolta, systems

ROOT = Path(__file__).parent.parent / "configs"
FILES = [file for file in sorted(ROOT.rglob("*.py")) if file.name != "llava.py"]  # the base of others
STAGES = {file: ("", ":pretrain", ":finetune") if file.parent.name == "llava_systems" else ("",) for file in FILES}


@pytest.mark.parametrize("file, stage", [(file, stage) for file in FILES for stage in STAGES[file]],
                         ids=lambda x: x.stem if isinstance(x, Path) else x)  # fmt: skip
def test_it_loads_and_its_parts_fit(file, stage):
    cfg = load_config(f"{file}{stage}")
    projector = cfg.model.projector
    needs = systems.needs(projector, cfg.model.vision.layers)
    assert 0 < needs.last <= cfg.model.vision.layers
    assert systems.budgets(projector)[0] < cfg.data.row_length
    llavolta.check(cfg)
    if file.parent.name == "llava_systems":
        assert cfg.name == f"{file.stem}{stage.replace(':', '_') or '_finetune'}"
        assert cfg.data.rows % 8 == 0
        assert ("^decoder/" in cfg.optimizer.frozen) == (stage == ":pretrain")


def test_every_system_has_a_configuration():
    of = {load_config(file).model.projector.name for file in FILES if file.parent.name == "llava_systems"}
    assert of == set(systems.SYSTEMS)


@pytest.mark.parametrize("stage, words", [("third", "stages pretrain and finetune"), ("", "stages pretrain")])
def test_an_unknown_stage_is_refused(stage, words):
    with pytest.raises(ConfigError, match=words):
        load_config(f"{ROOT / 'llava_systems' / 'delta.py'}:{stage}")


def test_a_stage_of_a_configuration_without_any_is_refused():
    with pytest.raises(ConfigError, match="too many positional arguments"):
        load_config(f"{ROOT / 'easy_vqa.py'}:pretrain")


@pytest.mark.parametrize("system, row_length", [("delta", 256), ("mlp", 512), ("m3", 256)])
def test_the_comparison_of_systems_is_trained_as_its_results_were(system, row_length):
    cfg = override(load_config(ROOT / "systems" / f"{system}.py"), {k: str(v) for k, v in PROTOCOL.items()})
    plain = dict(lr=4e-4, final_lr_ratio=0.02, b2=0.99, weight_decay=0.05)
    used = {key: value for key, value in to_dict(cfg.optimizer).items() if not key.startswith("muon_")}
    assert used == {k: v for k, v in to_dict(OptimizerConfig(**plain)).items() if not k.startswith("muon_")}
    assert (cfg.data.rows, cfg.data.row_length, cfg.data.images_per_row) == (4, row_length, 2)

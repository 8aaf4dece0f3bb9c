"""A system outside of the package supports what ours do: settings, training, counts, heat maps, exports."""

import ast
import dataclasses
import importlib.util
import re
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import deltallava_jax
from deltallava_jax.analysis import efficiency, gradcam
from deltallava_jax.config import SYSTEMS, from_dict, override, register, system_config, to_dict
from deltallava_jax.config.systems import ProjectorConfig
from deltallava_jax.convert.export import projector_code
from deltallava_jax.errors import ConfigError
from deltallava_jax.models import systems, vision, vlm
from deltallava_jax.sequence import Batch
from tests import golden, tiny
from tests.models.own_system import Corners, CornersConfig

SMALL = dict(grid=8, in_width=32, out_width=48)


def guide() -> list[str]:
    """The code of docs/new_system.md, by blocks."""
    text = (Path(__file__).parents[2] / "docs" / "new_system.md").read_text()
    return re.findall(r"```python\n(.*?)```", text, flags=re.S)


@pytest.fixture(autouse=True)
def registered():
    """Registered as in the guide, for the tests of this file."""
    exec(guide()[2], {"Corners": Corners})
    yield
    del SYSTEMS["corners"]


def test_settings_by_name_from_the_command_line_and_from_json():
    cfg = override(tiny.get_config(), {"model.projector.name": "corners"}).model.projector
    assert isinstance(cfg, CornersConfig) and cfg == from_dict(ProjectorConfig, to_dict(cfg))
    with pytest.raises(ConfigError, match="did you mean 'corners'"):
        system_config("corner")
    with pytest.raises(ConfigError, match="it is a setting of mqt, resampler"):
        system_config("corners", queries=4)
    register("corners", Corners)  # again, as a file does that is imported twice
    with pytest.raises(ConfigError, match="the system 'mlp' already exists"):
        register("mlp", Corners)


def test_tokens_weights_and_places():
    cfg, plain = (system_config(name, **SMALL) for name in ("corners", "mlp"))
    assert systems.budgets(cfg) == (4,) and systems.budgets(systems.at(cfg, 16)) == (16,)
    with pytest.raises(ConfigError, match="corners does not make 5 tokens of 64 patches"):
        systems.at(cfg, 5)
    params = systems.from_torch(golden.projector_state(plain), cfg)
    features = golden.features(cfg)
    every = systems.project(params, plain, features)
    np.testing.assert_allclose(systems.project(params, cfg, features), every[:, [0, 4, 32, 36]], atol=1e-5)
    places = systems.places(params, cfg, features, 4)
    assert (places.side, places.cells.tolist()) == (2, [[0, 1, 2, 3]] * 2)


def test_it_trains_is_counted_and_has_a_heat_map():
    cfg = override(tiny.get_config(), {"model.projector.name": "corners"}).model
    params = tiny.random_params(cfg)
    batch = Batch(
        tokens=np.arange(12, dtype=np.int32)[None], loss_mask=np.ones((1, 12), bool),
        segments=np.ones((1, 12), np.int32), image_positions=np.array([[1]], np.int32),
        images=np.random.default_rng(0).integers(0, 256, (1, 1, 64, 64, 3)).astype(np.uint8),
    )  # fmt: skip
    gradients = jax.jit(jax.grad(lambda p: vlm.loss(p, cfg, batch, jax.random.key(0))))(params)
    assert all(np.any(gradient) for gradient in jax.tree.leaves(gradients["projector"]))
    (paper, exact) = efficiency.rows(efficiency.with_system(cfg, "corners"), 16, 9, 2)
    assert paper["system"] == "corners" and exact["projector_tflops"] > 0 and "corners" in efficiency.system_names()
    gradcam.require_places(cfg)


def test_its_torch_code_makes_the_same_tokens():
    torch = pytest.importorskip("torch")
    from deltallava_jax.convert.export import TORCH_MODULES

    cfg = system_config("corners", **SMALL, scale_factor=(2, 4))
    sys.modules["own"] = importlib.util.module_from_spec(importlib.util.spec_from_loader("own", None, is_package=True))
    sys.modules["own"].__path__ = [str(TORCH_MODULES), str(projector_code(cfg).parent)]
    module = importlib.import_module("own.projector_corners").Projector(to_dict(cfg)).eval()
    state = golden.projector_state(cfg)
    module.load_state_dict({name: torch.from_numpy(value.copy()) for name, value in state.items()})
    features = golden.features(cfg)
    parts = importlib.import_module("own.projector_parts")
    for budget in systems.budgets(cfg):
        with torch.no_grad():
            theirs = module(parts.Features(torch.from_numpy(features.last.copy())), budget)
        ours = systems.project(systems.from_torch(state, cfg), cfg, features, budget=budget)
        np.testing.assert_allclose(theirs, ours, atol=2e-5)


# ------------------------------------------------------------------ the controls


def test_random_keeps_the_places_of_its_seed_and_others_while_training():
    cfg, plain = (system_config(name, **SMALL) for name in ("random", "mlp"))
    params = systems.from_torch(golden.projector_state(plain), cfg)
    features = golden.features(cfg)
    every = np.asarray(systems.project(params, plain, features))
    order = np.random.RandomState(0).permutation(64)
    for budget in systems.budgets(cfg):
        found = systems.project(params, cfg, features, budget=budget)
        np.testing.assert_allclose(found, every[:, np.sort(order[:budget])], atol=1e-6)
        np.testing.assert_array_equal(systems.places(params, cfg, features, budget).cells[1], np.sort(order[:budget]))
    other = dataclasses.replace(cfg, seed=1)
    one, two = (systems.project(params, each, features, budget=16) for each in (cfg, other))
    assert not np.allclose(one, two)
    drawn = [np.asarray(systems.project(params, cfg, features, budget=16, key=jax.random.key(k))) for k in (0, 0, 1)]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    for image in range(2):
        places = [int(np.abs(every[image] - token).sum(1).argmin()) for token in drawn[0][image]]
        assert len(set(places)) == 16 and places == sorted(places)
    assert not np.allclose(drawn[0], drawn[2]) and not np.allclose(drawn[0][0], drawn[0][1])


def test_average_pooling_is_the_mlp_of_each_cells_mean():
    cfg, plain = system_config("average_pooling", **SMALL, scale_factor=4), system_config("mlp", **SMALL)
    params = systems.from_torch(golden.projector_state(plain), cfg)
    features = golden.features(cfg)
    cells = features.last.reshape(2, 2, 4, 2, 4, 32).mean((2, 4)).reshape(2, 4, 32)
    one = system_config("mlp", **SMALL | dict(grid=2))
    expected = systems.project(params, one, vision.VisionFeatures(cells, grid=(2, 2)))
    np.testing.assert_allclose(systems.project(params, cfg, features), expected, atol=1e-5)


def test_only_a_systems_own_files_name_it():
    """A system is a file and a line: no other code of the package names it."""
    root = Path(deltallava_jax.__file__).parent
    allowed = {
        "config/systems.py": set(SYSTEMS),
        "analysis/efficiency.py": {"mlp"},  # FastV runs on the MLP's model
        "analysis/efficiency_command.py": {"mlp", "delta"},  # counted by default
        "apps/serve.py": {"delta"},  # a field of the protocol
        "models/decoder.py": {"mlp"},  # a scope's name
        "models/vision.py": {"mlp"},
    }
    found = []
    for file in sorted(root.rglob("*.py")):
        place = file.relative_to(root).as_posix()
        if place.startswith(("models/systems/", "convert/torch_modules/projector_")):
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Constant) and node.value in set(SYSTEMS) - allowed.get(place, set()):
                found.append(f"{place}:{node.lineno} {node.value}")
    assert found == []


def test_the_guides_code_is_the_systems():
    blocks = guide()
    package = Path(deltallava_jax.__file__).parent
    assert blocks[0].strip() in (package / "models" / "systems" / "average_pooling.py").read_text()
    assert blocks[1].strip() in (package / "config" / "systems.py").read_text()

"""Token selection against the original code's outputs: the same positions, in the same order, and the same tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deltallava_jax.config import VisionConfig, system_config
from deltallava_jax.errors import ConfigError
from deltallava_jax.models import systems, vision
from deltallava_jax.models.systems import fastervlm, prumerge
from deltallava_jax.models.vision import VisionFeatures
from tests import golden

RATIOS = {"s06": 0.0, "s10": 0.0, "s15": 0.0, "fixed8_b2": 1 / 8, "fixed4_b2": 1 / 4}


def inputs(name, case):
    """(features, CLS attention, keys) of a golden case."""
    info = golden.read_json(f"{name}_info")[case]
    q, k, x = (golden.inputs(tensor, (info["B"], 577, 64)) for tensor in info["input_names"])
    q = q * np.float32(info["scale"])
    scores = np.einsum("nd,nkd->nk", q[:, 0], k) * 64**-0.5
    attention = np.asarray(jax.nn.softmax(scores, axis=-1))[:, 1:]
    return x[:, 1:], attention, k[:, 1:]


@pytest.mark.parametrize("case", RATIOS)
@pytest.mark.parametrize("name", ["prumerge", "prumerge_plus"])
def test_prumerge_golden(name, case):
    x, attention, keys = inputs(name, case)
    expected = golden.outputs(name)
    positions, count = prumerge.candidates(attention, RATIOS[case], plus=name == "prumerge_plus", duplicates=True)
    kept = expected[f"{case}_idx"]
    assert (count == kept.shape[1]).all()
    np.testing.assert_array_equal(positions[:, : kept.shape[1]], kept)
    np.testing.assert_array_equal(np.sort(positions[:, kept.shape[1] :], 1), np.sort(expected[f"{case}_compl"], 1))
    tokens, valid = prumerge.merge(x, attention, keys, positions, count, cap=kept.shape[1])
    assert valid.all()
    np.testing.assert_allclose(tokens, expected[f"{case}_y"], atol=1e-5)


@pytest.mark.parametrize("case", ["fixed8_b2", "fixed4_b2"])
def test_by_default_the_comb_doubles_and_loses_no_position(case):
    x, attention, keys = inputs("prumerge_plus", case)
    positions, count = prumerge.candidates(attention, RATIOS[case], plus=True)
    original = golden.outputs("prumerge_plus")[f"{case}_idx"]
    for row in range(len(x)):
        kept = positions[row, : count[row]].tolist()
        assert len(set(kept)) == len(kept) and set(kept) == set(original[row].tolist())
        assert sorted(positions[row].tolist()) == list(range(576))


def test_the_padding_up_to_the_cap_changes_nothing():
    x, attention, keys = inputs("prumerge", "s10")
    positions, count = prumerge.candidates(attention, 0.0)
    exact, _ = prumerge.merge(x, attention, keys, positions, count, cap=50)
    padded, valid = prumerge.merge(x, attention, keys, positions, count, cap=80)
    assert valid[0].tolist() == [True] * 50 + [False] * 30 + [True]
    np.testing.assert_allclose(padded[valid], exact[0], atol=1e-6)
    cut, valid = prumerge.merge(x, attention, keys, positions, count, cap=20)  # the most attended alone
    assert valid.all()
    np.testing.assert_allclose(cut[:, :20], exact[:, :20], atol=1e-6)


@pytest.mark.parametrize("count", [144, 64, 36, 16, 4, 1])
def test_fastervlm_golden(count):
    logits = golden.inputs("fastervlm_cls_logits", (2, 16, 577)) * np.float32(2)
    attention = np.asarray(jax.nn.softmax(logits, axis=-1))[..., 1:].mean(1)
    expected = golden.outputs("fastervlm")
    np.testing.assert_allclose(attention, expected["mean_cls_attn"], rtol=1e-5)
    np.testing.assert_array_equal(fastervlm.select(attention, count), expected[f"kept_T{count}"])


# ------------------------------------------------------------------ as systems, behind a tower

TOWER = VisionConfig(image_size=64, patch_size=8, width=32, layers=3, heads=2, mlp_width=64)
CFG = dict(grid=8, in_width=32, out_width=24)


def features(cfg, tower=TOWER):
    params = vision.init_params(tower, jax.random.key(0))
    images = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3)).astype(np.uint8)
    return vision.encode(params, tower, images, systems.needs(cfg, tower.layers))


def mlp_tokens(params, x):
    grid = VisionFeatures(last=x, grid=(8, 8))
    return systems.project(params, system_config(name="mlp", **CFG), grid)


@pytest.mark.parametrize("name", ["fastervlm", "prumerge", "prumerge_plus"])
def test_any_mlp_works_with_them(name):
    cfg = system_config(name=name, **CFG)
    plain = system_config(name="mlp", **CFG)
    params = systems.init_params(plain, jax.random.key(0))
    assert systems.to_torch(params, cfg).keys() == systems.to_torch(params, plain).keys()
    found = features(cfg)
    for budget in systems.budgets(cfg):
        tokens, valid = systems.project_valid(params, cfg, found, budget=budget)
        assert tokens.shape == (2, budget, 24) and np.isfinite(tokens).all()
        assert valid is None or (valid.shape == (2, budget) and valid[:, -1].all())


def test_fastervlm_keeping_all_is_the_plain_model():
    cfg = system_config(name="fastervlm", tokens=(64, 5), **CFG)
    params = systems.init_params(cfg, jax.random.key(0))
    found = features(cfg)
    everything = mlp_tokens(params, found.last)
    np.testing.assert_allclose(systems.project(params, cfg, found, budget=64), everything, atol=1e-6)
    five = systems.project(params, cfg, found, budget=5)
    best = np.sort(np.argsort(-np.asarray(found.cls_attention), axis=1)[:, :5], axis=1)
    np.testing.assert_allclose(five, jnp.take_along_axis(everything, best[..., None], axis=1), atol=1e-6)


def test_a_tower_without_cls_and_settings_that_cannot_work_are_refused():
    siglip = VisionConfig(family="siglip", image_size=64, patch_size=8, width=32, layers=3, heads=2, mlp_width=64)
    with pytest.raises(ConfigError, match="a siglip tower has no CLS token"):
        features(system_config(name="fastervlm", **CFG), siglip)
    with pytest.raises(ConfigError, match="PruMerge needs queries and keys of the layer after it"):
        systems.needs(system_config(name="prumerge", select_layer=-1, **CFG), 3)
    with pytest.raises(ConfigError, match="prumerge keeps 1 to 63 patches"):
        systems.budgets(system_config(name="prumerge", keep_ratio=0.0, tokens=(65,), **CFG))
    with pytest.raises(ConfigError, match="fastervlm keeps 1 to 64 patches"):
        systems.budgets(system_config(name="fastervlm", tokens=(65,), **CFG))

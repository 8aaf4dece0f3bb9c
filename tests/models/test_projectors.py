"""Projectors against the original code's outputs; weight conversion; budgets; other towers; stochastic depth."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from deltallava_jax import config
from deltallava_jax.config import DecoderConfig, VisionConfig, compose, preset, system_config
from deltallava_jax.errors import ConfigError, WeightMismatch
from deltallava_jax.models import systems, vision
from deltallava_jax.models.systems.delta import ABLATIONS, split_channels
from deltallava_jax.models.vision import Needs, VisionFeatures
from tests import golden

SMALL = dict(grid=8, in_width=64, out_width=24, mlp_width=40, head_dim=32, block_head_dim=16, rank=4, level_count=2)
RELEASE = system_config(out_width=64)  # the golden data's sizes, at scale factor 2


@functools.partial(jax.jit, static_argnames=("cfg", "budget"))
def project(params, cfg, features, budget=None, key=None):
    return systems.project(params, cfg, features, budget=budget, key=key)


def assert_same_bits(found, expected):
    """Equal names, types, shapes and bytes of two dicts of arrays."""
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert (value.dtype, value.shape) == (expected[name].dtype, expected[name].shape), name
        assert np.asarray(value).tobytes() == np.asarray(expected[name]).tobytes(), name


# ------------------------------------------------------------------ the original code's outputs


@pytest.fixture(scope="module")
def release_state():
    return golden.state_dict("delta")


@pytest.fixture(scope="module")
def release_features():
    return golden.features(RELEASE)


@pytest.fixture(scope="module")
def release_params(release_state):
    return systems.from_torch(release_state, RELEASE)


def test_formula():
    for check in golden.read_json("formula_check")["checks"]:
        draw = golden.param if check["kind"] == "param" else golden.inputs
        values = draw(check["name"], check["shape"])
        np.testing.assert_array_equal(values.flat[:3], np.float32(check["first3"]), err_msg=check["name"])
        assert values.flat[-1] == np.float32(check["last"]), check["name"]
        np.testing.assert_allclose(values.sum(dtype=np.float64), check["sum_float64"], rtol=1e-9)


@pytest.mark.parametrize("scale_factor", [1, 2, 3, 4, 6, 12, 24])
def test_delta_golden(scale_factor, release_params, release_features):
    cfg = dataclasses.replace(RELEASE, scale_factor=scale_factor)
    expected = golden.outputs("delta")[f"y_s{scale_factor}"]
    np.testing.assert_allclose(project(release_params, cfg, release_features), expected, atol=1e-4)


@pytest.mark.parametrize(
    "key, ablation", [("full", "none"), ("no_emhsa", "no_emhsa"), ("no_delta", "no_delta"), ("no_ntb", "no_tb")]
)
def test_ablation_golden(key, ablation, release_state, release_features):
    cfg = dataclasses.replace(RELEASE, ablation=ablation)
    params = systems.from_torch(release_state, cfg)  # ablated parts are left out
    expected = golden.outputs("next_delta_ablation")
    found = project(params, cfg, release_features)
    np.testing.assert_allclose(found, expected[f"y_{key}"], atol=1e-4)
    assert key == "full" or np.abs(found - expected["y_full"]).max() > 0.1


def test_mlp_golden(release_features):
    cfg = system_config("mlp", out_width=64)
    state = golden.state_dict("mlp2x_gelu")
    params = systems.from_torch(state, cfg)
    np.testing.assert_allclose(project(params, cfg, release_features), golden.outputs("mlp2x_gelu")["y"], atol=1e-4)
    assert_same_bits(systems.to_torch(params, cfg), state)


# ------------------------------------------------------------------ weights


def test_release_round_trip(release_state, release_params):
    assert_same_bits(systems.to_torch(release_params, RELEASE), release_state)


@pytest.mark.parametrize("ablation", ABLATIONS)
@pytest.mark.parametrize("variant", ["release", "paper"])
def test_round_trip_is_exact_both_ways(variant, ablation):
    cfg = system_config(**SMALL, variant=variant, ablation=ablation)
    state = golden.projector_state(cfg)
    params = systems.from_torch(state, cfg)
    assert jax.tree.map(np.shape, params) == jax.tree.map(lambda leaf: leaf.shape, golden.projector_shapes(cfg))
    assert_same_bits(systems.to_torch(params, cfg), state)
    again = systems.from_torch(systems.to_torch(params, cfg), cfg)
    jax.tree.map(np.testing.assert_array_equal, again, params)

    full = golden.projector_state(dataclasses.replace(cfg, ablation="none"))
    assert ablation == "none" or state.keys() < full.keys()
    gone = {
        "none": (),
        "no_emhsa": ("mhsa",),  # and the norms before it, norm_mhsa
        "no_delta": (".U", ".V"),
        "no_tb": ("combined_block",),
    }[ablation]
    assert full.keys() - state.keys() == {name for name in full if any(part in name for part in gone)}


def test_mismatch_lists_missing_unexpected_and_wrongly_shaped_names():
    cfg = system_config(**SMALL)
    state = golden.projector_state(cfg)
    del state["mlp.0.weight"]
    state["k_proj_1.V"] = state["k_proj_1.V"].T
    state["combined_block.ntb.patch_embed.conv.weight"] = np.zeros((48, 64), np.float32)
    state["vision_tower.bias"] = np.zeros(3, np.float32)
    with pytest.raises(WeightMismatch) as caught:
        systems.from_torch(state, cfg)
    lines = [line.split() for line in str(caught.value).splitlines()[1:]]
    assert sorted(line[:2] for line in lines) == [
        ["missing", "mlp.0.weight"],
        ["shape", "combined_block.ntb.patch_embed.conv.weight"],
        ["shape", "k_proj_1.V"],
        ["unexpected", "vision_tower.bias"],
    ]
    assert "k_proj_1.V  is (64, 4), expected (4, 64)" in str(caught.value)
    assert "patch_embed.conv.weight  is (48, 64), expected (48, 64, 1, 1)" in str(caught.value)


def test_fresh_weights_follow_the_release():
    cfg = system_config(**SMALL)
    init = jax.jit(lambda key: systems.init_params(cfg, key))
    state = systems.to_torch(init(jax.random.key(0, impl="rbg")), cfg)  # compiles in a fraction of the time
    for name in ("k_proj_1.shared_weight.weight", "clip_attn.out_proj.weight", "mlp.0.weight"):
        assert np.isclose(state[name].std(), 0.02, rtol=0.1), name  # trunc-normal
    bounds = {  # uniform: Xavier, or torch's default for convolutions
        "k_proj_1.U": (6 / (128 + 4)) ** 0.5,
        "k_proj_1.V": (6 / (4 + 64)) ** 0.5,
        "clip_attn.in_proj_weight": (6 / (64 + 3 * 64)) ** 0.5,
        "combined_block.ntb.patch_embed.conv.weight": 64**-0.5,
        "combined_block.ntb.mhca.group_conv3x3.weight": (9 * 16) ** -0.5,
    }
    for name, bound in bounds.items():
        assert 0.95 * bound < np.abs(state[name]).max() <= bound * (1 + 1e-6), name
    for name in ("clip_attn.in_proj_bias", "mlp.2.bias", "combined_block.ntb.e_mhsa.q.bias", "q_proj_1.norm.bias"):
        assert not state[name].any(), name
    assert (state["q_proj_1.norm.weight"] == 1).all()


# ------------------------------------------------------------------ budgets


@pytest.mark.parametrize("variant", ["release", "paper"])
def test_elastic_equals_each_fixed_scale_factor(variant):
    elastic = system_config(**SMALL, variant=variant, scale_factor=(8, 2))
    assert systems.budgets(elastic) == (16, 1)
    state, features = golden.projector_state(elastic), golden.features(elastic)
    params = systems.from_torch(state, elastic)
    fixed = {budget: dataclasses.replace(elastic, scale_factor=s) for budget, s in ((16, 2), (1, 8))}
    for budget, cfg in fixed.items():
        assert systems.budgets(cfg) == (budget,)
        assert_same_bits(golden.projector_state(cfg), state)

    @jax.jit
    def run(params, features):
        chosen = {budget: systems.project(params, elastic, features, budget=budget) for budget in fixed}
        return chosen, {budget: systems.project(params, cfg, features) for budget, cfg in fixed.items()}

    chosen, expected = run(params, features)
    for budget in fixed:
        assert chosen[budget].shape == (2, budget, 24)
        np.testing.assert_allclose(chosen[budget], expected[budget], atol=1e-6)
    assert systems.check_budget(elastic, None) == 16


@pytest.mark.parametrize(
    "cfg, message",
    [
        (system_config(**SMALL, scale_factor=(2, 4, 8)), "delta makes 16, 4, 1 tokens an image, not 64"),
        (system_config(**SMALL, scale_factor=2), "delta makes 16 tokens an image, not 64"),
        (system_config("mlp", grid=6, in_width=64, out_width=24), "mlp makes 36 tokens an image, not 64"),
    ],
)
def test_a_wrong_budget_is_refused_with_the_allowed_ones(cfg, message):
    with pytest.raises(ConfigError, match=message):
        systems.project({}, cfg, golden.features(cfg), budget=64)


def test_features_of_another_grid_or_width_are_refused():
    cfg = system_config(**SMALL)
    for other in (dict(grid=4), dict(in_width=128)):
        with pytest.raises(ValueError, match="the projector expects \\(8, 8\\) and 64"):
            systems.project({}, cfg, golden.features(dataclasses.replace(cfg, **other)))


def test_an_unknown_systems_error_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'delta'"):
        config.system("delt")


# ------------------------------------------------------------------ towers


@pytest.mark.parametrize(
    "tower, scale_factor, expected_needs, tokens, attended",
    [
        ("clip_l_14_336", 2, Needs(last=23, levels=(12, 16, 22, 23)), 144, 768),
        ("clip_l_14_224", 2, Needs(last=23, levels=(12, 16, 22, 23)), 64, 768),
        ("siglip_so400m_14_384", 3, Needs(last=26, levels=(14, 18, 25, 26)), 81, 864),
    ],
)
def test_towers_of_other_sizes(tower, scale_factor, expected_needs, tokens, attended):
    """Tower and projector at their real sizes, as shapes."""
    model = compose(preset(VisionConfig, tower), DecoderConfig(), dict(scale_factor=scale_factor))
    cfg, tower = model.projector, model.vision
    assert systems.needs(cfg, tower.layers) == expected_needs
    assert split_channels(cfg) == (attended, cfg.width - attended)
    assert systems.budgets(cfg) == (tokens,)

    def run(key, images):
        features = vision.encode(vision.init_params(tower, key), tower, images, expected_needs)
        return features, systems.project(systems.init_params(cfg, key), cfg, features)

    images = jax.ShapeDtypeStruct((2, tower.image_size, tower.image_size, 3), np.uint8)
    features, visual = jax.eval_shape(run, jax.random.key(0), images)
    assert features.levels.shape == (2, cfg.grid**2, 4 * tower.width)
    assert visual.shape == (2, tokens, 4096)


def test_levels_can_be_chosen():
    cfg = system_config(select_layer=-1, levels=(6, 12, 18, 24))
    assert systems.needs(cfg, 24) == Needs(last=24, levels=(6, 12, 18, 24))
    assert systems.needs(system_config(name="mlp"), 24) == Needs(last=23)


def test_siglips_channels():
    """1152 channels: 9 heads of 128 in the windows; 27 + 9 heads of 32 in the block, 864 + 288 channels."""
    cfg = system_config(grid=27, scale_factor=3, in_width=1152, out_width=64)
    shapes = golden.projector_shapes(cfg)
    assert shapes["block"]["reduce"]["kernel"].shape == (1152, 864)
    assert shapes["block"]["branch"]["kernel"].shape == (864, 288)
    assert shapes["block"]["convolution"]["kernel"].shape == (3, 3, 32, 288)
    assert shapes["k"]["base"].shape == (4608, 1152)
    assert cfg.width // cfg.head_dim == 9


# ------------------------------------------------------------------ stochastic depth

BRANCHES = {  # the weights that close each residual branch, and the share of the drop rate that falls to it
    "attention": (("e_mhsa.proj.weight", "e_mhsa.proj.bias"), 0.75),
    "convolution": (("mhca.projection.weight",), 0.25),
    "mlp": (("mlp.conv2.weight", "mlp.conv2.bias"), 1.0),
}


@pytest.fixture(scope="module")
def dropping():
    """cfg with a drop rate of 0.4 at most, its weights, and one image's features, repeated a thousand times."""
    cfg, n = system_config(**{**SMALL, "grid": 2}, drop_path=0.4), 1000
    one = golden.features(cfg, n=1)
    features = VisionFeatures(one.last.repeat(n, 0), one.levels.repeat(n, 0), grid=one.grid)
    return cfg, golden.projector_state(cfg), features


def test_stochastic_depth_drops_whole_branches_of_single_samples_at_scaled_rates(dropping):
    """With the other two branches silenced, a sample's tokens are those without the branch, or with it scaled up."""
    cfg, state, features = dropping

    def run(key=None, **scales):
        """Tokens where the branches' outputs are scaled, 0 for those not named."""
        scaled = dict(state)
        for branch, (names, _) in BRANCHES.items():
            for name in (f"combined_block.ntb.{name}" for name in names):
                scaled[name] = state[name] * np.float32(scales.get(branch, 0))
        return np.asarray(project(systems.from_torch(scaled, cfg), cfg, features, key=key))

    without = run()
    for branch, (_, share) in BRANCHES.items():
        p = cfg.drop_path * share
        kept, drawn = run(**{branch: 1 / (1 - p)}), run(jax.random.key(1), **{branch: 1})
        is_without, is_kept = (np.abs(drawn - other).max((1, 2)) < 1e-4 for other in (without, kept))
        assert (is_without ^ is_kept).all(), branch
        assert abs(is_without.mean() - p) < 0.05, (branch, is_without.mean(), p)


def test_only_a_key_switches_stochastic_depth_on(dropping):
    cfg, state, features = dropping
    params = systems.from_torch(state, cfg)
    plain = np.asarray(project(params, cfg, features))
    np.testing.assert_allclose(plain, plain[:1].repeat(len(plain), 0), atol=1e-5)
    first, second = (np.asarray(project(params, cfg, features, key=jax.random.key(seed))) for seed in (1, 2))
    np.testing.assert_array_equal(first, project(params, cfg, features, key=jax.random.key(1)))
    assert np.abs(first - plain).max() > 0.1 and np.abs(first - second).max() > 0.1

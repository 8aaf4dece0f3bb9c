"""Every other system of the paper against the original code's outputs (tests/testdata), and checks for every system."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deltallava_jax.config import VisionConfig, settings_of, system_config
from deltallava_jax.errors import ConfigError
from deltallava_jax.models import systems, vision
from deltallava_jax.models.systems import common, honeybee_d
from deltallava_jax.models.vision import VisionFeatures
from tests import golden

SMALL = dict(grid=8, in_width=32, out_width=48, mlp_width=40, head_dim=16, block_head_dim=16, rank=4, level_count=2,
             scale_factor=2, queries=16, text_width=12, depth=1)  # fmt: skip


def assert_same_bits(found, expected):
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert value.tobytes() == np.asarray(expected[name], np.float32).tobytes(), name


def check(state, cfg, expected, *, budget=None, features=None, text=None, atol=1e-4):
    """The system's output equals the original's, and its weights round-trip to the bit."""
    params = systems.from_torch(state, cfg)
    assert_same_bits(systems.to_torch(params, cfg), state)
    run = jax.jit(functools.partial(systems.project, cfg=cfg, budget=budget))
    found = run(params, features=features or release_features(), text=text)
    np.testing.assert_allclose(found, expected, atol=atol)


@functools.cache
def release_features():
    return golden.features(system_config(out_width=64))


@pytest.mark.parametrize("scale_factor", [1, 2, 4, 24])
def test_token_packer(scale_factor):
    cfg = system_config(name="token_packer", out_width=64, scale_factor=scale_factor)
    check(golden.state_dict("tokenpacker"), cfg, golden.outputs("tokenpacker")[f"y_s{scale_factor}"])


@pytest.mark.parametrize("tokens", [1, 9, 36, 144, 576])
def test_m3_makes_every_scale_from_one_set_of_weights(tokens):
    cfg = system_config(name="m3", out_width=64, scale_factor=(1, 2, 4, 8, 24))
    assert systems.budgets(cfg) == (576, 144, 36, 9, 1)
    check(golden.state_dict("m3"), cfg, golden.outputs("m3")[f"y_m{tokens}"], budget=tokens)


@pytest.mark.parametrize("tokens", [1, 16, 64, 256])
def test_mqt_returns_its_first_queries(tokens):
    cfg = system_config(name="mqt", out_width=64)
    state = golden.state_dict("mqt") | {"pos_embed": np.asarray(common.half_table(16, 1024))}
    expected = golden.outputs("mqt")
    np.testing.assert_array_equal(state["pos_embed"][[0, 1, 17, 255]], expected["pos_embed_fp16_rows_0_1_17_255"])
    check(state, cfg, expected[f"y_m{tokens}"], budget=tokens)


@pytest.mark.parametrize("scale_factor", [2, 4, 24])
def test_quecc(scale_factor):
    cfg = system_config(name="quecc", out_width=64, scale_factor=scale_factor, text_width=4096)
    shapes = golden.read_json("quecc_state_dict") | {"0.q_downsample.weight": [1024, 1, scale_factor, scale_factor]}
    state = {name: golden.param(name, shape) for name, shape in shapes.items()}
    text = golden.inputs("text", (2, 1, 4096))[:, 0]
    check(state, cfg, golden.outputs("quecc")[f"y_s{scale_factor}"], text=text)


@pytest.mark.parametrize("patches", [16, 64, 256, 576])
def test_resampler(patches):
    grid, expected = round(patches**0.5), golden.outputs("qwen_resampler")
    cfg = system_config(name="resampler", grid=grid, in_width=96, out_width=64, queries=64, head_dim=16)
    features = VisionFeatures(last=golden.inputs(f"x_kv{patches}", (2, patches, 96)), grid=(grid, grid))
    state = golden.state_dict("qwen_resampler") | {"pos_embed": expected["pos_embed"]}
    fresh = systems.init_params(cfg, jax.random.key(0))["position"]
    np.testing.assert_allclose(fresh, expected["pos_embed"], atol=1e-6)
    check(state, cfg, expected[f"y_N{patches}"], features=features, atol=1e-5)


@pytest.mark.parametrize("scale_factor, tokens", [(2, 144), (3, 64)])
def test_honeybee_c(scale_factor, tokens):
    cfg = system_config(name="honeybee_c", out_width=64, scale_factor=scale_factor)
    check(golden.state_dict("honeybee_cabs"), cfg, golden.outputs("honeybee_cabs")[f"y_M{tokens}"])


@pytest.mark.parametrize("scale_factor, tokens, depth", [(2, 144, 2), (3, 64, 2), (2, 144, 6)])
def test_honeybee_d(scale_factor, tokens, depth):
    cfg = system_config(name="honeybee_d", out_width=64, scale_factor=scale_factor, depth=depth)
    expected, shapes = golden.outputs("honeybee_dabs"), golden.read_json("honeybee_dabs_state_dict")
    shapes["query_position_embeddings.weight"] = [tokens, 1024]
    state = {
        name: golden.param(name, shape)
        for name, shape in shapes.items()
        if not name.startswith("layers.") or int(name.split(".")[1]) < depth
    }
    state["reference_points"] = expected[f"reference_points_M{tokens}"]
    points = honeybee_d.reference_points(24 // scale_factor, 24)
    np.testing.assert_allclose(points, state["reference_points"][0], atol=1e-6)
    check(state, cfg, expected[f"y_M{tokens}_L{depth}"], atol=5e-4 if depth == 6 else 1e-4)


# ------------------------------------------------------------------ every system


def small(name, **changes):
    return system_config(name, **settings_of(name, SMALL) | changes)


@pytest.mark.parametrize("name", systems.SYSTEMS)
def test_a_wrong_budget_is_refused_with_the_allowed_ones(name):
    cfg = small(name)
    allowed = ", ".join(map(str, systems.budgets(cfg)))
    with pytest.raises(ConfigError, match=f"{name} makes {allowed} tokens an image, not 7"):
        systems.check_budget(cfg, 7)


# The others prune the tower: test_tower_pruning.py.
@pytest.mark.parametrize("name", [name for name in systems.SYSTEMS if not systems.needs(small(name), 24).pruned])
def test_fresh_parameters_make_every_budget_and_every_one_gets_a_gradient(name):
    """Gradients of features in bfloat16, which are themselves not rounded to it."""
    cfg = small(name)
    params = systems.init_params(cfg, jax.random.key(0))
    features, text = golden.features(cfg), golden.inputs("text", (2, SMALL["text_width"]))

    def loss(params, budget):
        parts = {part: getattr(features, part) for part in ("last", "levels", "keys")}
        half = {part: None if x is None else jnp.asarray(x, jnp.bfloat16) for part, x in parts.items()}
        half = dataclasses.replace(features, **half)
        return (systems.project(params, cfg, half, text, budget=budget).astype(jnp.float32) ** 2).sum()

    project = jax.jit(functools.partial(systems.project, cfg=cfg), static_argnames="budget")
    for budget in systems.budgets(cfg):
        tokens = project(params, features=features, text=text, budget=budget)
        assert tokens.shape == (2, budget, 48) and np.isfinite(tokens).all() and np.std(tokens) > 0
    gradients = systems.names.flatten(jax.jit(jax.grad(loss), static_argnums=1)(params, systems.budgets(cfg)[0]))
    fixed = {"mqt": "position", "resampler": "position", "honeybee_d": "points"}.get(name)
    for path, gradient in gradients.items():
        assert np.any(gradient) == (path != fixed), path
        assert np.any(gradient != gradient.astype(jnp.bfloat16)) == (path != fixed), path


@pytest.mark.parametrize("name", systems.SYSTEMS)
def test_no_images_make_no_tokens(name):
    cfg = small(name, **settings_of(name, dict(prune_layers=(1,))))
    features, text = golden.features(cfg, n=0), golden.inputs("text", (0, SMALL["text_width"]))
    tower = VisionConfig(image_size=16, patch_size=2, width=32, layers=6, heads=2, mlp_width=32)

    def run(params, weights, images):
        needs, prune = systems.needs(cfg, tower.layers), systems.pruning(params, cfg)
        pruned = vision.encode(weights, tower, images, needs, prune=prune)
        return [systems.project_valid(params, cfg, each, text)[0] for each in (features, pruned)]

    params = jax.eval_shape(lambda key: systems.init_params(cfg, key), jax.random.key(0))
    weights = jax.eval_shape(lambda key: vision.init_params(tower, key), jax.random.key(0))
    made = jax.eval_shape(run, params, weights, jax.ShapeDtypeStruct((0, 16, 16, 3), np.uint8))
    assert [tokens.shape for tokens in made] == [(0, systems.budgets(cfg)[0], 48)] * 2


@pytest.mark.parametrize("name", systems.SYSTEMS)
def test_system_and_settings_are_inferred_from_a_state_dict(name):
    cfg = small(name)
    shapes = {torch: value.shape for torch, value in golden.projector_state(cfg).items()}
    settings = systems.infer(shapes)
    the_same_tensors = ("m3", "prumerge", "prumerge_plus", "fastervlm", "evit", "average_pooling", "random")
    assert settings["name"] == ("mlp" if name in the_same_tensors else name)
    known = system_config(**settings_of(settings["name"], SMALL) | settings)
    assert systems.name_table(known) == systems.name_table(cfg)


def test_quecc_without_a_question_is_refused():
    cfg = small("quecc")
    with pytest.raises(ValueError, match="quecc uses each image's question"):
        systems.project(systems.init_params(cfg, jax.random.key(0)), cfg, golden.features(cfg))


@pytest.mark.parametrize(
    "name, changes, words",
    [
        ("token_packer", dict(scale_factor=3), "scale_factor=3 does not divide the 8x8 patch grid; valid values: 1, 2"),
        ("mqt", dict(queries=15), "queries=15; mqt needs a square"),
        ("mqt", dict(tokens=(17,)), "mqt makes 1 to projector.queries=16"),
        ("resampler", dict(queries=15), "resampler needs a square"),
        ("quecc", dict(scale_factor=(2, 4)), "quecc takes one scale factor"),
        ("honeybee_d", dict(scale_factor=(2, 4)), "honeybee_d takes one scale factor"),
        ("honeybee_d", dict(embed_width=64), "it is a setting of delta, token_packer, quecc, honeybee_c"),
    ],
)
def test_settings_that_cannot_work_are_refused(name, changes, words):
    with pytest.raises(ConfigError, match=words):
        systems.budgets(small(name, **changes))

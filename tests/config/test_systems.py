"""A system's settings: checked, as published when it is named alone, and read from config.json of earlier versions."""

import dataclasses
import json

import pytest

from deltallava_jax.config import (
    SYSTEMS,
    Config,
    DecoderConfig,
    ProjectorConfig,
    TrainingConfig,
    VisionConfig,
    compose,
    from_dict,
    override,
    renamed,
    settings_of,
    system_config,
    to_dict,
    workdir_config,
)
from deltallava_jax.models import systems
from tests.config.values import EASY, assert_error

# ------------------------------------------------------------------ published settings


PUBLISHED = {  # read off each public release; a width of 1024 in heads of 128 has 8 heads, of 64 it has 16
    "delta": dict(head_dim=128, select_layer=-2, scale_factor=2, mlp_width=4096),
    "mlp": dict(select_layer=-2),
    "token_packer": dict(head_dim=128, select_layer=-2, scale_factor=2),
    "m3": dict(select_layer=-2, scale_factor=(1, 2, 4, 8, 24)),
    "mqt": dict(head_dim=64, select_layer=-2, queries=256),
    "quecc": dict(head_dim=128, select_layer=-2, scale_factor=4),
    "resampler": dict(head_dim=128, queries=256),
    "honeybee_c": dict(select_layer=-1, scale_factor=2),
    "honeybee_d": dict(select_layer=-1, scale_factor=2, head_dim=128, mlp_width=1024),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_system_named_alone_has_its_published_settings(name):
    alone, before = system_config(name=name), dataclasses.replace(Config(), name="x")
    named = override(before, {"model.projector.name": name}).model.projector
    for cfg in (alone, named, from_dict(ProjectorConfig, {"name": name}), renamed(system_config(), {"name": name})):
        assert {field: getattr(cfg, field) for field in PUBLISHED[name]} == PUBLISHED[name]
        assert from_dict(ProjectorConfig, json.loads(json.dumps(to_dict(cfg)))) == cfg


def test_a_setting_beside_the_name_is_kept():
    assert system_config(name="mqt", head_dim=128).head_dim == 128
    assert dataclasses.replace(system_config(name="mqt", head_dim=128), queries=64).head_dim == 128
    for settings in ({"head_dim": "128", "name": "mqt"}, {"name": "mqt", "head_dim": "128"}):
        cfg = override(Config(), {f"model.projector.{key}": text for key, text in settings.items()})
        assert cfg.model.projector.head_dim == 128
    small = override(EASY, {"model.projector.name": "honeybee_d"}).model.projector
    own = EASY.model.projector  # what fits a small tower is no system's published setting
    assert (small.head_dim, small.mlp_width, small.select_layer) == (own.head_dim, own.mlp_width, own.select_layer)


def test_of_the_published_scale_factors_those_that_divide_the_grid_are_taken():
    assert systems.budgets(system_config(name="m3", grid=8)) == (64, 16, 4, 1)
    assert systems.budgets(system_config(name="m3")) == (576, 144, 36, 9, 1)


# ------------------------------------------------------------------ config.json of earlier versions


# Every system's settings, as every config.json held them; head_dim, scale_factor, select_layer, mlp_width by system.
EVERY = dict(
    grid=8, in_width=128, out_width=128, scale_factor=2, embed_width=0, select_layer=-1, levels=[], level_count=4,
    head_dim=128, block_head_dim=32, rank=16, mix_ratio=0.75, drop_path=0.1, initializer_range=0.02, reduction=1,
    window=1, mlp_width=4096, variant="release", ablation="none", queries=256, tokens=[], keep_ratio=None,
    prune_layers=[6, 12, 18], fuse=True, reproduce_duplicates=False, text_width=0, question_length=64, depth=0,
    closing=False,
)  # fmt: skip


def workdir_of(folder, **projector):
    values = to_dict(EASY)
    values["model"]["projector"] = EVERY | projector
    (folder / "config.json").write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize("name", SYSTEMS)
def test_settings_of_every_system_are_read_as_the_one_systems(tmp_path, name, recwarn):
    own = dict(
        quecc=dict(scale_factor=4),
        m3=dict(scale_factor=[1, 2, 4, 8]),
        mqt=dict(head_dim=64),
        honeybee_d=dict(mlp_width=1024),
    )
    small = dict(prune_layers=[0, 1]) if name in ("evit", "dynamicvit") else {}
    given = dict(name=name, select_layer=-1) | own.get(name, {}) | small
    found = workdir_config(workdir_of(tmp_path, **given)).model.projector
    sizes = dict(grid=8, in_width=128, out_width=128, select_layer=-1)
    assert found == system_config(name, **sizes, **{key: tuple(value) for key, value in small.items()})
    assert not recwarn.list  # every run wrote these, so no warning


def test_a_setting_of_another_system_is_dropped_with_one_warning(tmp_path):
    folder = workdir_of(tmp_path, name="mlp", queries=16, rank=4)
    with pytest.warns(
        UserWarning, match="config.json: .* than mlp are ignored: rank=4 .delta., queries=16 .mqt, resam"
    ) as warned:
        assert workdir_config(folder).model.projector == system_config(
            "mlp", grid=8, in_width=128, out_width=128, select_layer=-1
        )
    assert len(warned) == 1
    (folder / "config.json").write_text((folder / "config.json").read_text().replace("queries", "querys"))
    assert_error(lambda: workdir_config(folder), "projector.querys", "mlp")


def test_a_system_without_weights_takes_the_place_of_the_one_that_was_trained(tmp_path):
    """As eval.py does on an MLP's workdir, today's or one whose config.json holds every field."""
    now = from_dict(Config, json.loads(json.dumps(to_dict(override(EASY, {"model.projector.name": "mlp"})))))
    sizes = dict(grid=8, in_width=128, out_width=128, select_layer=-1)
    for trained in (now, workdir_config(workdir_of(tmp_path, name="mlp"))):
        for name in ("fastervlm", "prumerge", "random"):
            asked = {"model.projector.tokens": "(4,)", "model.projector.name": name}
            cfg = override(trained, asked).model.projector
            assert cfg == system_config(name, tokens=(4,), **sizes)


# ------------------------------------------------------------------ checks of each part


DELTA = dict(grid=8, in_width=128, out_width=64, head_dim=32, scale_factor=2)


@pytest.mark.parametrize(
    ("kind", "values", "words"),
    [
        (VisionConfig, dict(family="vit"), ["vision.family", "'vit'", "clip, siglip"]),
        (VisionConfig, dict(heads=7), ["vision.heads=7", "vision.width=1024"]),
        (VisionConfig, dict(image_size=8), ["vision.image_size=8", "vision.patch_size=14"]),
        (VisionConfig, dict(norm_eps=0.0), ["vision.norm_eps=0.0", "more than 0"]),
        (VisionConfig, dict(image_std=(0.5, 0.0, 0.5)), ["vision.image_std=(0.5, 0.0, 0.5)", "more than 0"]),
        (VisionConfig, dict(image_mean=(0.5, 0.5)), ["vision.image_mean=(0.5, 0.5)", "per channel"]),
        (DecoderConfig, dict(initializer_range=0.0), ["decoder.initializer_range=0.0", "more than 0"]),
        (DecoderConfig, dict(norm_eps=-1e-5), ["decoder.norm_eps=-1e-05", "more than 0"]),
        (DecoderConfig, dict(rope_base=float("nan")), ["decoder.rope_base=nan", "more than 0"]),
        (system_config, dict(initializer_range=0.0), ["projector.initializer_range=0.0", "more than 0"]),
        (system_config, dict(embed_width=-128), ["projector.embed_width=-128", "0 or more"]),
        (system_config, dict(select_layer=0), ["projector.select_layer=0", "-1, the last"]),
        (system_config, dict(levels=(-1, 1, 2, 3)), ["projector.levels=(-1, 1, 2, 3)", "0 or more"]),
        (system_config, dict(name="evit", prune_layers=(-1, 2)), ["projector.prune_layers=(-1, 2)", "0 or more"]),
        (system_config, dict(name="fastervlm", tokens=(4, 0)), ["projector.tokens=(4, 0)", "1 or more"]),
        (TrainingConfig, dict(epochs=-1.0, steps=5), ["training.epochs=-1.0", "0 or more"]),
        (TrainingConfig, dict(llavolta=((8, -2),)), ["training.llavolta", "(8, -2)"]),
        (Config, dict(seed=2**32), ["config.seed=4294967296", "less than 2**32"]),
        (DecoderConfig, dict(heads=5), ["decoder.heads=5", "decoder.width=4096"]),
        (DecoderConfig, dict(kv_heads=5), ["decoder.kv_heads=5", "decoder.heads=32"]),
        (DecoderConfig, dict(width=96), ["decoder.width / decoder.heads is 3", "even"]),
        (system_config, dict(variant="new"), ["projector.variant", "'new'", "release, paper"]),
        (system_config, dict(ablation="no"), ["projector.ablation", "'no'", "none, no_emhsa, no_delta, no_tb"]),
        (system_config, dict(levels=(1, 2)), ["projector.levels has 2", "level_count is 4"]),
        (system_config, dict(level_count=5), ["level_count=5", "projector.levels"]),
        (system_config, dict(head_dim=48), ["projector.head_dim=48", "128"]),
        (system_config, dict(head_dim=0), ["projector.head_dim=0", "1 or more"]),
        (system_config, dict(block_head_dim=-32), ["projector.block_head_dim=-32", "1 or more"]),
        (system_config, dict(block_head_dim=128), ["projector.block_head_dim=128", "two heads in width 128"]),
        (
            system_config,
            dict(variant="paper", in_width=112, embed_width=128),
            ["projector.block_head_dim=32", "112"],
        ),
        (system_config, dict(in_width=6, head_dim=2, block_head_dim=2), ["projector.in_width=6", "multiple of 4"]),
        (system_config, dict(embed_width=256), ["projector.embed_width=256", "release", "in_width=128"]),
        (system_config, dict(window=0), ["projector.window=0", "1 or more"]),
        (system_config, dict(reduction=0), ["projector.reduction=0", "1 or more"]),
        (system_config, dict(window=3), ["projector.window=3", "4x4 query grid"]),
        (system_config, dict(window=4, scale_factor=(2, 4)), ["projector.window=4", "2x2 query grid"]),
        (system_config, dict(reduction=5), ["projector.reduction=5", "4x4 query grid"]),
    ],
)
def test_each_part_checks_itself(kind, values, words):
    base = settings_of(values.get("name", "delta"), DELTA) if kind is system_config else {}
    kind(**base)
    assert_error(lambda: kind(**{**base, **values}), *words)


@pytest.mark.parametrize(
    "make",
    [
        lambda **settings: system_config("mlp", **settings),
        lambda **settings: from_dict(ProjectorConfig, {"name": "mlp", **settings}, "projector."),
        lambda **settings: renamed(system_config("mlp"), settings),
        lambda **settings: compose(VisionConfig(), DecoderConfig(), {"name": "mlp", **settings}),
        lambda **settings: override(
            Config(), {"model.projector.name": "mlp"} | {f"model.projector.{k}": str(v) for k, v in settings.items()}
        ),
    ],
)
def test_a_setting_of_another_system_is_refused_with_its_owners(make):
    assert_error(lambda: make(queries=16), "projector.queries", "mlp", "it is a setting of mqt, resampler")
    assert_error(lambda: make(grit=24), "projector.grit", "did you mean 'grid'")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(grid=16), ["projector.grid=16", "24x24"]),
        (dict(in_width=768), ["projector.in_width=768", "vision.width=1024"]),
        (dict(out_width=2048), ["projector.out_width=2048", "decoder.width=4096"]),
    ],
)
def test_tower_projector_and_decoder_must_fit(changes, words):
    assert_error(lambda: compose(VisionConfig(), DecoderConfig(), {"name": "mlp", **changes}), *words)


def test_levels_must_be_layers_of_the_tower():
    assert_error(lambda: override(EASY, {"model.projector.levels": "(1,2,3,9)"}), "projector.levels", "9", "3 layers")


def test_an_unknown_projector_names_the_nearest():
    for make in (system_config, lambda name: from_dict(ProjectorConfig, {"name": name})):
        assert_error(lambda make=make: make(name="delt"), "projector.name", "'delt'", "did you mean 'delta'")
        assert_error(lambda make=make: make(name="xyz"), "'xyz'", "known: delta, mlp")

"""Presets, the JSON round trip, overrides from a command line, and the one-line errors."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deltallava_jax.config import (
    PRESETS,
    Config,
    DataConfig,
    DecoderConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    VisionConfig,
    compose,
    dtype_name,
    from_dict,
    load_config,
    override,
    preset,
    to_dict,
)
from deltallava_jax.errors import ConfigError
from deltallava_jax.models import decoder, systems, vision
from tests.config.values import EASY, NAMED, assert_error

# ------------------------------------------------------------------ presets


@pytest.mark.parametrize(
    ("name", "grid", "width", "layers", "heads", "parameters"),
    [
        ("clip_l_14_336", 24, 1024, 24, 16, 303_507_456),
        ("clip_l_14_224", 16, 1024, 24, 16, 303_179_776),
        ("clip_b_32_224", 7, 768, 12, 12, 87_456_000),
        ("siglip_so400m_14_384", 27, 1152, 27, 16, 412_987_248),  # the published tower without its pooling head
    ],
)
def test_towers_have_their_published_sizes(name, grid, width, layers, heads, parameters):
    cfg = preset(VisionConfig, name)
    assert (cfg.grid, cfg.width, cfg.layers, cfg.heads) == (grid, width, layers, heads)
    assert count(vision.init_params, cfg) == parameters


@pytest.mark.parametrize(
    ("name", "vocab_size", "width", "layers", "heads", "kv_heads", "parameters"),
    [
        ("vicuna_7b", 32000, 4096, 32, 32, 32, 6_738_415_616),
        ("vicuna_13b", 32000, 5120, 40, 40, 40, 13_015_864_320),
        ("qwen2_7b", 152064, 3584, 28, 28, 4, 7_615_616_512),
    ],
)
def test_decoders_have_their_published_sizes(name, vocab_size, width, layers, heads, kv_heads, parameters):
    cfg = preset(DecoderConfig, name)
    sizes = (cfg.vocab_size, cfg.width, cfg.layers, cfg.heads, cfg.kv_heads)
    assert sizes == (vocab_size, width, layers, heads, kv_heads) and cfg.head_dim == 128
    assert count(decoder.init_params, cfg) == parameters


def count(init_params, cfg) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(lambda: init_params(cfg, jax.random.key(0)))))


def test_configurations_find_the_error_that_they_raise(tmp_path):
    """As those of version 0.1.0 do, which may have been copied."""
    file = tmp_path / "mine.py"
    file.write_text("from deltallava_jax import config as c\ndef get_config(): raise c.ConfigError('expected a stage')")
    with pytest.raises(ConfigError, match="^expected a stage$"):
        load_config(file)


def test_preset_takes_changes():
    assert preset(DecoderConfig, "vicuna_7b", layers=2) == DecoderConfig(layers=2)


@pytest.mark.parametrize("decoder_name", PRESETS[DecoderConfig])
@pytest.mark.parametrize("vision_name", PRESETS[VisionConfig])
def test_compose_fits_the_projector_between_any_tower_and_decoder(vision_name, decoder_name):
    tower, text = preset(VisionConfig, vision_name), preset(DecoderConfig, decoder_name)
    p = compose(tower, text, dict(scale_factor=tower.grid)).projector
    assert (p.grid, p.in_width, p.out_width) == (tower.grid, tower.width, text.width)
    assert systems.budgets(p) == (1,)


# ------------------------------------------------------------------ JSON


@pytest.mark.parametrize(("kind", "name"), NAMED)
def test_presets_survive_json(kind, name):
    cfg = preset(kind, name)
    assert from_dict(kind, json.loads(json.dumps(to_dict(cfg)))) == cfg


@pytest.mark.parametrize("scale_factor", [8, (2, 4, 8)])
def test_a_whole_config_survives_json(scale_factor):
    cfg = Config(
        name="all",
        seed=3,
        model=compose(
            preset(VisionConfig, "clip_l_14_336"),
            preset(DecoderConfig, "vicuna_13b"),
            dict(scale_factor=scale_factor, levels=(3, 9, 20, 23), variant="paper", ablation="no_tb"),
            remat="dots",
        ),
        data=DataConfig(independent_rounds=True, max_bad_fraction=0.5),
        optimizer=OptimizerConfig(frozen=("vision/", "decoder/embed")),
        mesh=MeshConfig(fsdp=4),
    )
    again = from_dict(Config, json.loads(json.dumps(to_dict(cfg))))
    assert again == cfg and hash(again) == hash(cfg)
    assert from_dict(Config, to_dict(EASY)) == EASY


def test_from_dict_fills_in_defaults_and_takes_preset_names():
    assert from_dict(Config, {}) == Config()
    assert from_dict(ModelConfig, {"vision": "clip_l_14_336", "remat": "full"}) == ModelConfig(remat="full")


# ------------------------------------------------------------------ overrides


def at(cfg, path: str):
    for key in path.split("."):
        cfg = getattr(cfg, key)
    return cfg


@pytest.mark.parametrize(
    ("path", "text", "value"),
    [
        ("data.rows", "32", 32),
        ("optimizer.lr", "1e-3", 1e-3),
        ("training.epochs", "2", 2.0),
        ("data.independent_rounds", "False", False),
        ("model.decoder.qkv_bias", "true", True),
        ("name", "7", "7"),  # a text stays a text, whatever it looks like
        ("name", "a=b c", "a=b c"),
        ("model.projector.select_layer", "-2", -2),
        ("model.projector.scale_factor", "4", 4),
        ("model.projector.scale_factor", "(2,4)", (2, 4)),
        ("model.projector.scale_factor", "[2, 4, 8]", (2, 4, 8)),
        ("model.projector.levels", "(1,1,2,3)", (1, 1, 2, 3)),
        ("model.vision.image_mean", "(0.5, 0.5, 1)", (0.5, 0.5, 1.0)),
        ("optimizer.frozen", "vision/", ("vision/",)),
        ("optimizer.frozen", "('vision/', 'decoder/embed')", ("vision/", "decoder/embed")),
        ("optimizer.frozen", "()", ()),
    ],
)
def test_override_of_one_key_changes_that_key_alone(path, text, value):
    cfg = override(EASY, {path: text})
    assert at(cfg, path) == value and type(at(cfg, path)) is type(value)
    expected = to_dict(EASY)
    *parents, leaf = path.split(".")
    node = expected
    for key in parents:
        node = node[key]
    node[leaf] = list(value) if isinstance(value, tuple) else value
    assert to_dict(cfg) == expected


def test_overrides_are_checked_together_so_that_presets_can_change_the_widths():
    cfg = override(
        EASY,
        {
            "model.decoder": "vicuna_7b",
            "model.decoder.layers": "2",
            "model.vision": "clip_l_14_336",
            "model.projector.grid": "24",
            "model.projector.in_width": "1024",
            "model.projector.out_width": "4096",
            "model.projector.scale_factor": "(2,3,12)",
            "training.steps": "5",
        },
    )
    assert cfg.model.decoder == preset(DecoderConfig, "vicuna_7b", layers=2)
    assert cfg.model.vision == preset(VisionConfig, "clip_l_14_336")
    assert systems.budgets(cfg.model.projector) == (144, 64, 4)
    assert (cfg.training.steps, cfg.training.epochs, cfg.data) == (5, EASY.training.epochs, EASY.data)
    assert override(EASY, {}) == EASY


@pytest.mark.parametrize(
    ("path", "text", "words"),
    [
        ("optimizer.lrr", "1", ["optimizer.lrr", "did you mean 'lr'"]),
        ("model.projector.scale_factr", "2", ["model.projector.scale_factr", "'scale_factor'"]),
        ("data.zzz", "1", ["data.zzz", "known:", "rows"]),
        ("optimiser.lr", "1", ["section 'optimiser'", "'optimizer'"]),
        ("model.projektor.rank", "1", ["section 'model.projektor'", "'projector'"]),
        ("data.rows.x", "1", ["section 'data.rows'"]),
        ("data.rows", "many", ["data.rows", "int", "'many'"]),
        ("data.rows", "2.5", ["data.rows", "int", "2.5"]),
        ("data.rows", "True", ["data.rows", "int", "True"]),
        ("optimizer.lr", "fast", ["optimizer.lr", "float", "'fast'"]),
        ("optimizer.lr", "9" * 400, ["optimizer.lr", "finite number", "99...99"]),
        ("optimizer.lr", "9" * 5000, ["optimizer.lr", "float", "99...99"]),
        ("optimizer.lr", "1e999", ["optimizer.lr", "inf", "finite number"]),
        ("training.steps", "9" * 400, ["training.steps", "finite number", "99...99"]),
        ("model.vision.image_std", "(1e999, 1, 1)", ["model.vision.image_std", "inf", "finite number"]),
        ("model.projector.mix_ratio", "1e999", ["model.projector.mix_ratio", "inf", "finite number"]),
        ("optimizer.lr", "True", ["optimizer.lr", "float", "True"]),
        ("data.independent_rounds", "1", ["data.independent_rounds", "bool", "1"]),
        ("model.projector.levels", "3", ["model.projector.levels", "tuple[int, ...]", "3"]),
        ("model.projector.scale_factor", "two", ["model.projector.scale_factor", "int", "tuple", "'two'"]),
        ("optimizer.frozen", "('a', 3)", ["optimizer.frozen", "str", "3"]),
        ("data", "5", ["'data'", "DataConfig", "5"]),
        ("model.decoder", "vicuna", ["DecoderConfig", "'vicuna'", "did you mean 'vicuna_7b'"]),
        ("model.vision", "resnet", ["VisionConfig", "'resnet'", "clip_l_14_336"]),
        ("model.projector.scale_factor", "3", ["scale_factor=3", "8x8", "valid values: 1, 2, 4, 8"]),
        ("model.projector.scale_factor", "(2,3)", ["scale_factor=3", "8x8", "valid values: 1, 2, 4, 8"]),
        ("model.projector.scale_factor", "0", ["scale_factor=0", "valid values: 1, 2, 4, 8"]),
        ("model.projector.scale_factor", "()", ["scale_factor is empty", "valid values: 1, 2, 4, 8"]),
        ("model.projector.select_layer", "0", ["select_layer=0", "-1, the last"]),
        ("model.projector.select_layer", "-4", ["select_layer=-4", "-3 to -1"]),
        ("model.dtype", "float16", ["model.dtype", "'float16'", "bfloat16, float32"]),
        ("model.remat", "some", ["model.remat", "'some'", "auto, none, dots, attention, full"]),
        ("data.rows", "0", ["data.rows=0", "1 or more"]),
        ("data.row_length", "4", ["data.row_length=4", "8 or more"]),
        ("data.max_bad_fraction", "1.5", ["data.max_bad_fraction=1.5", "0 to 1"]),
        ("optimizer.lr", "0", ["optimizer.lr=0", "more than 0"]),
        ("optimizer.accumulation", "0", ["optimizer.accumulation=0", "1 or more"]),
        ("optimizer.name", "adam", ["optimizer.name", "'adam'", "adamw, muon"]),
        ("optimizer.eps", "0", ["optimizer.eps=0", "more than 0"]),
        ("optimizer.b1", "2", ["optimizer.b1=2", "0 to below 1"]),
        ("optimizer.b2", "1", ["optimizer.b2=1", "0 to below 1"]),
        ("optimizer.muon_momentum", "-0.1", ["optimizer.muon_momentum=-0.1", "0 to below 1"]),
        ("optimizer.muon_rate", "0", ["optimizer.muon_rate=0", "more than 0"]),
        ("optimizer.muon_iterations", "0", ["optimizer.muon_iterations=0", "1 or more"]),
        ("optimizer.warmup_ratio", "-1", ["optimizer.warmup_ratio=-1", "0 to 1"]),
        ("optimizer.final_lr_ratio", "1.5", ["optimizer.final_lr_ratio=1.5", "0 to 1"]),
        ("optimizer.weight_decay", "-1", ["optimizer.weight_decay=-1", "0 or more"]),
        ("optimizer.clip_norm", "1e999", ["optimizer.clip_norm", "inf", "finite"]),
    ],
)
def test_a_bad_override_is_one_clear_line(path, text, words):
    assert_error(lambda: override(EASY, {path: text}), *words)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"model.decoder.heads": "0"}, "decoder.heads=0"),
        ({"model.decoder.kv_heads": "0"}, "decoder.kv_heads=0"),
        ({"model.vision.heads": "0"}, "vision.heads=0"),
        ({"model.vision.patch_size": "0"}, "vision.patch_size=0"),
        ({"data": "5", "data.rows": "3"}, "'data'"),
        ({"optimizer.lr": "{[]: 1}"}, "optimizer.lr"),
    ],
)
def test_an_odd_override_is_one_clear_line_too(changes, word):
    assert_error(lambda: override(EASY, changes), word)


# ------------------------------------------------------------------ devices


@pytest.mark.parametrize(
    ("axes", "devices", "sizes"),
    [
        ((-1, 1, 1), 8, (8, 1, 1)),
        ((-1, 2, 2), 8, (2, 2, 2)),
        ((2, -1, 1), 8, (2, 4, 1)),
        ((1, 1, 1), 1, (1, 1, 1)),
        ((4, 2, 1), 8, (4, 2, 1)),
    ],
)
def test_mesh_sizes(axes, devices, sizes):
    assert MeshConfig(*axes).sizes(devices) == sizes


@pytest.mark.parametrize(
    ("axes", "devices", "words"),
    [
        ((3, 1, 1), 8, ["data=3", "does not fit 8 devices"]),
        ((-1, 3, 1), 8, ["fsdp=3", "does not fit 8 devices"]),
        ((2, 2, 1), 8, ["data=2, fsdp=2", "uses 4 of 8"]),
        ((16, 1, 1), 8, ["data=16", "8 devices"]),
        ((-1, -1, 1), 8, ["data=-1, fsdp=-1", "one may be -1"]),
        ((0, 1, 1), 8, ["data=0", "above 0"]),
        ((-2, 1, 1), 8, ["data=-2", "above 0"]),
    ],
)
def test_a_mesh_that_does_not_fit(axes, devices, words):
    assert_error(lambda: MeshConfig(*axes).sizes(devices), "mesh", *words)


def test_validate_devices_returns_the_mesh():
    assert EASY.validate_devices(1) == (1, 1, 1)
    assert EASY.validate_devices(8) == (8, 1, 1)
    assert override(EASY, {"mesh.tensor": "4", "optimizer.accumulation": "4"}).validate_devices(8) == (2, 1, 4)


@pytest.mark.parametrize(
    ("changes", "devices", "words"),
    [
        ({"data.rows": "6"}, 4, ["data.rows=6", "4 devices", "data=4", "--config.data.rows=8 "]),
        ({"data.rows": "4"}, 8, ["data.rows=4", "8 devices", "--config.data.rows=8 "]),
        ({"data.rows": "6", "mesh.fsdp": "2"}, 4, ["data.rows=6", "data=2 x fsdp=2"]),
        ({"optimizer.accumulation": "3"}, 1, ["data.rows=8", "optimizer.accumulation=3", "--config.data.rows=9 "]),
        ({"optimizer.accumulation": "4"}, 4, ["data.rows=8 / 4 microbatches", "4 devices", "--config.data.rows=16 "]),
        ({"mesh.tensor": "8"}, 8, ["vision.heads=4", "tensor=8"]),
        ({"mesh.tensor": "4", "model.decoder.kv_heads": "2"}, 4, ["decoder.kv_heads=2", "tensor=4"]),
        ({"mesh.data": "3"}, 8, ["data=3", "8 devices"]),
    ],
)
def test_validate_devices_refuses_what_does_not_divide(changes, devices, words):
    assert_error(lambda: override(EASY, changes).validate_devices(devices), *words)


# ------------------------------------------------------------------ config files


def test_load_config_returns_what_get_config_makes(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from deltallava_jax.config import Config\ndef get_config():\n    return Config(name='mine', seed=4)"
    )
    assert load_config(file) == load_config(str(file)) == Config(name="mine", seed=4)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("missing.py", None, ["does not exist"]),
        ("plain.txt", "get_config = 1", ["not a Python file"]),
        ("empty.py", "", ["no get_config()"]),
        ("dict.py", "def get_config(): return {'name': 'x'}", ["did not return a Config"]),
        ("broken.py", "def get_config(:", ["invalid syntax"]),
        ("imports.py", "import no_such_module", ["no_such_module"]),
    ],
)
def test_a_bad_config_file_is_named(tmp_path, name, text, words):
    if text is not None:
        (tmp_path / name).write_text(text)
    assert_error(lambda: load_config(tmp_path / name), name, *words)


def test_an_error_inside_get_config_is_the_users_line(tmp_path):
    (tmp_path / "odd.py").write_text(
        "from deltallava_jax import config as c\ndef get_config(): return c.Config(data=c.DataConfig(rows=0))"
    )
    assert_error(lambda: load_config(tmp_path / "odd.py"), "data.rows=0")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("bf16", "bfloat16"), ("bfloat16", "bfloat16"), ("BF16", "bfloat16"), ("torch.bfloat16", "bfloat16"),
        ("fp16", "float16"), ("half", "float16"), ("float16", "float16"),
        ("fp32", "float32"), ("float", "float32"), ("float32", "float32"), (np.float32, "float32"),
        (jnp.bfloat16, "bfloat16"), (np.dtype("float16"), "float16"), (None, None),
    ],
)  # fmt: skip
def test_dtypes_have_the_names_that_are_in_use(given, expected):
    assert dtype_name(given) == expected


@pytest.mark.parametrize("given", ["int8", "float8", "float8_e4m3fn", "float64", "", "nothing", 16, np.int32])
def test_another_dtype_is_refused_with_the_list(given):
    with pytest.raises(ConfigError, match="float32.*bfloat16.*float16"):
        dtype_name(given)

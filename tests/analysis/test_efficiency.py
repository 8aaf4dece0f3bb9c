"""Operations and cache of an answer against the paper's numbers, closed formulas, XLA's count, and arrays."""

import dataclasses
import importlib.util
import json

import jax
import jax.numpy as jnp
import pytest

from deltallava_jax import __main__ as command_line
from deltallava_jax.analysis import efficiency
from deltallava_jax.config import DecoderConfig, FastVConfig, ModelConfig, settings_of, system_config
from deltallava_jax.errors import ConfigError
from deltallava_jax.models import decoder, fastv
from deltallava_jax.sequence import text_layout
from tests import tiny
from tests.xla import unrolled

DEFAULT = ModelConfig()
GROUPED = DecoderConfig(vocab_size=96, width=64, layers=5, heads=4, kv_heads=2, mlp_width=160)
TINY = tiny.get_config().model
SMALL = dataclasses.replace(TINY, decoder=GROUPED, projector=dataclasses.replace(TINY.projector, out_width=64))


def by_convention(*arguments, **options):
    return {row["convention"]: row for row in efficiency.rows(*arguments, **options)}


# ------------------------------------------------------------------ the paper's convention


@pytest.mark.parametrize("budget", efficiency.PUBLISHED)
def test_the_papers_numbers_at_68_tokens_of_text(budget):
    system = "mlp" if budget == 576 else "delta"  # the paper's 576 tokens are LLaVA-1.5's: its projector has two maps
    cfg = efficiency.at_budget(efficiency.with_system(DEFAULT, system), budget)
    counted = {part: value / 1e12 for part, value in efficiency.paper(cfg, 68, 30).items()}
    printed = efficiency.PUBLISHED[budget]
    assert counted["vision"] == pytest.approx(0.382, rel=0.01)
    assert counted["prefill"] == pytest.approx(printed.get("prefill", counted["prefill"]), rel=0.01)
    assert sum(counted.values()) == pytest.approx(printed.get("total", sum(counted.values())), rel=0.01)
    if budget == 576:
        assert round(counted["projector"], 3) == 0.024 and round(counted["decode"], 2) == 0.31
    else:
        assert counted["projector"] <= 0.002


def test_the_tokens_of_decoding_are_added_up():
    cfg, d, f = SMALL, 64, 160
    one = lambda tokens: 5 * (8 * d * d + 4 * d * f + 4 * tokens * d)
    tokens = 7 + efficiency.visual_tokens(cfg)
    assert efficiency.paper(cfg, 7, 3)["decode"] == one(tokens) + one(tokens + 1) + one(tokens + 2)


# ------------------------------------------------------------------ every matrix product


def test_a_grouped_decoder_is_its_formula():
    matrices = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 160)
    logits, V, T = 2 * 64 * 96, efficiency.visual_tokens(SMALL), 9
    assert V == 4
    layer = lambda queries, keys: 5 * (queries * matrices + 4 * queries * keys * 64)
    counted = efficiency.exact(SMALL, T, 6)
    assert counted["prefill"] == layer(T + V, T + V) + logits
    assert counted["decode"] == sum(layer(1, T + V + n) + logits for n in range(1, 7))
    assert efficiency.exact(SMALL, T, 0)["decode"] == 0


def test_fastv_counts_the_tokens_of_its_layers_and_the_selecting_scores():
    cfg = dataclasses.replace(SMALL, fastv=FastVConfig(layer=3, keep=1))
    matrices = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 160)
    layer = lambda tokens: tokens * matrices + 4 * tokens * tokens * 64
    whole, kept = 9 + 4, 9 + 1
    scores = 2 * (64 * 64 + whole * 64 * 32 + whole * 64)  # the last token's query, all keys, their products
    counted = efficiency.exact(cfg, 9, 2)
    assert counted["prefill"] == 3 * layer(whole) + 2 * layer(kept) + scores + 2 * 64 * 96
    keys = lambda n: 3 * (whole + n) + 2 * (kept + n)
    assert counted["decode"] == sum(5 * matrices + 4 * 64 * keys(n) + 2 * 64 * 96 for n in (1, 2))
    assert efficiency.paper(cfg, 9, 0)["prefill"] == sum(
        8 * s * 64**2 + 4 * s * 64 * 160 + 4 * s * s * 64 for s in (whole,) * 3 + (kept,) * 2
    )


def xla_layers(cfg, tokens):
    """XLA's count for one and for two layers over so many tokens, without loops."""
    counts = []
    for layers in (1, 2):
        small = dataclasses.replace(cfg, layers=layers)
        shapes = jax.eval_shape(lambda key, small=small: decoder.init_params(small, key), jax.random.key(0))
        places = jnp.arange(tokens)[None]

        def prefill(params, hidden, small=small, places=places):
            return decoder.forward(params, small, hidden, text_layout(places, jnp.ones_like(places)))[0]

        with unrolled():
            hidden = jax.ShapeDtypeStruct((1, tokens, cfg.width), jnp.bfloat16)
            lowered = jax.jit(prefill).lower(shapes, hidden)
        counts.append(lowered.compile().cost_analysis()["flops"])
    return counts


@pytest.mark.parametrize(
    "cfg",
    [
        dataclasses.replace(GROUPED, width=512, mlp_width=1408, heads=4, kv_heads=2),
        pytest.param(DEFAULT.decoder, id="vicuna_7b"),
    ],
)
def test_xla_counts_the_same_prefill(cfg):
    """From the difference of one and two layers, as XLA counts a loop's body once."""
    one, two = xla_layers(cfg, 68 + 16)
    model = dataclasses.replace(DEFAULT, decoder=cfg, projector=system_config(scale_factor=6, out_width=cfg.width))
    logits = 2 * cfg.width * cfg.vocab_size
    ours = efficiency.exact(model, 68, 0)["prefill"] - logits
    assert ours == pytest.approx(one + (cfg.layers - 1) * (two - one), rel=0.03)


@pytest.mark.parametrize("name", efficiency.system_names())
def test_every_system_is_counted(name):
    cfg = efficiency.with_system(SMALL, name)
    own = dict(head_dim=16, block_head_dim=16, rank=4, prune_layers=(0,), question_length=8)
    own = settings_of(cfg.projector.name, own)
    cfg = dataclasses.replace(cfg, projector=dataclasses.replace(cfg.projector, **own))
    budget = efficiency.budgets_of(cfg, (16, 4))[0]
    rows = by_convention(cfg, budget, 9, 2)
    assert {row["system"] for row in rows.values()} == {name} and rows["exact"]["budget"] == budget
    assert all(rows[kind][f"{part}_tflops"] > 0 for kind in rows for part in efficiency.PARTS)
    parts = [rows["exact"][f"{part}_tflops"] for part in efficiency.PARTS]
    assert rows["exact"]["total_tflops"] == pytest.approx(sum(parts))
    assert rows["exact"]["prefill_tflops"] > rows["paper"]["prefill_tflops"]  # a third matrix
    if name not in ("mlp", "evit"):
        assert budget == 16


def test_a_smaller_budget_reaches_the_tower_that_is_pruned_and_the_projector():
    evit = efficiency.with_system(DEFAULT, "evit")
    many, few = (efficiency.exact(efficiency.at_budget(evit, budget), 68, 0) for budget in (144, 16))
    assert few["vision"] < 0.7 * many["vision"]
    delta = efficiency.exact(efficiency.at_budget(DEFAULT, 1), 68, 0)
    # At every budget keys and values come from all 576 patches of four levels.
    assert delta["projector"] > 2 * 2 * 576 * 4096 * 1024


def test_cache_bytes_are_those_of_the_arrays():
    held = lambda caches: sum(leaf.nbytes for cache in caches for leaf in (*cache.k, *cache.v))
    whole = decoder.init_cache(GROUPED, 1, 9 + 4 + 5, jnp.float32)
    assert by_convention(SMALL, 4, 9, 5)["exact"]["cache_bytes"] == held([whole])
    keep = FastVConfig(layer=3, keep=2)
    slices = zip(fastv.layer_slices(GROUPED, keep), (13 + 5, 13 + 5, 11 + 5), strict=True)
    caches = [decoder.init_cache(GROUPED, 1, tokens, jnp.float32, layers=b - a) for (a, b), tokens in slices]
    row = by_convention(dataclasses.replace(SMALL, fastv=keep), 2, 9, 5)["exact"]
    assert row["cache_bytes"] == held(caches) and row["system"] == "fastv" and row["budget"] == 2


# ------------------------------------------------------------------ the command


def run(capsys, *arguments):
    options = command_line.parse(["flops", *arguments])
    options.main(options)
    return capsys.readouterr().out


def test_the_command_prints_rows_or_a_table(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    asked = ["--config", str(tiny.FILE), "--budgets", "4", "--text", "9", "--new", "3"]
    rows = json.loads(run(capsys, *asked, "--json"))
    assert [list(row) for row in rows] == [
        ["system", "budget", "text_tokens", "new_tokens", "convention", "vision_tflops", "projector_tflops",
         "prefill_tflops", "decode_tflops", "total_tflops", "cache_bytes"]
    ] * 2  # fmt: skip
    assert rows == efficiency.rows(tiny.get_config().model, 4, 9, 3)
    printed = run(capsys, *asked, "--plots", str(tmp_path / "made"))
    assert "9 tokens of text and 3 new ones" in printed and printed.count("delta ") == 2
    assert (tmp_path / "made" / "flops.png").read_bytes().startswith(b"\x89PNG")


def test_towers_and_decoders_by_name_and_many_systems(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    asked = ["--tower", "tiny", "--decoder", "tiny", "--systems", "mlp,m3,fastervlm", "--text", "5", "--new", "1"]
    rows = json.loads(run(capsys, *asked, "--json", "--plots", str(tmp_path)))
    assert [row["budget"] for row in rows if row["system"] == "m3"][::2] == [64, 16, 4, 1]
    assert {row["system"] for row in rows} == {"mlp", "m3", "fastervlm"} and (tmp_path / "flops.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--systems", "delt"], "unknown system 'delt'"),
        (["--systems", "mlp", "--budgets", "144"], "mlp does not make 144 tokens of 576"),
        (["--budgets", "144,x"], "expected numbers"),
        (["--tower", "clip"], "no VisionConfig preset 'clip'"),
        (["--text", "0"], "--text 0"),
        (["--config.model.dtyp=float32"], "did you mean 'dtype'"),
        (["--systems", "fastv", "--budgets", "577"], "fastv keeps 1 to 576"),
        (["--tower", "siglip_so400m_14_384", "--systems", "evit"], "no CLS token"),
    ],
)
def test_bad_options_are_one_line(capsys, arguments, message):
    with pytest.raises(ConfigError, match=message) as error:
        run(capsys, *arguments)
    assert "\n" not in str(error.value)


def test_a_missing_plot_library_is_named(capsys, monkeypatch, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    with pytest.raises(ConfigError, match=r"pip install '\.\[plots\]', or matplotlib"):
        run(capsys, "--plots", str(tmp_path))

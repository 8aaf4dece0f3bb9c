"""Heat maps against finite differences of the model's own loss, a planted shape, and a selection's places."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from deltallava_jax import __main__ as command_line
from deltallava_jax.analysis import gradcam
from deltallava_jax.config import FastVConfig, renamed, settings_of
from deltallava_jax.data import tokens
from deltallava_jax.data.conversation import TEMPLATES, prompt_conversation, tokenize
from deltallava_jax.errors import ConfigError
from deltallava_jax.inference.model import Model
from deltallava_jax.models import decoder, vision, vlm
from deltallava_jax.models.systems import dynamicvit, fastervlm
from deltallava_jax.sequence import Batch
from tests import tiny

QUESTION, ANSWER = "what shape is this?", "circle"


@pytest.fixture(scope="module")
def tokenizer():
    return tokens.train([QUESTION, ANSWER, "red square"], 300)


def make(tokenizer, **projector):
    cfg = tiny.get_config().model
    cfg = dataclasses.replace(cfg, projector=renamed(cfg.projector, dict(name="mlp") | projector))
    params = tiny.random_params(cfg)
    params["decoder"] = decoder.unstacked(params["decoder"], cfg.decoder)  # as ``load`` gives it
    return Model(cfg, params, tokenizer, "brief")


def picture(place=None):
    """White noise, or white with one coloured patch of 8 x 8 at (row, column)."""
    if place is None:
        return Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8))
    pixels = np.full((64, 64, 3), 255, np.uint8)
    row, column = 8 * place[0], 8 * place[1]
    pixels[row : row + 8, column : column + 8] = (200, 30, 60)
    return Image.fromarray(pixels)


def log_probability(model, image, monkeypatch):
    """(visual tokens [V, d], a function from changed ones to the answer's log-probability by the training loss)."""
    made = tokenize(prompt_conversation([(QUESTION, ANSWER)], 1), TEMPLATES["brief"], model.tokenizer)
    batch = Batch(
        made.ids[None], made.loss_mask[None], np.ones((1, len(made.ids)), np.int32), made.image_positions[None],
        np.asarray(image)[None, None],
    )  # fmt: skip
    visual = vlm.visual_tokens(model.params, model.cfg, np.asarray(image)[None])[0]

    @jax.jit
    def of(changed):
        with monkeypatch.context() as patch:
            patch.setattr(vlm, "visual_tokens", lambda *_, **__: (changed[None], None, 0.0))
            return -vlm.loss_sum(model.params, model.cfg, batch, None, train=False)[0]

    return visual[0], of


@pytest.mark.parametrize("method", gradcam.METHODS)
def test_the_heat_is_the_slope_of_the_log_probability(tokenizer, method, monkeypatch):
    model, image, size = make(tokenizer, name="m3", scale_factor=2), picture(), 1e-2
    (found,) = gradcam.heat_maps(model, image, QUESTION, answer=ANSWER, method=method)
    visual, of = log_probability(model, image, monkeypatch)
    assert found.log_probability == pytest.approx(float(of(visual)), rel=1e-4)
    heat = found.grid.reshape(-1)
    for token in (*np.argsort(-heat)[:3], heat.argmin()):
        if method == "relevance":  # that token grows by a share of itself
            step = jnp.where((jnp.arange(16) == token)[:, None], visual, 0)
        else:  # every token moves towards it
            step = jnp.broadcast_to(visual[token], visual.shape) / 16
        slope = float(of(visual + size * step) - of(visual - size * step)) / (2 * size)
        expected = abs(slope) if method == "relevance" else max(slope, 0)
        assert heat[token] == pytest.approx(expected, rel=0.02, abs=2e-3 * float(heat.max()))


def planted(tokenizer):
    """A model whose visual tokens are zero but for patches that are not white: nothing mixes patches in the tower."""
    model = make(tokenizer)
    tower = model.params["vision"]
    for part in ("o", "down"):
        tower["layers"][part] = jax.tree.map(jnp.zeros_like, tower["layers"][part])
    tower["embeddings"]["position"] = jnp.zeros_like(tower["embeddings"]["position"])
    white = np.full((1, 64, 64, 3), 255, np.uint8)
    blank = vlm.visual_tokens(model.params, model.cfg, white)[0][0, 0]
    model.params["projector"]["down"]["bias"] -= blank
    return model


@pytest.mark.parametrize("place", [(1, 6), (5, 2)])
@pytest.mark.parametrize("method", gradcam.METHODS)
def test_the_heat_lies_where_the_shape_is(tokenizer, place, method):
    model = planted(tokenizer)
    heat = gradcam.heat_maps(model, picture(place), QUESTION, answer=ANSWER, method=method)[0].grid
    assert heat.shape == (8, 8)
    rest = heat.copy()
    rest[place] = 0
    assert rest.max() < 1e-2 * max(heat[place], 1e-2)
    if method == "relevance":
        assert np.unravel_index(heat.argmax(), heat.shape) == place and heat[place] > 0


def test_a_selections_tokens_lie_on_their_patches(tokenizer):
    model, image = make(tokenizer, name="fastervlm", tokens=(10, 3)), picture()
    ten, three = gradcam.heat_maps(model, image, QUESTION, budgets=(10, 3), answer=ANSWER)
    needs = fastervlm.FasterVlm.needs(model.cfg.projector, 2)
    attention = vision.encode(model.params["vision"], model.cfg.vision, np.asarray(image)[None], needs).cls_attention
    for found, count in ((ten, 10), (three, 3)):
        kept = np.asarray(fastervlm.select(attention, count))[0]
        assert found.grid.shape == (8, 8) and set(np.flatnonzero(found.grid)) == set(kept)


@pytest.mark.parametrize(("fuse", "count"), [(True, 33), (False, 32)])
def test_patches_that_a_tower_kept_lie_where_they_were(tokenizer, fuse, count):
    image, settings = picture(), dict(keep_ratio=0.5, prune_layers=(0,), fuse=fuse, select_layer=-1)
    model = make(tokenizer, name="evit", **settings)
    (found,) = gradcam.heat_maps(model, image, QUESTION, answer=ANSWER)
    needs = vision.Needs(last=1, cls_attention=(1, "head_mean"))
    attention = vision.encode(model.params["vision"], model.cfg.vision, np.asarray(image)[None], needs).cls_attention
    kept = np.asarray(fastervlm.select(attention, 32))[0]
    assert found.budget == count and set(np.flatnonzero(found.grid)) == set(kept)


def test_the_steps_of_a_pruned_tower_follow_one_another(tokenizer):
    model = make(tokenizer, name="dynamicvit", keep_ratio=0.5, prune_layers=(0, 1), select_layer=-1)
    (found,) = gradcam.heat_maps(model, picture(), QUESTION, answer=ANSWER)
    assert found.budget == np.count_nonzero(found.grid) == 16
    seen, stay = [], dynamicvit.select
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamicvit, "select", lambda scores, count: seen.append(stay(scores, count)) or seen[-1])
        vlm.visual_tokens(model.params, dataclasses.replace(model.cfg, remat="none"), np.asarray(picture())[None])
    first, second = (np.asarray(each)[0] for each in seen)
    assert set(np.flatnonzero(found.grid)) == set(first[second])


@pytest.mark.parametrize(
    ("name", "settings"), [("prumerge_plus", dict(keep_ratio=0.125)), ("prumerge", dict(tokens=(12,)))]
)
def test_prumerges_token_of_the_rest_has_no_place(tokenizer, name, settings):
    """With a fixed ratio, whose comb may hit what is kept already, and by outliers, of which there may be few."""
    model = make(tokenizer, name=name, **dict(keep_ratio=0.0) | settings)
    (found,) = gradcam.heat_maps(model, picture(), QUESTION, answer=ANSWER)
    assert found.grid.shape == (8, 8) and np.count_nonzero(found.grid) < found.budget
    if name == "prumerge_plus":
        assert np.count_nonzero(found.grid) > found.budget - 4


@pytest.mark.parametrize("name", ["delta", "mlp", "quecc", "honeybee_c", "average_pooling"])
def test_systems_on_a_grid(tokenizer, name):
    model = make(tokenizer, name=name, **settings_of(name, dict(scale_factor=2)))
    said = {} if name == "quecc" else dict(answer=ANSWER)  # once the model's own, which takes long to compile
    (found,) = gradcam.heat_maps(model, picture(), QUESTION, max_new_tokens=2, **said)
    side = 8 if name == "mlp" else 4
    assert found.grid.shape == (side, side) and found.budget == side**2 and found.grid.max() > 0
    assert found.log_probability < 0


@pytest.mark.parametrize("name", ["mqt", "resampler"])
def test_tokens_without_a_place_are_refused(tokenizer, name):
    cfg = tiny.get_config().model
    cfg = dataclasses.replace(cfg, projector=renamed(cfg.projector, {"name": name}))
    with pytest.raises(ConfigError, match=f"the tokens of {name} have no known place in the image"):
        gradcam.heat_maps(Model(cfg, {}, tokenizer), picture(), QUESTION)


def test_what_cannot_be_drawn_is_refused(tokenizer):
    model = make(tokenizer)
    with pytest.raises(ConfigError, match="FastV"):
        gradcam.require_places(dataclasses.replace(model.cfg, fastv=FastVConfig(layer=1)))
    with pytest.raises(ConfigError, match="64 tokens"):
        gradcam.heat_maps(model, picture(), QUESTION, budgets=(5,))
    with pytest.raises(ConfigError, match="method is 'saliency'"):
        gradcam.heat_maps(model, picture(), QUESTION, method="saliency")
    with pytest.raises(ConfigError, match="2 <image> markers for 1 images"):
        gradcam.heat_maps(model, picture(), "<image> <image>")
    with pytest.raises(ConfigError, match="no tokenizer"):
        gradcam.heat_maps(dataclasses.replace(model, tokenizer=None), picture(), QUESTION)


def test_the_overlay_is_hottest_where_the_heat_is(tokenizer):
    white = Image.new("RGB", (80, 80), "white")
    heat = np.zeros((4, 4), np.float32)
    heat[1, 3], heat[2, 0] = 5.0, 2.5
    made = np.asarray(gradcam.overlay(white, gradcam.HeatMap(heat, 16, ANSWER, 0.0))).astype(int)
    assert made.shape == (80, 80, 3)
    hot, half, cold = made[30, 70], made[50, 10], made[5, 5]
    assert hot[0] - hot[2] > 40 and cold[2] - cold[0] > 40 and half[1] > max(half[0], half[2])
    sheet = gradcam.figure(white, [gradcam.HeatMap(heat, 16, "a long answer of many words", 0.0)] * 2)
    assert sheet.width == 3 * 88 + 8 and sheet.height > 130
    flat = gradcam.overlay(white, gradcam.HeatMap(np.zeros((1, 1), np.float32), 1, "", 0.0))
    assert len(np.unique(np.asarray(flat).reshape(-1, 3), axis=0)) == 1


def test_what_the_tower_cuts_off_is_not_shown(tokenizer):
    model = make(tokenizer)
    cut = dataclasses.replace(model.cfg.vision, image_size=70)  # 8 patches of 8 and six pixels
    model = dataclasses.replace(model, cfg=dataclasses.replace(model.cfg, vision=cut))
    image = Image.new("RGB", (70, 70), "white")
    image.paste("black", (64, 0, 70, 70))
    assert np.asarray(gradcam.tower_image(model, image)).min() == 255


def test_the_door_writes_the_picture(tokenizer, monkeypatch, tmp_path, capsys):
    import deltallava_jax

    monkeypatch.setattr(deltallava_jax, "load", lambda path: make(tokenizer, name="m3", scale_factor=(2, 4)))
    picture().save(tmp_path / "in.png")
    asked = ["gradcam", "runs/m3", "--image", str(tmp_path / "in.png"), "--prompt", QUESTION, "--budgets", "16,4"]
    options = command_line.parse([*asked, "--answer", ANSWER, "--out", str(tmp_path / "made" / "heat.png")])
    options.main(options)
    printed = capsys.readouterr().out
    assert "  16 tokens: circle" in printed and "   4 tokens: circle" in printed
    assert Image.open(tmp_path / "made" / "heat.png").width == 3 * (336 + 8) + 8
    for wrong, message in ((["--budgets", "x"], "expected numbers"), (["--out", "heat.jpg"], "ends in .png")):
        options = command_line.parse([*asked, *wrong])
        with pytest.raises(ConfigError, match=message):
            options.main(options)

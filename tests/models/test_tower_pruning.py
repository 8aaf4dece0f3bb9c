"""EViT and DynamicViT: written out in PyTorch over Hugging Face's tower; keeping all is the plain tower; training."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from deltallava_jax.config import DecoderConfig, VisionConfig, compose, renamed, settings_of, system_config
from deltallava_jax.errors import ConfigError
from deltallava_jax.models import systems, vision, vlm
from deltallava_jax.models.layers import bind
from deltallava_jax.models.names import flatten
from deltallava_jax.models.systems.dynamicvit import PENALTY
from tests.models.rows import SIDE, conversation, pack, random_params

VISION = VisionConfig(image_size=SIDE, patch_size=4, width=32, layers=4, heads=2, mlp_width=48)
DECODER = DecoderConfig(vocab_size=97, width=32, layers=1, heads=2, kv_heads=2, mlp_width=48)
PATCHES = VISION.grid**2
IMAGES = np.random.default_rng(0).integers(0, 256, (2, SIDE, SIDE, 3)).astype(np.uint8)


def model(name, **changes):
    settings = dict(select_layer=-1, prune_layers=(1, 2), initializer_range=0.3)
    settings = settings_of(name, settings) | {"name": name}
    return compose(VISION, DECODER, settings | changes, dtype="float32")


@functools.cache
def params_of(cfg):
    return random_params(vlm.init_params, cfg)


def features(cfg, key=None, params=None):
    params = params or params_of(cfg)
    needs = systems.needs(cfg.projector, VISION.layers)
    prune = systems.pruning(params["projector"], cfg.projector, key)
    return jax.jit(lambda p: vision.encode(p["vision"], VISION, IMAGES, needs, prune=prune))(params)


def hugging_face(cfg):
    """CLIP's tower with our parameters, and its hidden state before layer 0."""
    torch = pytest.importorskip("torch")
    from transformers import CLIPVisionConfig, CLIPVisionModel

    from deltallava_jax.convert.families import tower_family
    from deltallava_jax.models import names

    family = tower_family(VISION)
    config = CLIPVisionConfig(**{k: v for k, v in family.to_hf(VISION).items() if k not in ("architectures",)})
    tower = CLIPVisionModel._from_config(config, attn_implementation="eager").eval()
    state = names.to_torch(params_of(cfg)["vision"], family.name_table(VISION))
    tower.load_state_dict({name: torch.from_numpy(value.copy()) for name, value in state.items()}, strict=False)
    pixels = np.asarray(vision.normalize(jnp.asarray(IMAGES), VISION)).transpose(0, 3, 1, 2)
    with torch.no_grad():
        return tower, tower.pre_layrnorm(tower.embeddings(torch.from_numpy(pixels.copy())))


def attended(layer, x):
    """(x behind the attention half of a Hugging Face layer, its attention [n, heads, N, N])."""
    y, weights = layer.self_attn(layer.layer_norm1(x), attention_mask=None)
    return x + y, weights


@pytest.mark.parametrize("ratio, fuse, tokens", [(0.7, True, 34), (0.7, False, 32), (0.3, True, 8), (0.46, True, 16)])
def test_evit_by_hand(ratio, fuse, tokens):
    cfg = model("evit", keep_ratio=ratio, fuse=fuse)
    assert systems.budgets(cfg.projector) == (tokens,)
    tower, x = hugging_face(cfg)
    import torch

    with torch.no_grad():
        for index, layer in enumerate(tower.encoder.layers):
            x, weights = attended(layer, x)
            if index in (1, 2):
                n = x.shape[1] - 1
                scores = weights.mean(1)[:, 0, 1:]
                kept = scores.topk(int(np.ceil(ratio * n)), dim=1).indices
                rows = []
                for image in range(2):
                    stay = kept[image].sort().values
                    rest = [j for j in range(n) if j not in stay.tolist()]
                    parts = [x[image, :1], x[image, 1:][stay]]
                    if fuse:
                        parts.append((x[image, 1:][rest] * scores[image, rest, None]).sum(0, keepdim=True))
                    rows.append(torch.cat(parts))
                x = torch.stack(rows)
            x = x + layer.mlp(layer.layer_norm2(x))
    found = features(cfg)
    assert found.last.shape == (2, tokens, 32) and found.kept is None
    np.testing.assert_allclose(found.last, x[:, 1:], atol=2e-5)


def torch_predictor(state, step, x):
    """The original's predictor on patches that are all still there: (keep, drop) log-probabilities."""
    import torch
    from torch import nn

    own = {name.removeprefix(f"score_predictor.{step}."): torch.from_numpy(v.copy()) for name, v in state.items()}
    inner = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 32), nn.GELU())
    outer = nn.Sequential(nn.Linear(32, 16), nn.GELU(), nn.Linear(16, 8), nn.GELU(), nn.Linear(8, 2))
    inner.load_state_dict({k[8:]: v for k, v in own.items() if k.startswith("in_conv.")})
    outer.load_state_dict({k[9:]: v for k, v in own.items() if k.startswith("out_conv.")})
    y = inner(x)
    both = torch.cat([y[..., :16], y[..., 16:].mean(1, keepdim=True).expand(-1, y.shape[1], -1)], dim=-1)
    return outer(both).log_softmax(-1)


@pytest.mark.parametrize("ratio, tokens", [(0.5, 16), (0.7, 31), (0.25, 4)])
def test_dynamicvit_by_hand(ratio, tokens):
    cfg = model("dynamicvit", keep_ratio=ratio)
    assert systems.budgets(cfg.projector) == (tokens,)
    tower, x = hugging_face(cfg)
    import torch

    state = systems.to_torch(params_of(cfg)["projector"], cfg.projector)
    with torch.no_grad():
        for index, layer in enumerate(tower.encoder.layers):
            if index in (1, 2):
                scores = torch_predictor(state, index - 1, x[:, 1:])[..., 0]
                stay = scores.topk(int(PATCHES * ratio**index), dim=1).indices.sort(dim=1).values
                x = torch.cat([x[:, :1], x[:, 1:].gather(1, stay[..., None].expand(-1, -1, 32))], dim=1)
            x, _ = attended(layer, x)
            x = x + layer.mlp(layer.layer_norm2(x))
    np.testing.assert_allclose(features(cfg).last, x[:, 1:], atol=2e-5)


@pytest.mark.parametrize("name", ["evit", "dynamicvit"])
def test_keeping_every_patch_is_the_plain_tower(name):
    cfg = model(name, keep_ratio=1.0)
    plain = vision.encode(params_of(cfg)["vision"], VISION, IMAGES, vision.Needs(last=VISION.layers))
    assert systems.budgets(cfg.projector) == (PATCHES,)
    np.testing.assert_allclose(features(cfg).last, plain.last, atol=1e-5)


def test_a_patch_that_is_masked_out_is_as_good_as_gone():
    """In a layer, what is kept sees just what is kept."""
    layer = bind(vision.Layer, VISION, jax.tree.map(lambda x: x[0], params_of(model("evit"))["vision"]["layers"]))
    x = np.random.default_rng(1).standard_normal((2, 1 + PATCHES, 32)).astype(np.float32)
    kept = np.random.default_rng(2).integers(0, 2, PATCHES)
    there = np.flatnonzero(np.concatenate([[1], kept]))
    masked = layer(x, jnp.broadcast_to(kept.astype(np.float32), (2, PATCHES)))
    np.testing.assert_allclose(masked[:, there], layer(x[:, there]), atol=2e-5)


CFG = model("dynamicvit", keep_ratio=0.5)
MLP = renamed(CFG.projector, {"name": "mlp"})
RNG = np.random.default_rng(3)
BATCH = pack([[conversation(RNG, 9, images=1), conversation(RNG, 8, images=1)]], 18, 2)


@functools.partial(jax.jit, static_argnames="train")
def loss(params, key, train=True):
    return vlm.loss(params, CFG, BATCH, key, train=train)


def test_training_masks_what_is_dropped_and_asks_for_the_share():
    key = jax.random.key(5)
    found = features(CFG, key)
    kept = np.asarray(found.kept)
    assert set(np.unique(kept.round(5))) == {0.0, 1.0} and found.last.shape[1] == PATCHES
    tokens, valid, penalty = vlm.visual_tokens(params_of(CFG), CFG, IMAGES, key=key)
    assert tokens.shape == (2, 16, 32)
    np.testing.assert_array_equal(valid.sum(1), np.minimum((kept > 0.5).sum(1), 16))
    assert not np.asarray(tokens)[~np.asarray(valid)].any()
    mlp = {name: params_of(CFG)["projector"][name] for name in ("up", "down")}
    everything = systems.project(mlp, MLP, found)
    for image in range(2):  # what is there are kept patches, in reading order
        theirs = np.asarray(everything)[image][kept[image] > 0.5]
        places = [int(np.abs(theirs - token).sum(1).argmin()) for token in np.asarray(tokens)[image][valid[image]]]
        assert places == sorted(set(places))
        np.testing.assert_allclose(np.asarray(tokens)[image][valid[image]], theirs[places], atol=1e-5)
    # The second step's share is a quarter; the first's, half, is of those the first step kept.
    assert penalty >= PENALTY * ((kept.mean(1) - 0.25) ** 2).mean() / 2
    assert loss(params_of(CFG), key) != loss(params_of(CFG), jax.random.key(6))
    plain = loss(params_of(CFG), key, train=False)
    assert plain == loss(params_of(CFG), jax.random.key(6), train=False)


def test_every_predictor_gets_gradients_through_the_answers_too():
    gradients = jax.jit(jax.grad(lambda p: vlm.loss(p, CFG, BATCH, jax.random.key(0))))(params_of(CFG))
    for path, gradient in flatten(gradients["projector"]).items():
        assert np.isfinite(gradient).all() and np.any(gradient), path
    no_penalty = jax.jit(jax.grad(lambda p: vlm.visual_tokens(p, CFG, IMAGES, key=jax.random.key(0))[0].sum()))
    for path, gradient in flatten(no_penalty(params_of(CFG))["projector"]).items():
        assert np.any(gradient), path


def test_training_brings_the_share_to_the_ratio():
    cfg = model("dynamicvit", keep_ratio=0.25, prune_layers=(1,), initializer_range=0.02)
    params = vlm.init_params(cfg, jax.random.key(0))
    optimizer = optax.adam(1e-2)

    @jax.jit
    def step(params, moments, key):
        see = lambda p: vlm.visual_tokens(p, cfg, IMAGES, key=key)
        share = features(cfg, key, params).kept.mean()
        updates, moments = optimizer.update(jax.grad(lambda p: see(p)[2])(params), moments, params)
        return optax.apply_updates(params, updates), moments, share

    moments, shares = optimizer.init(params), []
    for key in jax.random.split(jax.random.key(1), 40):
        params, moments, share = step(params, moments, key)
        shares.append(float(share))
    assert abs(np.mean(shares[:3]) - 0.5) < 0.15 and abs(np.mean(shares[-5:]) - 0.25) < 0.08


@pytest.mark.parametrize("name", ["evit", "dynamicvit"])
def test_settings_that_cannot_work_are_refused(name):
    with pytest.raises(ConfigError, match="prune_layers=\\(6, 12, 18\\); the tower is read after 4 layers"):
        systems.needs(system_config(name=name, grid=8, select_layer=-1), 4)
    with pytest.raises(ConfigError, match="expected ascending layers"):
        system_config(name=name, prune_layers=(2, 1))
    with pytest.raises(ConfigError, match="keep_ratio=0.0"):
        systems.budgets(system_config(name=name, keep_ratio=0.0))
    siglip = dataclasses.replace(VISION, family="siglip")
    with pytest.raises(ConfigError, match="a siglip tower has no CLS token"):
        vision.encode({}, siglip, IMAGES, systems.needs(model(name).projector, 4))

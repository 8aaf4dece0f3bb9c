"""The towers against Hugging Face's CLIP and SigLIP: hidden states, attention, keys, gradients, pixels."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel  # noqa: E402
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil  # noqa: E402

from deltallava_jax.config import VisionConfig  # noqa: E402
from deltallava_jax.models import vision  # noqa: E402
from deltallava_jax.models.vision import Needs  # noqa: E402
from tests.models import hf  # noqa: E402
from tests.models.rows import assert_trees_close  # noqa: E402

# 34 pixels leave a remainder of two, which the patch convolution cuts off.
SIZES = dict(image_size=34, patch_size=8, width=32, layers=3, heads=4, mlp_width=48)
CLIP = VisionConfig(**SIZES, norm_eps=1e-2)
SIGLIP = VisionConfig(**SIZES, family="siglip", norm_eps=1e-6)
TOLERANCE = dict(atol=2e-5, rtol=1e-5)


def hugging_face(cfg: VisionConfig):
    clip = cfg.family == "clip"
    config, model = (CLIPVisionConfig, CLIPVisionModel) if clip else (SiglipVisionConfig, SiglipVisionModel)
    config = config(
        image_size=cfg.image_size,
        patch_size=cfg.patch_size,
        hidden_size=cfg.width,
        num_hidden_layers=cfg.layers,
        num_attention_heads=cfg.heads,
        intermediate_size=cfg.mlp_width,
        layer_norm_eps=cfg.norm_eps,
    )
    return hf.randomise(model._from_config(config, attn_implementation="eager"), seed=2)


def pixels(cfg: VisionConfig) -> np.ndarray:
    return np.random.default_rng(3).standard_normal((2, cfg.image_size, cfg.image_size, 3)).astype(np.float32)


def outputs(model, images: np.ndarray):
    channels_first = torch.tensor(images.transpose(0, 3, 1, 2))
    return model(channels_first, output_hidden_states=True, output_attentions=True)


@pytest.fixture(scope="module")
def clip():
    """(their model, its outputs, our parameters, our encode of the same pixels, compiled)."""
    model = hugging_face(CLIP)

    @functools.partial(jax.jit, static_argnums=1)
    def encode(params, needs):
        return [vision.encode(params, CLIP, pixels(CLIP), each) for each in needs]

    return model, outputs(model, pixels(CLIP)), hf.tower(hf.arrays(model)), encode


@pytest.mark.parametrize("cfg", [CLIP, SIGLIP], ids=lambda cfg: cfg.family)
def test_hidden_states(cfg):
    """Every hidden state, CLS included, and SigLIP's final norm."""
    model = hugging_face(cfg)
    theirs = outputs(model, pixels(cfg))

    @jax.jit
    def ours(params):
        first = vision.embed(params, cfg, pixels(cfg))
        hidden = [vision.forward(params, cfg, first, (0, k)) for k in range(cfg.layers + 1)]
        return hidden, vision.bind(vision.FinalNorm, cfg, params["final"])(hidden[-1])

    hidden, normed = ours(hf.tower(hf.arrays(model)))
    assert len(hidden) == len(theirs.hidden_states)
    for k, (mine, reference) in enumerate(zip(hidden, theirs.hidden_states, strict=True)):
        np.testing.assert_allclose(mine, reference.detach(), **TOLERANCE, err_msg=f"hidden state {k}")
    if cfg.family == "siglip":
        np.testing.assert_allclose(normed, theirs.last_hidden_state.detach(), **TOLERANCE)
    else:
        np.testing.assert_allclose(normed[:, 0], theirs.pooler_output.detach(), **TOLERANCE)


def test_encode_returns_what_is_needed(clip):
    """last, levels in the order asked for, attention and keys of layers before, at and after ``last``."""
    model, theirs, params, encode = clip
    needs = (
        Needs(last=2),
        Needs(last=1, levels=(3, 0, 2, 2), cls_attention=(3, "head_mean"), keys=2),
        Needs(last=3, cls_attention=(1, "one_head"), keys=3),
    )
    plain, full, other = encode(params, needs)
    states = [state.detach().numpy()[:, 1:] for state in theirs.hidden_states]
    for features, last in ((plain, 2), (full, 1), (other, 3)):
        np.testing.assert_allclose(features.last, states[last], **TOLERANCE)
        assert features.grid == (4, 4)
    assert plain.levels is plain.cls_attention is plain.keys is None
    np.testing.assert_allclose(full.levels, np.concatenate([states[i] for i in (3, 0, 2, 2)], -1), **TOLERANCE)

    head_mean = theirs.attentions[2].detach().numpy()[:, :, 0, 1:].mean(1)
    np.testing.assert_allclose(full.cls_attention, head_mean, **TOLERANCE)
    q, keys = queries_and_keys(model, theirs, layer=1)
    np.testing.assert_allclose(other.cls_attention, one_head(q, keys), **TOLERANCE)
    assert np.abs(other.cls_attention - theirs.attentions[0].detach().numpy()[:, :, 0, 1:].mean(1)).max() > 1e-2
    for features, layer in ((full, 2), (other, 3)):
        np.testing.assert_allclose(features.keys, queries_and_keys(model, theirs, layer)[1][:, 1:], **TOLERANCE)


def queries_and_keys(model, theirs, layer: int):
    """Projections of a layer (from 1) before the head split, CLS first, by their modules."""
    block = model.encoder.layers[layer - 1]
    normed = block.layer_norm1(theirs.hidden_states[layer - 1])
    return block.self_attn.q_proj(normed).detach().numpy(), block.self_attn.k_proj(normed).detach().numpy()


def one_head(q, keys):
    """PruMerge's attention of CLS: one head over the full width, CLS dropped after the softmax."""
    scores = np.einsum("nc,ntc->nt", q[:, 0].astype(float), keys) / np.sqrt(q.shape[-1])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return (weights / weights.sum(-1, keepdims=True))[:, 1:]


def test_encode_stops_at_the_last_layer_needed(clip):
    """A poisoned third layer reaches nothing that needs two layers."""
    _, _, params, encode = clip
    poisoned = {**params, "layers": jax.tree.map(lambda x: np.stack([*x[:2], x[2] * np.nan]), params["layers"])}
    needs = (Needs(last=2), Needs(last=1, levels=(2, 0), keys=2), Needs(last=3))
    short, levels, through = encode(poisoned, needs)
    assert np.isfinite(short.last).all() and np.isfinite(levels.levels).all() and np.isfinite(levels.keys).all()
    assert np.isnan(through.last).all()


def test_gradients(clip):
    """Of a loss on the last layer and two levels, with respect to every parameter of the tower."""
    model, theirs, params, _ = clip
    weight = np.random.default_rng(4).standard_normal((2, 16, 3 * 32)).astype(np.float32) / 16
    model.zero_grad()
    (torch.cat([theirs.hidden_states[i][:, 1:] for i in (3, 1, 2)], -1) * torch.tensor(weight)).sum().backward()

    def loss(params):
        features = vision.encode(params, CLIP, pixels(CLIP), Needs(last=3, levels=(1, 2)))
        return (jnp.concatenate([features.last, features.levels], -1) * weight).sum()

    reference = hf.tower(hf.gradients(model))
    assert_trees_close(jax.jit(jax.grad(loss))(params), reference)
    assert np.abs(reference["layers"]["q"]["kernel"][2]).max() > 1e-3


def test_uint8_images_are_normalised_like_the_image_processor(clip):
    _, _, params, _ = clip
    images = np.random.default_rng(5).integers(0, 256, (2, 34, 34, 3), dtype=np.uint8)
    images[0, 0, 0], images[0, 0, 1] = 0, 255
    processor = CLIPImageProcessorPil(do_resize=False, do_center_crop=False, do_convert_rgb=False)
    processed = processor(list(images), return_tensors="np")["pixel_values"].transpose(0, 2, 3, 1)
    np.testing.assert_allclose(vision.normalize(images, CLIP), processed, atol=1e-6)
    formula = (images / 255.0 - np.array(CLIP.image_mean)) / np.array(CLIP.image_std)
    np.testing.assert_allclose(processed, formula, atol=1e-6)

    encode = jax.jit(lambda params, images: vision.encode(params, CLIP, images, Needs(last=1)).last)
    np.testing.assert_allclose(encode(params, images), encode(params, processed), **TOLERANCE)

"""The whole model against stored outputs of Hugging Face's LLaVA: CLIP, MLP projector, Llama or Qwen2."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deltallava_jax.config import DecoderConfig, VisionConfig, compose
from deltallava_jax.models import vlm
from deltallava_jax.sequence import Batch
from tests import golden
from tests.models import hf

VISION = VisionConfig(image_size=56, patch_size=14, width=64, layers=4, heads=4, mlp_width=256)
SIZES = dict(vocab_size=320, width=128, layers=4, heads=8, kv_heads=4, mlp_width=256)
DECODERS = {
    "llava_hf": DecoderConfig(**SIZES),
    "llava_hf_qwen2": DecoderConfig(**SIZES, norm_eps=1e-6, rope_base=1e6, qkv_bias=True),
}
IMAGE_TOKEN, V = 319, 16


def parameters(item: str) -> dict:
    state = golden.state_dict(item)
    dense = lambda name: {"kernel": state[f"{name}.weight"].T, "bias": state[f"{name}.bias"]}
    return {
        "vision": hf.tower(state, "model.vision_tower."),
        "projector": {
            "up": dense("model.multi_modal_projector.linear_1"),
            "down": dense("model.multi_modal_projector.linear_2"),
        },
        "decoder": hf.llama(state, "model.language_model."),
    }


def batch(stored: dict) -> Batch:
    """Their rows with each run of V image tokens closed to one placeholder; the pixels are floats, normalised."""
    ids = stored["input_ids"]
    first = np.array([np.flatnonzero(row == IMAGE_TOKEN)[0] for row in ids])
    kept = np.stack([np.delete(np.arange(ids.shape[1]), np.arange(at + 1, at + V)) for at in first])
    closed = lambda values: np.take_along_axis(values, kept, axis=1)
    tokens = closed(ids)
    return Batch(
        tokens=jnp.asarray(np.where(tokens == IMAGE_TOKEN, 0, tokens)),
        loss_mask=jnp.asarray(closed(stored["labels"]) != -100),
        segments=jnp.asarray(closed(stored["attention_mask"])),
        image_positions=jnp.asarray(first[:, None], jnp.int32),
        images=golden.inputs("pixel_values", (2, 3, 56, 56)).transpose(0, 2, 3, 1)[:, None],
    )


@pytest.mark.parametrize("item", DECODERS)
def test_llava(item):
    """Visual tokens, logits at every token (the rows of both sides are the same), and the loss."""
    cfg = compose(VISION, DECODERS[item], dict(name="mlp"), dtype="float32", loss_chunk=10)
    params, stored = parameters(item), golden.outputs(item)
    rows = batch(stored)

    @jax.jit
    def ours(params):
        visual, *_ = vlm.visual_tokens(params, cfg, rows.images[:, 0])
        return visual, vlm.logits(params, cfg, rows), vlm.loss(params, cfg, rows, None, train=False)

    visual, logits, loss = ours(params)
    live = stored["attention_mask"] == 1
    np.testing.assert_allclose(visual, stored["image_features"], atol=5e-5, rtol=1e-4)
    np.testing.assert_allclose(logits[live], stored["logits"][live], atol=1e-4, rtol=1e-4)
    np.testing.assert_allclose(loss, stored["loss"], atol=1e-5, rtol=0)

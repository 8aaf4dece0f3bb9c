"""The towers against stored outputs of Hugging Face's CLIP and SigLIP; weights and pixels by the golden formula."""

import jax
import numpy as np
import pytest

from deltallava_jax.config import VisionConfig
from deltallava_jax.models import vision
from tests import golden
from tests.models import hf

SIZES = dict(image_size=56, patch_size=14, width=64, layers=4, heads=4, mlp_width=256)
TOWERS = {
    "clip_vision": VisionConfig(**SIZES, norm_eps=1e-5),
    "siglip_vision": VisionConfig(**SIZES, family="siglip", norm_eps=1e-6),
}


@pytest.mark.parametrize("item", TOWERS)
def test_hidden_states(item):
    cfg, stored = TOWERS[item], golden.outputs(item)
    images = golden.inputs("pixel_values", (2, 3, 56, 56)).transpose(0, 2, 3, 1)

    @jax.jit
    def ours(params):
        hidden = [vision.embed(params, cfg, images)]
        for k in range(cfg.layers):
            hidden.append(vision.forward(params, cfg, hidden[-1], (k, k + 1)))
        return hidden, vision.bind(vision.FinalNorm, cfg, params["final"])(hidden[-1])

    hidden, normed = ours(hf.tower(golden.state_dict(item)))
    for k, state in enumerate(hidden):
        np.testing.assert_allclose(state, stored[f"hidden_{k}"], atol=5e-5, rtol=1e-5, err_msg=f"hidden state {k}")
    if cfg.family == "clip":  # the final norm touches only the pooled CLS
        np.testing.assert_allclose(normed[:, 0], stored["pooler_output"], atol=5e-5, rtol=1e-5)
    else:
        np.testing.assert_allclose(normed, stored["last_hidden_state"], atol=5e-5, rtol=1e-5)

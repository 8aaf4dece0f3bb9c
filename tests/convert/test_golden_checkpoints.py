"""The golden LLaVA models as Hugging Face folders through the converter: stored logits and 16 stored greedy tokens.

Needs no torch."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from deltallava_jax.convert.read import read
from deltallava_jax.data.conversation import Tokenized
from deltallava_jax.inference.generate import Engine, prompt_batch
from deltallava_jax.inference.sampling import Sampling
from deltallava_jax.models import vlm
from tests import golden
from tests.models import test_llava_golden

V, IMAGE_TOKEN = test_llava_golden.V, test_llava_golden.IMAGE_TOKEN


@pytest.fixture(params=test_llava_golden.DECODERS)
def golden_model(request, tmp_path):
    """(stored outputs, the model read from a folder) with the names of current transformers."""
    item = request.param
    state = {name: np.ascontiguousarray(value) for name, value in golden.state_dict(item).items()}
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(golden.read_json(f"{item}_config")["config"]))
    return golden.outputs(item), read(tmp_path)


def prompt(ids: np.ndarray) -> Tokenized:
    """Their prompt with the run of V image tokens closed to one placeholder."""
    at = int(np.flatnonzero(ids == IMAGE_TOKEN)[0])
    ids = np.delete(ids, np.arange(at + 1, at + V))
    ids[at] = 0
    nothing = np.zeros(len(ids), np.int32)
    return Tokenized(ids, nothing.astype(bool), np.array([at], np.int32), nothing, np.zeros((1, 0), np.int32))


def test_logits_and_greedy_tokens(golden_model):
    stored, model = golden_model
    rows = test_llava_golden.batch(stored)
    live = stored["attention_mask"] == 1
    logits = np.asarray(jax.jit(lambda params: vlm.logits(params, model.cfg, rows))(model.params))
    np.testing.assert_allclose(logits[live], stored["logits"][live], atol=1e-4, rtol=1e-4)

    prompts = [prompt(stored["gen0_prompt"]), prompt(stored["gen1_prompt"])]
    images = golden.inputs("pixel_values", (2, 3, 56, 56)).transpose(0, 2, 3, 1)
    engine = Engine(model.params, model.cfg)
    visual, _ = engine.encode(images, budget=V)
    length = max(len(one.ids) for one in prompts)
    mine = engine.tokens(prompt_batch(prompts, length), visual, None, Sampling(max_new_tokens=16), end=-1)
    assert mine == [stored["gen0_tokens"].tolist(), stored["gen1_tokens"].tolist()]

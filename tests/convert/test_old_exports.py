"""Exports that an earlier version wrote are read as they were then."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

import deltallava_jax
from deltallava_jax.convert.read import read
from deltallava_jax.data import tokens
from deltallava_jax.data.conversation import TEMPLATES, prompt_conversation, tokenize
from deltallava_jax.inference.generate import prompt_batch
from deltallava_jax.models import vlm

V1 = Path(__file__).parents[1] / "testdata" / "v1"
QUESTION = "what color is the shape?"


@pytest.fixture(scope="module")
def saved() -> dict[str, np.ndarray]:
    return dict(np.load(V1 / "exports.npz"))


@pytest.mark.parametrize("name", ["mlp_hf", "delta_hf", "delta_llava"])
def test_an_old_export_gives_the_same_logits_and_tokens(name, saved):
    model = read(V1 / name, progress=False)
    prompt = tokenize(prompt_conversation([(QUESTION, None)], 1), TEMPLATES["vicuna_v1"], tokens.load(V1 / name))
    batch = dataclasses.replace(prompt_batch([prompt], len(prompt.ids)), images=saved["picture"][None, None])
    logits = jax.jit(lambda params: vlm.logits(params, model.cfg, batch))(model.params)
    np.testing.assert_allclose(logits[0, -1], saved[name], atol=1e-5)
    answer = deltallava_jax.load(V1 / name, dtype="float32").stream(saved["picture"], QUESTION, max_new_tokens=8)
    answer.whole()
    assert answer.ids == saved[f"{name}_ids"].tolist()

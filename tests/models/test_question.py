"""QueCC in the whole model: the question is read by the decoder on its own, and no gradient goes through it."""

from dataclasses import replace
from io import BytesIO

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from deltallava_jax.config import DataConfig, DecoderConfig, VisionConfig, compose
from deltallava_jax.data import tokens
from deltallava_jax.data.pipeline import Rows
from deltallava_jax.data.records import Record
from deltallava_jax.inference.generate import prompt_batch
from deltallava_jax.inference.model import Model
from deltallava_jax.models import decoder, vlm
from deltallava_jax.models.names import flatten
from deltallava_jax.sequence import Batch
from tests.models.rows import text_layout

CFG = compose(
    VisionConfig(image_size=32, patch_size=8, width=32, layers=2, heads=2, mlp_width=64),
    DecoderConfig(vocab_size=50, width=24, layers=2, heads=2, kv_heads=2, mlp_width=32, initializer_range=0.3),
    dict(name="quecc", scale_factor=2, head_dim=16, level_count=2, question_length=4, initializer_range=0.2),
    dtype="float32",
)
PARAMS = vlm.init_params(CFG, jax.random.key(0))

FILE = BytesIO()
Image.new("RGB", (40, 30), "red").save(FILE, "PNG")
PICTURE = FILE.getvalue()


def batch():
    """Two rows: two images with questions of three and of four tokens; one image, its second place unused."""
    tokens = np.random.default_rng(0).integers(1, 50, (2, 14)).astype(np.int32)
    tokens[0, [1, 6]] = tokens[1, 2] = 0
    asked = np.array([[[7, 0, 9, -1], [3, 8, 2, 4]], [[7, 8, 9, -1], [-1] * 4]], np.int32)  # id 0 is a token like any
    return Batch(
        tokens, np.ones((2, 14), bool), np.ones((2, 14), np.int32), np.array([[1, 6], [2, 14]], np.int32),
        np.random.default_rng(1).integers(0, 256, (2, 2, 32, 32, 3)).astype(np.uint8), questions=asked,
    )  # fmt: skip


def test_a_question_is_read_alone_and_its_last_state_taken():
    rows = batch()
    found = vlm.question_states(PARAMS, CFG, jax.tree.map(jnp.asarray, rows))
    assert found.shape == (4, 24) and not found[3].any()  # the unused place
    for place, asked in enumerate(rows.questions.reshape(4, 4)[:3]):
        tokens = jnp.asarray(asked[None, asked >= 0])
        hidden = decoder.embed(PARAMS["decoder"], CFG.decoder, tokens)
        hidden, _ = decoder.forward(
            PARAMS["decoder"], CFG.decoder, hidden, text_layout(np.ones(tokens.shape, np.int32))
        )
        expected = decoder.finish(PARAMS["decoder"], CFG.decoder, hidden)[0, -1]
        np.testing.assert_allclose(found[place], expected, atol=1e-5)


def test_data_rows_and_prompts_hold_the_same_question():
    tokenizer = tokens.train(["What is it? a cat of two"], 300)
    turns = [("human", "<image>\nWhat is it?"), ("gpt", "a cat"), ("human", " <image> of two? "), ("gpt", "two")]
    record = Record("0", (PICTURE,) * 2, [{"from": who, "value": said} for who, said in turns])
    batch, faults = Rows([record], tokenizer, DataConfig(), CFG.vision, 16).build([[0]], 400, 3)
    assert not faults
    model = Model(replace(CFG, projector=replace(CFG.projector, question_length=16)), {}, tokenizer, "vicuna_v1")
    prompt = model.ask([(turns[0][1], "a cat"), ("<image>\nof two?", None)], [PICTURE] * 2)
    np.testing.assert_array_equal(batch.questions[:, :2], prompt_batch([prompt], 400).questions)
    assert (batch.questions[0, 2] == -1).all() and (batch.questions[0, :2, 0] == tokenizer.bos).all()


def test_the_question_changes_the_image_and_gets_no_gradient():
    rows = batch()
    other = replace(rows, questions=rows.questions + (rows.questions >= 0))
    images = rows.images.reshape(4, 32, 32, 3)
    tokens, *_ = vlm.visual_tokens(PARAMS, CFG, images, rows)
    changed, *_ = vlm.visual_tokens(PARAMS, CFG, images, other)
    assert np.abs(tokens[:3] - changed[:3]).max() > 1e-3

    gradients = jax.grad(lambda p: (vlm.visual_tokens(p, CFG, images, rows)[0] ** 2).sum())(PARAMS)
    assert all(not leaf.any() for leaf in flatten(gradients["decoder"]).values())
    assert gradients["projector"]["text"]["kernel"].any()

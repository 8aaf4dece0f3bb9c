"""Converted Hugging Face models against transformers' own: hidden states, logits, gradients, greedy tokens.

Everything runs through files: save_pretrained, then the converter, in float32."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

import transformers  # noqa: E402

from deltallava_jax.convert.families import DECODERS, TOWERS, decoder_family, tower_family  # noqa: E402
from deltallava_jax.convert.read import read  # noqa: E402
from deltallava_jax.inference.generate import Engine, prompt_batch  # noqa: E402
from deltallava_jax.inference.sampling import Sampling  # noqa: E402
from deltallava_jax.models import decoder, vision, vlm  # noqa: E402
from deltallava_jax.sequence import layout  # noqa: E402
from tests.convert import checkpoints  # noqa: E402
from tests.models.rows import assert_trees_close, text_layout  # noqa: E402

TOKENS = 16  # an image, in the MLP models


@dataclasses.dataclass
class Result:
    """Logits of all live slots, row after row, and the gradients of a random weighting of them."""

    logits: np.ndarray
    gradients: dict


def weights(shape: tuple[int, int]) -> np.ndarray:
    return np.random.default_rng(9).standard_normal(shape).astype(np.float32) / 16


def theirs(name: str, folder, inputs: dict) -> Result:
    """The gradients are saved like a model and read by the converter, so that names and axes become ours."""
    model = checkpoints.MODELS[name]()
    model.load_state_dict(checkpoints.model(name).state_dict())
    logits = model.eval()(**inputs).logits[inputs["attention_mask"].bool()]
    (logits * torch.tensor(weights(tuple(logits.shape)))).sum().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    model.save_pretrained(folder)
    return Result(logits.detach().numpy(), read(folder).params)


def ours(params: dict, forward, live: np.ndarray) -> Result:
    """forward(params) -> [B, S, vocab]; live [B, S]."""
    weight = np.zeros(jax.eval_shape(forward, params).shape, np.float32)
    weight[live] = weights(weight[live].shape)

    def loss(params):
        logits = forward(params)
        return (logits * weight).sum(), logits

    (_, logits), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return Result(np.asarray(logits)[live], gradients)


def decoder_logits(params, cfg, tokens, live):
    hidden = decoder.embed(params["decoder"], cfg, tokens)
    hidden, _ = decoder.forward(params["decoder"], cfg, hidden, text_layout(live))
    return decoder.logits(params["decoder"], cfg, decoder.finish(params["decoder"], cfg, hidden))


@pytest.fixture(scope="module", params=checkpoints.DECODERS)
def text(request, opened, tmp_path_factory):
    """(name, the model read, our result, theirs) of a decoder on rows of 40 and 23 tokens."""
    name = request.param
    read_model = opened(name)
    inputs = checkpoints.torch_rows(checkpoints.rows_of([0, 0], [40, 23]))
    live = inputs["attention_mask"].numpy() == 1
    forward = lambda params: decoder_logits(params, read_model.cfg.decoder, inputs["input_ids"].numpy(), live)
    mine = ours(read_model.params, forward, live)
    return name, read_model, mine, theirs(name, tmp_path_factory.mktemp("gradients"), inputs)


@pytest.fixture(scope="module", params=checkpoints.LLAVAS)
def llava(request, opened, tmp_path_factory):
    """(name, the model read, our result, theirs) on rows of one, two and no images."""
    name = request.param
    read_model = opened(name)
    rows, images = checkpoints.rows_of([1, 2, 0], [12, 9, 20]), checkpoints.pixels(3)
    batch = checkpoints.our_batch(rows, images)
    live = np.asarray(layout(batch, None, TOKENS).segments) > 0
    mine = ours(read_model.params, lambda params: vlm.logits(params, read_model.cfg, batch), live)
    inputs = checkpoints.torch_rows(rows, TOKENS) | {"pixel_values": checkpoints.torch_pixels(images)}
    return name, read_model, mine, theirs(name, tmp_path_factory.mktemp("gradients"), inputs)


def assert_logits_equal(mine: Result, reference: Result):
    assert mine.logits.shape == reference.logits.shape
    assert reference.logits.std() > 0.3
    np.testing.assert_allclose(mine.logits, reference.logits, atol=1e-4, rtol=1e-4)


def test_decoder_logits(text):
    _, _, mine, reference = text
    assert_logits_equal(mine, reference)


def test_decoder_gradients(text):
    """Of every parameter; each of them is reached."""
    _, _, mine, reference = text
    assert all(np.abs(leaf).max() > 1e-3 for leaf in jax.tree.leaves(reference.gradients))
    assert_trees_close(mine.gradients, reference.gradients, atol=1e-4, rtol=1e-3)


def test_llama3_rope_scaling_matters_at_this_length(opened):
    """The test's rows are long enough that plain rotary positions would give other logits."""
    model = opened("llama3")
    cfg = model.cfg.decoder
    assert cfg.rope_scaling is not None and cfg.rope_scaling.original_length == 16
    tokens, live = checkpoints.rows_of([0], [40])[0].ids[None], np.ones((1, 40), bool)
    scaled, plain = (
        decoder_logits(model.params, each, tokens, live) for each in (cfg, dataclasses.replace(cfg, rope_scaling=None))
    )
    assert np.abs(scaled - plain).max() > 0.1


def test_llava_logits(llava):
    _, _, mine, reference = llava
    assert_logits_equal(mine, reference)


def test_llava_gradients(llava):
    """Of every parameter of tower, projector and decoder; the tower's last layer is not used by either side."""
    _, _, mine, reference = llava
    assert_trees_close(mine.gradients, reference.gradients, atol=1e-4, rtol=1e-3)
    assert np.abs(reference.gradients["vision"]["embeddings"]["patch"]["kernel"]).max() > 1e-3
    assert np.abs(reference.gradients["projector"]["up"]["kernel"]).max() > 1e-3


def their_tokens(name: str, inputs: dict) -> list[list[int]]:
    model = checkpoints.model(name)
    model.generation_config.eos_token_id = None
    out = model.generate(**inputs, do_sample=False, max_new_tokens=16, pad_token_id=0)
    return out[:, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("name", ["llama3", "qwen2"])
def test_greedy_tokens_of_a_decoder(name, opened):
    """16 tokens after prompts of unequal length; with Llama 3's rope the positions pass the original context."""
    model, rows = opened(name), checkpoints.rows_of([0, 0], [14, 5])
    mine = Engine(model.params, model.cfg).tokens(prompt_batch(rows, 14), sampling=Sampling(max_new_tokens=16), end=-1)
    assert mine == their_tokens(name, checkpoints.torch_rows(rows, left=True))


def test_greedy_tokens_of_llava(opened):
    model, images = opened("llava"), checkpoints.pixels(2)
    rows = checkpoints.rows_of([1, 1], [12, 6])
    engine = Engine(model.params, model.cfg)
    visual, _ = engine.encode(images, budget=TOKENS)
    mine = engine.tokens(prompt_batch(rows, 12), visual, None, Sampling(max_new_tokens=16), end=-1)
    inputs = checkpoints.torch_rows(rows, TOKENS, left=True) | {"pixel_values": checkpoints.torch_pixels(images)}
    assert mine == their_tokens("llava", inputs)


@pytest.mark.parametrize("name", checkpoints.TOWERS)
def test_hidden_states_of_a_tower(name, opened):
    """Every hidden state, CLS included, and the final norm."""
    read_model, images = opened(name), checkpoints.pixels(2)
    assert read_model.cfg.projector is None and read_model.cfg.decoder is None
    model = checkpoints.model(name)
    model = model.vision_model if name.endswith("_pair") else model
    with torch.no_grad():
        reference = model(checkpoints.torch_pixels(images), output_hidden_states=True)
    cfg, params = read_model.cfg.vision, read_model.params["vision"]

    @jax.jit
    def run(params):
        hidden = [vision.embed(params, cfg, jnp.asarray(images))]
        for k in range(cfg.layers):
            hidden.append(vision.forward(params, cfg, hidden[-1], (k, k + 1)))
        return hidden, vision.bind(vision.FinalNorm, cfg, params["final"])(hidden[-1])

    hidden, normed = run(params)
    assert len(hidden) == len(reference.hidden_states)
    for k, (mine, state) in enumerate(zip(hidden, reference.hidden_states, strict=True)):
        np.testing.assert_allclose(mine, state, atol=1e-4, rtol=1e-4, err_msg=f"hidden state {k}")
    if cfg.family == "siglip":
        np.testing.assert_allclose(normed, reference.last_hidden_state, atol=1e-4, rtol=1e-4)
    else:
        np.testing.assert_allclose(normed[:, 0], reference.pooler_output, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_pixels_are_normalised_as_preprocessor_config_says(name, saved, opened):
    from transformers import AutoImageProcessor

    cfg = opened(name).cfg.vision
    image = np.random.default_rng(2).integers(0, 256, (checkpoints.SIDE, checkpoints.SIDE, 3), dtype=np.uint8)
    processor = AutoImageProcessor.from_pretrained(saved(name))
    reference = processor(image, return_tensors="np", input_data_format="channels_last")["pixel_values"]
    mine = vision.normalize(jnp.asarray(image)[None], cfg)
    np.testing.assert_allclose(mine, np.asarray(reference).transpose(0, 2, 3, 1), atol=1e-5)


@pytest.mark.parametrize("kind", [*DECODERS, *TOWERS])
def test_missing_keys_have_the_defaults_of_transformers(kind):
    """Published checkpoints rely on them; and what we write says the same to transformers as to us."""
    family = {**DECODERS, **TOWERS}[kind]
    default = transformers.AutoConfig.for_model(kind)
    mine = family.to_ours({})
    assert mine == family.to_ours(default.to_dict())
    back = (decoder_family if kind in DECODERS else tower_family)(mine)
    assert back is family
    written = transformers.AutoConfig.for_model(**family.to_hf(mine)).to_dict()
    assert family.to_ours(written) == mine

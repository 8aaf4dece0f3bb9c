"""Our models in transformers: what write_hf writes gives the same logits and the same text there as here."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from transformers import (  # noqa: E402
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    LlavaForConditionalGeneration,
)

from deltallava_jax.config import Config, OptimizerConfig, to_dict  # noqa: E402
from deltallava_jax.convert.workdir import read_workdir, write_workdir  # noqa: E402
from deltallava_jax.inference.generate import Engine, prompt_batch  # noqa: E402
from deltallava_jax.inference.sampling import Sampling  # noqa: E402
from deltallava_jax.models import systems, vlm  # noqa: E402
from deltallava_jax.models.names import flatten  # noqa: E402
from deltallava_jax.training.checkpoints import Checkpoints  # noqa: E402
from deltallava_jax.training.optimizer import split  # noqa: E402
from deltallava_jax.training.step import TrainState  # noqa: E402
from tests.convert import checkpoints  # noqa: E402
from tests.convert.checkpoints import (  # noqa: E402
    assert_same_bits,
    our_batch,
    pixels,
    rows_of,
    tensors,
    torch_pixels,
    torch_rows,
)
from tests.convert.exports import DELTA, assert_close, exported, loaded, our_logits, our_tokens  # noqa: E402

# ------------------------------------------------------------------ MLP models: transformers' own LLaVA


@pytest.mark.parametrize(
    "tower, decoder, dtype",
    [("clip", "qwen2", "float32"), ("siglip", "llama3", "float32"), ("clip_pair", "llama", "bfloat16")],
)
def test_an_mlp_model_is_a_llava(tower, decoder, dtype, composed, tmp_path):
    """No code of ours is needed; logits of rows with one image, two and none."""
    model = composed(tower, decoder, "mlp", dtype)
    folder = exported(model, tmp_path / "mlp")
    assert not list(folder.glob("*.py"))
    config = AutoConfig.from_pretrained(folder)
    assert config.model_type == "llava" and config.text_config.vocab_size > config.image_token_index
    theirs = loaded(folder, dtype)
    assert isinstance(theirs, LlavaForConditionalGeneration)
    assert {str(value.dtype) for value in tensors(folder).values()} == {dtype}
    rows, images = rows_of([1, 2, 0], [12, 9, 20]), pixels(3)
    inputs = torch_rows(rows, 16, image_token=config.image_token_index)
    with torch.no_grad():
        reference = theirs(**inputs, pixel_values=torch_pixels(images).to(theirs.dtype)).logits
    reference = reference[inputs["attention_mask"].bool()]
    assert_close(our_logits(model, rows, images, 16), reference, dtype)
    assert reference.argmax(-1).max() < model.cfg.decoder.vocab_size  # never a row that was added for the image token


# ------------------------------------------------------------------ Delta models: their PyTorch code comes along


DELTA_CASES = {
    "release": ("clip", "llama", {}),
    "paper": ("clip", "llama_grouped", dict(variant="paper", window=2, scale_factor=(1, 2))),
    "siglip": ("siglip", "llama3", dict(scale_factor=2, select_layer=-1, levels=(0, 3, 1, 2))),
    "no_emhsa": ("clip", "llama_grouped", dict(ablation="no_emhsa", scale_factor=2)),
    "no_delta": ("clip", "llama_grouped", dict(ablation="no_delta", scale_factor=2)),
    "no_tb": ("clip", "llama_grouped", dict(ablation="no_tb", scale_factor=2)),
}


@pytest.fixture(scope="module")
def delta(request, composed, tmp_path_factory):
    """(our model, theirs loaded from the export) of one of DELTA_CASES."""
    tower, decoder, settings = DELTA_CASES[request.param]
    model = composed(tower, decoder, "delta", **DELTA | settings)
    return model, loaded(exported(model, tmp_path_factory.mktemp("delta") / request.param))


@pytest.mark.parametrize("delta", DELTA_CASES, indirect=True)
def test_visual_tokens_of_every_budget(delta):
    model, theirs = delta
    budgets, images, engine = systems.budgets(model.cfg.projector), pixels(2), Engine(model.params, model.cfg)
    for budget in budgets:
        with torch.no_grad():
            reference, _ = theirs.get_image_features(torch_pixels(images), budget)
        assert_close(np.asarray(engine.encode(images, budget=budget)[0]), reference)
    with torch.no_grad():  # the largest budget is the default
        assert theirs.get_image_features(torch_pixels(images))[0].shape == (2, max(budgets), checkpoints.WIDTH)


@pytest.mark.parametrize("delta", ["release"], indirect=True)
def test_other_budgets_are_refused(delta):
    _, theirs = delta
    with pytest.raises(ValueError, match="budget 9; .* 16, 4, 1 tokens per image"):
        theirs.get_image_features(torch_pixels(pixels(1)), 9)


@pytest.mark.parametrize("delta, budget", [("release", 4), ("paper", 16), ("siglip", 4)], indirect=["delta"])
def test_logits(delta, budget):
    """Rows with one image, two and none."""
    model, theirs = delta
    rows, images = rows_of([1, 2, 0], [12, 9, 20]), pixels(3)
    inputs = torch_rows(rows, image_token=theirs.config.image_token_index)
    with torch.no_grad():
        logits = theirs(**inputs, pixel_values=torch_pixels(images), budget=budget).logits
    lengths = [len(row.ids) + len(row.image_positions) * (budget - 1) for row in rows]
    assert logits.shape[1] == max(lengths)
    reference = torch.cat([row[:length] for row, length in zip(logits, lengths, strict=True)])
    assert_close(our_logits(model, rows, images, budget), reference)


@pytest.mark.parametrize("delta", ["siglip"], indirect=True)
def test_loss(delta):
    """Labels are at the text tokens; visual tokens and padding do not count."""
    model, theirs = delta
    rows, images = rows_of([1, 1], [12, 9]), pixels(2)
    inputs = torch_rows(rows, image_token=theirs.config.image_token_index)
    supervised = inputs["attention_mask"].bool() & (torch.arange(12) >= 5)
    labels = torch.where(supervised, inputs["input_ids"], -100)
    with torch.no_grad():
        reference = theirs(**inputs, pixel_values=torch_pixels(images), labels=labels, budget=4).loss
    batch = dataclasses.replace(our_batch(rows, images), loss_mask=supervised.numpy())
    mine = jax.jit(lambda params: vlm.loss(params, model.cfg, batch, None, train=False, budget=4))(model.params)
    np.testing.assert_allclose(mine, reference, atol=1e-4)


@pytest.mark.parametrize("delta, budgets", [("release", (16, 4, 1)), ("paper", (16,))], indirect=["delta"])
def test_greedy_tokens(delta, budgets):
    """8 tokens after prompts of unequal length, padded on the left; alone each prompt gives the same."""
    model, theirs = delta
    rows, images = rows_of([1, 1], [12, 6]), pixels(2)
    settings = dict(do_sample=False, max_new_tokens=8, pad_token_id=0, eos_token_id=None)
    token = theirs.config.image_token_index
    for budget in budgets:
        inputs = torch_rows(rows, left=True, image_token=token)
        both = theirs.generate(**inputs, pixel_values=torch_pixels(images), budget=budget, **settings).tolist()
        assert both == our_tokens(model, rows, images, budget)
    for row, image, expected in zip(rows, images, both, strict=True):
        inputs = torch_rows([row], image_token=token) | {"pixel_values": torch_pixels(image[None])}
        assert theirs.generate(**inputs, budget=budget, **settings).tolist() == [expected]


@pytest.mark.parametrize("delta", ["release"], indirect=True)
def test_greedy_tokens_without_images(delta):
    model, theirs = delta
    rows = rows_of([0, 0], [9, 5])
    inputs = torch_rows(rows, left=True)
    theirs = theirs.generate(**inputs, do_sample=False, max_new_tokens=8, pad_token_id=0, eos_token_id=None)
    mine = Engine(model.params, model.cfg).tokens(prompt_batch(rows, 9), sampling=Sampling(max_new_tokens=8), end=-1)
    assert mine == theirs.tolist()


def test_a_decoder_with_a_tied_head(composed, tmp_path):
    """Qwen2: the output matrix is the embedding, also in transformers and with the row of the image token."""
    model = composed("clip", "qwen2", "delta", **DELTA | dict(scale_factor=2))
    folder = exported(model, tmp_path / "tied")
    assert not any("lm_head" in name for name in tensors(folder))
    theirs = loaded(folder)
    rows, images = rows_of([1], [12]), pixels(1)
    inputs = torch_rows(rows, image_token=theirs.config.image_token_index)
    with torch.no_grad():
        reference = theirs(**inputs, pixel_values=torch_pixels(images)).logits[0]
    assert_close(our_logits(model, rows, images, 4), reference)


def test_every_auto_class_loads_it(delta_folder):
    """AutoConfig, AutoModel and AutoModelForImageTextToText give the classes of the exported code."""
    _, folder = delta_folder
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert type(config).__name__ == "DeltaLlavaConfig" and config.budgets == [16, 4, 1]
    for auto in (AutoModel, AutoModelForImageTextToText):
        model = auto.from_pretrained(folder, trust_remote_code=True)
        assert type(model).__name__ == "DeltaLlavaForConditionalGeneration"
        for name, value in tensors(folder).items():
            where = name.replace("vision_tower.vision_model.", "vision_tower.")
            np.testing.assert_array_equal(model.state_dict()[where], value)


@pytest.mark.parametrize("projector", ["mlp", "delta"])
def test_generation_config_is_that_of_the_decoder(projector, composed, tmp_path):
    """Llama 3's names several tokens that end an answer; here nearly every token ends it."""
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps({"eos_token_id": list(range(3, 320)), "pad_token_id": 0}))
    model = composed("clip", "llama_grouped", projector, **(DELTA if projector == "delta" else {}))
    kept = [file] + [each for each in model.kept if each.name != file.name]
    theirs = loaded(exported(dataclasses.replace(model, kept=kept), tmp_path / projector))
    out = theirs.generate(**torch_rows(rows_of([0], [9])), do_sample=False, max_new_tokens=8)
    assert out.shape[1] - (9 if projector == "mlp" else 0) == 1


def test_saved_by_transformers_and_loaded_again(delta_folder, tmp_path):
    """As after finetuning there."""
    _, folder = delta_folder
    model = loaded(folder)
    model.save_pretrained(tmp_path / "again")
    again = loaded(tmp_path / "again")
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


# ------------------------------------------------------------------ after training


def test_a_tower_kept_frozen_is_exported_as_it_was(composed, tmp_path):
    """Both stages held it in bfloat16; the export has the bits of the float16 checkpoint that they started from."""
    model = composed("clip", "llama_grouped", "mlp", "float16")
    start, stage1, work = tmp_path / "start", tmp_path / "stage1", tmp_path / "work"
    for folder, init_from in ((start, None), (stage1, start), (work, stage1)):
        folder.mkdir()
        if init_from:
            optimizer = OptimizerConfig(frozen=("vision/",))
            cfg = Config(name="work", init_from=str(init_from), model=model.cfg, optimizer=optimizer)
            (folder / "config.json").write_text(json.dumps(to_dict(cfg)))
    write_workdir(model, start, "start")
    trained = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32) + 0.125, model.params)
    trained, _ = split(trained, OptimizerConfig(frozen=("vision/",)))
    _, frozen = split(model.params, OptimizerConfig(frozen=("vision/",)))
    assert {leaf.dtype for leaf in jax.tree.leaves(frozen)} == {jnp.dtype(jnp.bfloat16)}
    for folder in (stage1, work):
        saver = Checkpoints(folder, create=True)
        saver.save(3, TrainState(jnp.int32(3), trained, frozen, {}), {})
        saver.wait()
        saver.close()

    back = read_workdir(work)
    assert_same_bits(arrays(back.params["vision"]), arrays(model.params["vision"]))
    for part in ("projector", "decoder"):
        assert_same_bits(arrays(back.params[part]), arrays(trained[part]))
    named, source = tensors(exported(back, tmp_path / "hf")), tensors(exported(model, tmp_path / "source"))
    assert named.keys() == source.keys()
    tower = lambda state: {name: value for name, value in state.items() if name.startswith("vision_tower.")}
    assert_same_bits(tower(named), tower(source))
    assert named["language_model.model.norm.weight"].dtype == np.float32


def arrays(tree: dict) -> dict[str, np.ndarray]:
    return {path: np.asarray(leaf) for path, leaf in flatten(tree).items()}

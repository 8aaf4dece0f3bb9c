"""Our models in transformers: what write_hf writes gives the same logits and the same text there as here."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")

import checkpoints  # noqa: E402
import ml_dtypes  # noqa: E402
from checkpoints import SIDE, our_batch, pixels, rows_of, tensors, torch_pixels, torch_rows  # noqa: E402
from rows import random_params  # noqa: E402
from transformers import (  # noqa: E402
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaForConditionalGeneration,
)

from deltallava_jax.config import Config, OptimizerConfig, to_dict  # noqa: E402
from deltallava_jax.convert.read import Pretrained  # noqa: E402
from deltallava_jax.convert.workdir import compose, load_model, read_workdir, write_workdir  # noqa: E402
from deltallava_jax.convert.write import write_hf  # noqa: E402
from deltallava_jax.data.conversation import TEMPLATES, tokenize  # noqa: E402
from deltallava_jax.inference.generate import encode, greedy, prompt_batch  # noqa: E402
from deltallava_jax.inference.model import Model  # noqa: E402
from deltallava_jax.models import projectors, vlm  # noqa: E402
from deltallava_jax.models.names import flatten, unflatten  # noqa: E402
from deltallava_jax.sequence import layout  # noqa: E402
from deltallava_jax.training.checkpoints import Checkpoints  # noqa: E402
from deltallava_jax.training.optimizer import split  # noqa: E402
from deltallava_jax.training.step import TrainState  # noqa: E402

DELTA = dict(scale_factor=(1, 2, 4), head_dim=16, block_head_dim=8, rank=4, mlp_width=24)


@pytest.fixture(scope="session")
def composed(saved):
    """composed(tower, decoder, projector, dtype, **settings): a new model, its projector far from its start."""

    def composed(tower: str, decoder: str, projector: str, dtype: str = "float32", **settings) -> Pretrained:
        model = compose(saved(tower, dtype), saved(decoder, dtype), projector, settings)
        drawn = random_params(projectors.init_params, model.cfg.projector)
        drawn = jax.tree.map(lambda leaf: leaf.astype(dtype), drawn)
        return dataclasses.replace(model, params=model.params | {"projector": drawn})

    return composed


def exported(model: Pretrained, folder):
    folder.mkdir()
    write_hf(model, folder)
    return folder


def our_logits(model: Pretrained, rows, images, budget: int) -> np.ndarray:
    """[live slots, vocab], row after row."""
    batch = our_batch(rows, images)
    logits = jax.jit(lambda params: vlm.logits(params, model.cfg, batch, budget=budget))(model.params)
    return np.asarray(logits)[np.asarray(layout(batch, None, budget).segments) > 0]


def our_tokens(model: Pretrained, rows, images, budget: int, count: int = 8) -> list[list[int]]:
    visual = encode(model.params, model.cfg, images, budget=budget)
    prompts = prompt_batch(rows, max(len(row.ids) for row in rows))
    return np.asarray(greedy(model.params, model.cfg, prompts, visual, max_new_tokens=count, eos=-1)).tolist()


# ------------------------------------------------------------------ MLP models: transformers' own LLaVA


@pytest.mark.parametrize(
    "tower, decoder, dtype",
    [("clip", "llama_grouped", "float32"), ("siglip", "qwen2", "float32"), ("clip_pair", "llama3", "bfloat16")],
)
def test_an_mlp_model_is_a_llava(tower, decoder, dtype, composed, tmp_path):
    """No code of ours is needed; logits of rows with one image, two and none."""
    model = composed(tower, decoder, "mlp", dtype)
    folder = exported(model, tmp_path / "mlp")
    assert not list(folder.glob("*.py"))
    config = AutoConfig.from_pretrained(folder)
    assert config.model_type == "llava" and config.text_config.vocab_size > config.image_token_index
    theirs = LlavaForConditionalGeneration.from_pretrained(folder, dtype=getattr(torch, dtype))
    assert {str(value.dtype) for value in tensors(folder).values()} == {dtype}
    rows, images = rows_of([1, 2, 0], [12, 9, 20]), pixels(3)
    mine = our_logits(model, rows, images, 16)
    inputs = torch_rows(rows, 16, image_token=config.image_token_index)
    with torch.no_grad():
        reference = theirs(**inputs, pixel_values=torch_pixels(images).to(theirs.dtype)).logits
    reference = reference[inputs["attention_mask"].bool()].float().numpy()[:, : mine.shape[1]]
    assert reference.std() > 0.3
    if dtype == "float32":
        np.testing.assert_allclose(mine, reference, atol=1e-4)
    else:
        assert np.abs(mine - reference).max() < 2e-2 * np.abs(reference).max()


def test_loading_reports_no_missing_or_unexpected_tensors(composed, tmp_path):
    """With SigLIP, whose pooling head the model has no use for."""
    for tower in ("clip", "siglip"):
        for name, settings in (("mlp", {}), ("delta", DELTA)):
            folder = exported(composed(tower, "llama", name, **settings), tmp_path / f"{tower}_{name}")
            _, info = AutoModelForImageTextToText.from_pretrained(
                folder, trust_remote_code=True, output_loading_info=True
            )
            assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))


# ------------------------------------------------------------------ Delta models: their PyTorch code comes along

DELTA_CASES = {
    "release": ("clip", "llama_grouped", {}),
    "release_no_emhsa": ("clip", "llama_grouped", dict(ablation="no_emhsa", scale_factor=2)),
    "release_no_delta": ("clip", "llama_grouped", dict(ablation="no_delta", scale_factor=2)),
    "release_no_tb": ("clip", "llama_grouped", dict(ablation="no_tb", scale_factor=2)),
    "release_siglip": ("siglip", "qwen2", dict(scale_factor=(2, 4), reduction=1, select_layer=-1, levels=(0, 3, 1, 2))),
    "paper": ("clip", "llama_grouped", dict(variant="paper", window=2, scale_factor=(1, 2))),
    "paper_wide": ("clip", "qwen2", dict(variant="paper", embed_width=64, reduction=2, scale_factor=2)),
    "paper_no_emhsa": ("clip", "llama_grouped", dict(variant="paper", ablation="no_emhsa", scale_factor=2)),
    "paper_no_delta": ("clip", "llama_grouped", dict(variant="paper", ablation="no_delta", scale_factor=2)),
    "paper_no_tb": ("clip", "llama_grouped", dict(variant="paper", ablation="no_tb", scale_factor=2)),
}
WHOLE = ("release", "release_siglip", "paper")  # tested down to the logits; the others down to the visual tokens


@pytest.fixture(scope="module", params=DELTA_CASES)
def delta(request, composed, tmp_path_factory):
    """(name, our model, theirs loaded from the export)."""
    tower, decoder, settings = DELTA_CASES[request.param]
    model = composed(tower, decoder, "delta", **DELTA | settings)
    folder = exported(model, tmp_path_factory.mktemp("delta") / request.param)
    theirs = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    return request.param, model, theirs.eval()


def test_visual_tokens_of_every_budget(delta):
    _, model, theirs = delta
    images = pixels(2)
    for budget in projectors.budgets(model.cfg.projector):
        mine = encode(model.params, model.cfg, images, budget=budget)
        with torch.no_grad():
            reference = theirs.get_image_features(torch_pixels(images), budget)
        assert reference.std() > 0.1 and reference.shape == (2, budget, checkpoints.WIDTH)
        np.testing.assert_allclose(mine, reference, atol=1e-4)
    with torch.no_grad():  # the largest budget is the default
        default = theirs.get_image_features(torch_pixels(images))
    assert default.shape[1] == max(projectors.budgets(model.cfg.projector))


def test_logits_of_every_budget(delta):
    """Rows with one image, two and none."""
    name, model, theirs = delta
    if name not in WHOLE:
        pytest.skip("covered by its visual tokens")
    rows, images = rows_of([1, 2, 0], [12, 9, 20]), pixels(3)
    inputs = torch_rows(rows, image_token=theirs.config.image_token_index)
    labels = torch.where(inputs["attention_mask"].bool(), inputs["input_ids"], -100)
    for budget in projectors.budgets(model.cfg.projector):
        mine = our_logits(model, rows, images, budget)
        with torch.no_grad():
            out = theirs(**inputs, pixel_values=torch_pixels(images), budget=budget, labels=labels)
        length = [len(row.ids) + len(row.image_positions) * (budget - 1) for row in rows]
        assert out.logits.shape[1] == max(length) and torch.isfinite(out.loss)
        reference = np.concatenate([logits[:n] for logits, n in zip(out.logits.numpy(), length)])
        np.testing.assert_allclose(mine, reference[:, : mine.shape[1]], atol=1e-4)


def test_greedy_tokens_of_every_budget(delta):
    """8 tokens after prompts of unequal length, padded on the left; alone each prompt gives the same."""
    name, model, theirs = delta
    if name not in WHOLE:
        pytest.skip("covered by its visual tokens")
    rows, images = rows_of([1, 1], [12, 6]), pixels(2)
    settings = dict(do_sample=False, max_new_tokens=8, pad_token_id=0, eos_token_id=None)
    token = theirs.config.image_token_index
    for budget in projectors.budgets(model.cfg.projector):
        inputs = torch_rows(rows, left=True, image_token=token)
        both = theirs.generate(**inputs, pixel_values=torch_pixels(images), budget=budget, **settings).tolist()
        assert both == our_tokens(model, rows, images, budget)
    for row, image, tokens in zip(rows, images, both):
        inputs = torch_rows([row], image_token=token)
        alone = theirs.generate(**inputs, pixel_values=torch_pixels(image[None]), budget=budget, **settings).tolist()
        assert alone == [tokens]


def test_generation_without_images(delta):
    name, model, theirs = delta
    if name != "release":
        pytest.skip("once is enough")
    rows = rows_of([0, 0], [9, 5])
    inputs = torch_rows(rows, left=True)
    theirs = theirs.generate(**inputs, do_sample=False, max_new_tokens=8, pad_token_id=0, eos_token_id=None)
    nothing = np.zeros((0, 1, checkpoints.WIDTH), np.float32)
    mine = greedy(model.params, model.cfg, prompt_batch(rows, 9), nothing, max_new_tokens=8, eos=-1)
    assert np.asarray(mine).tolist() == theirs.tolist()


def test_budgets_it_cannot_make_are_refused(delta):
    _, _, theirs = delta
    with pytest.raises(ValueError, match="budget 9; a 4x4 grid gives 16, 4, 1 tokens"):
        theirs.get_image_features(torch_pixels(pixels(1)), 9)


@pytest.fixture(scope="module")
def delta_folder(composed, tmp_path_factory):
    """(our model, its export) with a tokenizer to which the image token was added."""
    model = composed("clip", "llama_grouped", "delta", **DELTA)
    return model, exported(model, tmp_path_factory.mktemp("delta") / "text")


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


def test_saved_by_transformers_and_loaded_again(delta_folder, tmp_path):
    _, folder = delta_folder
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    model.save_pretrained(tmp_path / "again")
    again = AutoModel.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


def test_half_precision(composed, tmp_path):
    """A bfloat16 Delta model: logits within the precision."""
    model = composed("clip", "llama_grouped", "delta", "bfloat16", **DELTA)
    folder = exported(model, tmp_path / "half")
    theirs = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=torch.bfloat16)
    rows, images = rows_of([1], [12]), pixels(1)
    mine = our_logits(model, rows, images, 4)
    inputs = torch_rows(rows, image_token=theirs.config.image_token_index)
    with torch.no_grad():
        reference = theirs(**inputs, pixel_values=torch_pixels(images), budget=4).logits[0].float().numpy()
    assert np.abs(mine - reference[:, : mine.shape[1]]).max() < 2e-2 * np.abs(reference).max()


# ------------------------------------------------------------------ text and pictures, end to end

PROMPT = "What is in the picture?"
LONGER = "The shape is green, is it not? What is in the picture, on a blue square?"


@pytest.fixture(scope="session")
def pictures() -> list[Image.Image]:
    """Two pictures of unequal sides, larger than the tower's."""
    rng = np.random.default_rng(5)
    small = [rng.integers(0, 256, (5, 7, 3), dtype=np.uint8), rng.integers(0, 256, (6, 4, 3), dtype=np.uint8)]
    return [Image.fromarray(picture).resize((12 * picture.shape[1], 12 * picture.shape[0])) for picture in small]


def vicuna(question: str) -> str:
    """The prompt that our Model.generate makes."""
    return TEMPLATES["vicuna_v1"].system + f"USER: <image>\n{question} ASSISTANT:"


def ready(model: Pretrained) -> Model:
    return Model(model.cfg, model.params, checkpoints.tokenizer())


def assert_processor_agrees(processor, model: Pretrained, config, pictures, opened: int):
    """Ids and pixels of the processor are ours: the same text ids, one image token for each placeholder."""
    inputs = processor(images=pictures[:1], text=vicuna(PROMPT), return_tensors="pt")
    mine = tokenize([(f"<image>\n{PROMPT}", None)], TEMPLATES["vicuna_v1"], checkpoints.tokenizer()).ids.tolist()
    token = config.image_token_index
    want = [i for x in mine for i in ([token] * opened if x == 0 else [x])]
    assert inputs["input_ids"][0].tolist() == want
    assert inputs["pixel_values"].shape == (1, 3, SIDE, SIDE)


def test_processor_of_a_delta_export(delta_folder, pictures):
    model, folder = delta_folder
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert_processor_agrees(processor, model, config, pictures, 1)


def test_processor_of_an_mlp_export(composed, pictures, tmp_path):
    model = composed("clip", "llama_grouped", "mlp")
    folder = exported(model, tmp_path / "mlp")
    processor = AutoProcessor.from_pretrained(folder)
    assert type(processor).__name__ == "LlavaProcessor"
    assert_processor_agrees(processor, model, AutoConfig.from_pretrained(folder), pictures, 16)
    theirs = LlavaForConditionalGeneration.from_pretrained(folder)
    inputs = processor(images=pictures[0], text=vicuna(PROMPT), return_tensors="pt")
    out = theirs.generate(**inputs, do_sample=False, max_new_tokens=8, pad_token_id=0)
    text = processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    assert text == ready(model).generate(pictures[0], PROMPT, max_new_tokens=8)


def test_text_for_pictures_in_a_padded_batch(delta_folder, pictures):
    """Prompts of unequal length, padded by the tokenizer, give the text that our model gives for each."""
    model, folder = delta_folder
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    theirs = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    ours = ready(model)
    expected = [
        ours.generate(picture, question, budget=4, max_new_tokens=8)
        for picture, question in zip(pictures, (PROMPT, LONGER))
    ]
    settings = dict(budget=4, do_sample=False, max_new_tokens=8)
    for picture, question, text in zip(pictures, (PROMPT, LONGER), expected):
        inputs = processor(images=picture, text=vicuna(question), return_tensors="pt")
        out = theirs.generate(**inputs, **settings)
        assert [each.strip() for each in processor.batch_decode(out, skip_special_tokens=True)] == [text]
    inputs = processor(
        images=pictures, text=[vicuna(PROMPT), vicuna(LONGER)], padding=True, padding_side="left", return_tensors="pt"
    )
    assert (inputs["attention_mask"] == 0).any()
    out = theirs.generate(**inputs, **settings)
    assert [each.strip() for each in processor.batch_decode(out, skip_special_tokens=True)] == expected


def test_text_after_a_workdir(delta_folder, pictures, tmp_path):
    """Our own loading of the workdir and of the export answers like the model itself."""
    model, folder = delta_folder
    (tmp_path / "work").mkdir()
    write_workdir(model, tmp_path / "work", "work")
    expected = ready(model).generate(pictures[0], PROMPT, budget=4, max_new_tokens=8)
    for path in (tmp_path / "work", folder):
        assert load_model(path).generate(pictures[0], PROMPT, budget=4, max_new_tokens=8) == expected


def test_the_exported_code_needs_no_jax(delta_folder):
    """A fresh process without jax loads model and processor; nor does it import this package."""
    _, folder = delta_folder
    program = f"""
import sys
sys.modules["jax"] = sys.modules["deltallava_jax"] = None
from transformers import AutoModel, AutoProcessor
model = AutoModel.from_pretrained({str(folder)!r}, trust_remote_code=True)
AutoProcessor.from_pretrained({str(folder)!r}, trust_remote_code=True)
assert type(model).__name__ == "DeltaLlavaForConditionalGeneration"
assert not any(name.split(".")[0] in ("jax", "flax", "deltallava_jax") and module for name, module in sys.modules.items())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env={**os.environ})
    assert done.returncode == 0, done.stderr


# ------------------------------------------------------------------ after training


def test_a_tower_kept_frozen_is_exported_as_it_was(composed, tmp_path):
    """Training held it in bfloat16; the export has the bits of the float16 checkpoint that training began with."""
    model = composed("clip", "llama_grouped", "delta", "float16", **DELTA)
    start, work = tmp_path / "start", tmp_path / "work"
    start.mkdir()
    work.mkdir()
    write_workdir(model, start, "start")
    frozen = ("vision/", "decoder/embed")
    cfg = Config(name="work", init_from=str(start), model=model.cfg, optimizer=OptimizerConfig(frozen=frozen))
    (work / "config.json").write_text(json.dumps(to_dict(cfg)))
    moved = jax.tree.map(lambda leaf: leaf.astype(jnp.float32) * 1.01, model.params)
    trained, kept = split(moved | {"vision": model.params["vision"]}, frozen)
    assert {leaf.dtype for leaf in jax.tree.leaves(kept)} == {jnp.dtype(jnp.bfloat16)}
    saver = Checkpoints(work)
    saver.save(3, TrainState(jnp.int32(3), trained, kept, {}), {})
    saver.wait()
    saver.close()

    back = read_workdir(work)
    ours, original = flatten(back.params), flatten(model.params)
    for path, leaf in ours.items():
        if path.startswith(frozen):
            assert leaf.dtype == jnp.float16
            assert np.asarray(leaf).tobytes() == np.asarray(original[path]).tobytes(), path
        else:
            np.testing.assert_array_equal(leaf, flatten(trained)[path], err_msg=path)
    assert unflatten(ours).keys() == model.params.keys()
    named, source = tensors(exported(back, tmp_path / "hf")), tensors(exported(model, tmp_path / "source"))
    assert named.keys() == source.keys()
    for name, value in named.items():
        if name.startswith("vision_tower."):
            assert value.dtype == np.float16 and value.tobytes() == source[name].tobytes(), name
    assert named["multi_modal_projector.q_proj_1.U"].dtype == np.float32
    assert ml_dtypes.bfloat16 not in {value.dtype for value in named.values()}

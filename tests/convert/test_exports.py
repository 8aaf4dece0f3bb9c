"""Our models in transformers: what write_hf writes gives the same logits and the same text there as here."""

import dataclasses
import functools
import json
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")

import checkpoints  # noqa: E402
from checkpoints import (  # noqa: E402
    SIDE,
    assert_same_bits,
    our_batch,
    pixels,
    rows_of,
    tensors,
    torch_pixels,
    torch_questions,
    torch_rows,
)
from rows import random_params  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402
from transformers import (  # noqa: E402
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaForConditionalGeneration,
)

import deltallava_jax  # noqa: E402
from deltallava_jax.config import ASPECTS, Config, FastVConfig, OptimizerConfig, system_config, to_dict  # noqa: E402
from deltallava_jax.convert.export import write_hf, write_llava  # noqa: E402
from deltallava_jax.convert.read import Pretrained, read  # noqa: E402
from deltallava_jax.convert.workdir import compose, read_workdir, write_workdir  # noqa: E402
from deltallava_jax.data import conversation, tokens  # noqa: E402
from deltallava_jax.data.conversation import TEMPLATES, tokenize  # noqa: E402
from deltallava_jax.data.images import load_image  # noqa: E402
from deltallava_jax.errors import ConfigError, ConversionError  # noqa: E402
from deltallava_jax.inference.generate import Engine, prompt_batch  # noqa: E402
from deltallava_jax.inference.model import Model  # noqa: E402
from deltallava_jax.inference.sampling import Sampling  # noqa: E402
from deltallava_jax.models import systems, vision, vlm  # noqa: E402
from deltallava_jax.models.names import flatten  # noqa: E402
from deltallava_jax.training.checkpoints import Checkpoints  # noqa: E402
from deltallava_jax.training.optimizer import split  # noqa: E402
from deltallava_jax.training.step import TrainState  # noqa: E402

DELTA = dict(scale_factor=(1, 2, 4), head_dim=16, block_head_dim=8, rank=4, mlp_width=24)


@pytest.fixture(scope="session")
def composed(saved):
    """composed(tower, decoder, projector, dtype, **settings): a new model, its projector far from its start."""
    parts = functools.cache(
        lambda tower, decoder, dtype: compose(saved(tower, dtype), saved(decoder, dtype), "mlp", {})
    )

    @functools.cache
    def composed(tower: str, decoder: str, projector: str, dtype: str = "float32", **settings) -> Pretrained:
        model = parts(tower, decoder, dtype)
        cfg = model.cfg.projector
        sizes = dict(grid=cfg.grid, in_width=cfg.in_width, out_width=cfg.out_width)
        cfg = dataclasses.replace(model.cfg, projector=system_config(name=projector, **sizes, **settings))
        drawn = random_params(systems.init_params, cfg.projector)
        drawn = jax.tree.map(lambda leaf: leaf.astype(dtype), drawn)
        return dataclasses.replace(model, cfg=cfg, params=model.params | {"projector": drawn})

    return composed


def exported(model: Pretrained, folder):
    folder.mkdir()
    write_hf(model, folder)
    return folder


def loaded(folder, dtype: str = "float32"):
    """What transformers loads from an export: every tensor found and used."""
    model, info = AutoModelForImageTextToText.from_pretrained(
        folder, trust_remote_code=True, dtype=getattr(torch, dtype), output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


def assert_close(mine, reference, dtype: str = "float32"):
    """Logits or visual tokens; in bfloat16 the typical difference is taken, relative to the typical value."""
    reference = reference.float().numpy()[..., : mine.shape[-1]]
    assert mine.shape == reference.shape and reference.std() > 0.1
    if dtype == "float32":
        np.testing.assert_allclose(mine, reference, atol=1e-4)
    else:
        assert np.std(mine - reference) < 2e-2 * np.std(reference)


def our_logits(model: Pretrained, rows, images, budget: int) -> np.ndarray:
    """[live slots, vocab], row after row."""
    batch = our_batch(rows, images)

    @jax.jit
    def run(params):
        _, slots, _ = vlm.hidden_states(params, model.cfg, batch, budget=budget)
        return vlm.logits(params, model.cfg, batch, budget=budget), slots.segments > 0

    logits, live = run(model.params)
    return np.asarray(logits)[np.asarray(live)]


def our_tokens(model: Pretrained, rows, images, budget: int, count: int = 8) -> list[list[int]]:
    prompts = prompt_batch(rows, max(len(row.ids) for row in rows))
    engine = Engine(model.params, model.cfg)
    visual = engine.encode(images, prompts, budget=budget)
    return engine.tokens(prompts, *visual, Sampling(max_new_tokens=count), end=-1)


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
    with pytest.raises(ValueError, match="budget 9; .* 16, 4, 1 tokens an image"):
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
    """Labels stand at the text tokens; visual slots and padding do not count."""
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


# ------------------------------------------------------------------ systems that select patches or read the question

SYSTEMS = {
    "quecc": ("clip", "llama_grouped", "quecc", dict(scale_factor=2, head_dim=16, level_count=2, question_length=4)),
    "quecc_qwen": ("clip", "qwen2", "quecc", dict(scale_factor=4, head_dim=8, select_layer=-1)),
    "prumerge": ("clip_fine", "llama_grouped", "prumerge", dict(keep_ratio=0.0, tokens=(7,))),
    "prumerge_fixed": ("clip_fine", "qwen2", "prumerge", dict(keep_ratio=0.25, select_layer=-3)),
    "prumerge_plus": ("clip_fine", "llama3", "prumerge_plus", dict(keep_ratio=0.0)),
    "prumerge_plus_doubled": (
        "clip_fine", "llama3", "prumerge_plus", dict(keep_ratio=0.25, reproduce_duplicates=True),
    ),
    "fastervlm": ("clip", "llama_grouped", "fastervlm", dict(tokens=(16, 9, 1))),
    "evit": ("clip_fine", "llama_grouped", "evit", dict(prune_layers=(0, 1), keep_ratio=0.5)),
    "evit_alone": ("clip_fine", "llama3", "evit", dict(prune_layers=(1,), keep_ratio=0.3, fuse=False)),
    "dynamicvit": ("clip_fine", "qwen2", "dynamicvit", dict(prune_layers=(0, 1), keep_ratio=0.5)),
    "fastervlm_last": ("clip_fine", "llama3", "fastervlm", dict(select_layer=-1)),
}  # fmt: skip


@pytest.fixture(scope="module")
def system(request, composed, tmp_path_factory):
    """(our model, theirs loaded from the export) of one of SYSTEMS."""
    tower, decoder, name, settings = SYSTEMS[request.param]
    model = composed(tower, decoder, name, **settings)
    return model, loaded(exported(model, tmp_path_factory.mktemp("system") / request.param))


def asked(rows, *questions):
    """The rows with a question of so many tokens for each image, of at most four."""
    one = lambda count: [5 + place if place < count else -1 for place in range(4)]
    ids = lambda counts: np.array([one(count) for count in counts], np.int32).reshape(-1, 4)
    return [dataclasses.replace(row, questions=ids(counts)) for row, counts in zip(rows, questions, strict=True)]


def torch_inputs(model, theirs, rows, images, left: bool = False) -> dict:
    inputs = torch_rows(rows, left=left, image_token=theirs.config.image_token_index)
    if systems.reads_question(model.cfg.projector):
        inputs |= torch_questions(rows)
    return inputs | {"pixel_values": torch_pixels(images)}


@pytest.mark.parametrize("system", SYSTEMS, indirect=True)
def test_logits_of_other_systems(system):
    """Every budget, rows with one image, two and none; a long question, a short one and an empty one."""
    model, theirs = system
    rows = asked(rows_of([1, 2, 0], [12, 9, 20]), [4], [3, 0], [])
    images, cfg = pixels(3), model.cfg.projector
    inputs = torch_inputs(model, theirs, rows, images)
    of_images = {name: value for name, value in inputs.items() if name.startswith(("pixel", "question"))}
    for budget in systems.budgets(cfg):
        with torch.no_grad():
            _, valid = theirs.get_image_features(**of_images, budget=budget)
            logits = theirs(**inputs, budget=budget).logits
        opened = [budget] * 3 if valid is None else valid.sum(1).tolist()
        assert (len(set(opened)) > 1) == (getattr(cfg, "keep_ratio", None) == 0)  # as many tokens as the image asks for
        lengths = [11 + opened[0], 7 + opened[1] + opened[2], 20]
        assert logits.shape[1] == max(lengths)
        reference = torch.cat([row[:length] for row, length in zip(logits, lengths, strict=True)])
        assert_close(our_logits(model, rows, images, budget), reference)


@pytest.mark.parametrize("system", SYSTEMS, indirect=True)
def test_greedy_tokens_of_other_systems(system):
    """After prompts of unequal length, padded on the left."""
    model, theirs = system
    rows, images = asked(rows_of([1, 1], [12, 6]), [4], [3]), pixels(2)
    inputs = torch_inputs(model, theirs, rows, images, left=True)
    settings = dict(do_sample=False, max_new_tokens=8, pad_token_id=0, eos_token_id=None)
    for budget in systems.budgets(model.cfg.projector):
        found = theirs.generate(**inputs, budget=budget, **settings).tolist()
        assert found == our_tokens(model, rows, images, budget)


@pytest.mark.parametrize("system", ["quecc"], indirect=True)
def test_a_question_is_asked_for_where_it_is_read(system):
    model, theirs = system
    rows, images = asked(rows_of([1, 1], [12, 6]), [4], [3]), pixels(2)
    inputs = torch_inputs(model, theirs, rows, images)
    for given, words in ((None, "2 images, but none in question_ids"), (inputs["question_ids"][:1], "but 1 in")):
        with pytest.raises(ValueError, match=f"reads each image's question: .*{words}"):
            theirs(**inputs | {"question_ids": given})


@pytest.mark.parametrize("system", ["quecc"], indirect=True)
def test_the_question_gets_no_gradient(system):
    """Of the visual tokens the decoder has none; the projector's part that takes the question has."""
    model, theirs = system
    rows = asked(rows_of([1], [12]), [4])
    tokens, _ = theirs.get_image_features(torch_pixels(pixels(1)), **torch_questions(rows))
    tokens.square().sum().backward()
    assert all(parameter.grad is None for parameter in theirs.language_model.parameters())
    assert theirs.multi_modal_projector[0].text_projection[0].weight.grad.abs().sum() > 0
    theirs.zero_grad()


def test_a_tower_without_cls_is_refused(composed, tmp_path):
    with pytest.raises(ConfigError, match="a siglip tower has no CLS token"):
        exported(composed("siglip", "llama3", "fastervlm"), tmp_path / "fastervlm")


@pytest.mark.parametrize("write", [write_hf, write_llava])
def test_pruning_inside_the_decoder_is_refused(write, composed, tmp_path):
    model = composed("clip", "llama_grouped", "mlp")
    cfg = dataclasses.replace(model.cfg, fastv=FastVConfig(layer=1, keep=4))
    with pytest.raises(ConversionError, match="model.fastv, .* set model.fastv to null"):
        write(dataclasses.replace(model, cfg=cfg), tmp_path)
    assert not list(tmp_path.iterdir())


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


def ready(model: Pretrained, folder) -> Model:
    """With the tokenizer of the decoder's folder."""
    return Model(model.cfg, model.params, tokens.load(folder), aspect=model.aspect)


def assert_processor_agrees(processor, config, tokenizer, pictures, opened: int = 1):
    """Its text ids are ours, with ``opened`` image tokens for each placeholder; the pixels are of the tower's size."""
    inputs = processor(images=pictures[:1], text=vicuna(PROMPT), return_tensors="pt")
    mine = tokenize(conversation.asked([(PROMPT, None)], 1), TEMPLATES["vicuna_v1"], tokenizer).ids.tolist()
    token = config.image_token_index
    assert inputs["input_ids"][0].tolist() == [i for x in mine for i in ([token] * opened if x == 0 else [x])]
    assert inputs["pixel_values"].shape == (1, 3, SIDE, SIDE)


@pytest.mark.parametrize("decoder", ["llama_grouped", "qwen2", "llama"])
def test_processor_of_a_delta_export(decoder, composed, saved, pictures, tmp_path):
    """Published tokenizers, with <s> and without, and one that we trained and saved."""
    folder = exported(composed("clip", decoder, "delta", **DELTA), tmp_path / "delta")
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert_processor_agrees(processor, config, tokens.load(saved(decoder)), pictures)


def test_a_tokenizer_of_ours_pads(composed, pictures, tmp_path):
    folder = exported(composed("clip", "llama", "delta", **DELTA), tmp_path / "delta")
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    inputs = processor(text=[PROMPT, LONGER], padding=True, return_tensors="pt")
    assert (inputs["attention_mask"] == 0).sum() == (inputs["input_ids"] == 0).sum() > 0


@pytest.mark.parametrize("aspect", ASPECTS)
@pytest.mark.parametrize("tower, projector", [("clip", "mlp"), ("siglip", "mlp"), ("clip", "delta")])
def test_pictures_are_prepared_as_ours_are(tower, projector, aspect, composed, pictures, tmp_path):
    """Pictures of unequal sides; what training saw is what the export sees, and what is read from it again."""
    model = composed(tower, "llama3", projector, **(DELTA if projector == "delta" else {}))
    assert model.aspect == {"clip": "square", "siglip": "squash"}[tower]
    folder = exported(dataclasses.replace(model, aspect=aspect), tmp_path / "export")
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    for picture in pictures:
        mine = load_image(picture, SIDE, aspect, model.cfg.vision.mean_color)
        mine = vision.normalize(mine[None], model.cfg.vision)[0]
        theirs = processor.image_processor(picture, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
        np.testing.assert_allclose(mine, theirs, atol=1e-5)
    assert read(folder).aspect == aspect


def test_a_processor_that_transformers_saved_says_the_same(composed, tmp_path):
    """It puts the image processor's settings into processor_config.json."""
    model = dataclasses.replace(composed("clip", "llama3", "mlp"), aspect="pad")
    folder = exported(model, tmp_path / "mlp")
    AutoProcessor.from_pretrained(folder).save_pretrained(folder)
    (folder / "preprocessor_config.json").unlink()
    assert read(folder).aspect == "pad"


@pytest.mark.parametrize("through_a_workdir", [False, True])
def test_a_model_trained_on_other_pictures_than_it_came_with(through_a_workdir, saved, opened, pictures, tmp_path):
    """The source's processor crops; the export pads."""
    model, work = dataclasses.replace(opened("llava"), aspect="pad"), tmp_path / "work"
    if through_a_workdir:
        work.mkdir()
        write_workdir(model, work, "work")
        model = read_workdir(work)
    processor = AutoProcessor.from_pretrained(exported(model, tmp_path / "hf"))
    theirs = processor.image_processor(pictures[0], return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    mine = vision.normalize(load_image(pictures[0], SIDE, "pad")[None], model.cfg.vision)[0]
    np.testing.assert_allclose(mine, theirs, atol=1e-5)


@pytest.mark.parametrize("through_a_workdir", [False, True])
def test_a_decoder_without_tokenizer_json(through_a_workdir, saved, tmp_path):
    """Vicuna has tokenizer.model alone; here vocab.json and merges.txt. The export knows the image token."""
    decoder, work = tmp_path / "decoder", tmp_path / "work"
    shutil.copytree(saved("qwen2"), decoder)
    Tokenizer.from_file(str(decoder / "tokenizer.json")).model.save(str(decoder))
    (decoder / "tokenizer.json").unlink()
    config = json.loads((decoder / "tokenizer_config.json").read_text())
    (decoder / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": "Qwen2Tokenizer"}))
    model = compose(saved("clip"), decoder, "mlp", {})
    if through_a_workdir:
        work.mkdir()
        write_workdir(model, work, "work")
        model = read_workdir(work)
    folder = exported(model, tmp_path / "mlp")
    token = AutoConfig.from_pretrained(folder).image_token_index
    processor = AutoProcessor.from_pretrained(folder)
    mine = tokens.load(decoder).encode("What is it?")[0]
    assert processor.tokenizer("<image>What is it?")["input_ids"] == [token, *mine]


def test_special_tokens_of_a_workdir_whose_source_is_gone(composed, tmp_path):
    """The workdir's own tokenizer_config.json has their names: Qwen2's prompts do not begin with <s>."""
    work = tmp_path / "work"
    work.mkdir()
    write_workdir(composed("clip", "qwen2", "mlp"), work, "work")
    shutil.rmtree(work / "source")
    folder = exported(read_workdir(work), tmp_path / "mlp")
    assert tokens.load(work).bos is None
    assert tokens.load(folder).bos is None


def test_processor_of_an_mlp_export(composed, saved, pictures, tmp_path):
    model = composed("clip", "llama_grouped", "mlp")
    folder = exported(model, tmp_path / "mlp")
    processor = AutoProcessor.from_pretrained(folder)
    assert type(processor).__name__ == "LlavaProcessor"
    ours = ready(model, saved("llama_grouped"))
    assert_processor_agrees(processor, AutoConfig.from_pretrained(folder), ours.tokenizer, pictures, 16)
    theirs = loaded(folder)
    inputs = processor(images=pictures[0], text=vicuna(PROMPT), return_tensors="pt")
    out = theirs.generate(**inputs, do_sample=False, max_new_tokens=8, pad_token_id=0)
    text = processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    assert text == ours.generate(pictures[0], PROMPT, max_new_tokens=8)


def test_text_for_pictures_in_a_padded_batch(delta_folder, saved, pictures):
    """Prompts of unequal length, padded by the tokenizer, give the text that our model gives for each."""
    model, folder = delta_folder
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    theirs, ours = loaded(folder), ready(model, saved("llama_grouped"))
    expected = [
        ours.generate(picture, question, budget=4, max_new_tokens=8)
        for picture, question in zip(pictures, (PROMPT, LONGER), strict=True)
    ]
    settings = dict(budget=4, do_sample=False, max_new_tokens=8)
    for picture, question, text in zip(pictures, (PROMPT, LONGER), expected, strict=True):
        inputs = processor(images=picture, text=vicuna(question), return_tensors="pt")
        out = theirs.generate(**inputs, **settings)
        assert [each.strip() for each in processor.batch_decode(out, skip_special_tokens=True)] == [text]
    inputs = processor(
        images=pictures, text=[vicuna(PROMPT), vicuna(LONGER)], padding=True, padding_side="left", return_tensors="pt"
    )
    assert (inputs["attention_mask"] == 0).any()
    out = theirs.generate(**inputs, **settings)
    assert [each.strip() for each in processor.batch_decode(out, skip_special_tokens=True)] == expected


@pytest.fixture(scope="module")
def quecc_folder(composed, tmp_path_factory):
    """(our model, its export) of a system that reads the question, of which it reads the first tokens."""
    settings = dict(scale_factor=(2,), head_dim=16, question_length=12)
    model = composed("clip", "llama_grouped", "quecc", **settings)
    return model, exported(model, tmp_path_factory.mktemp("text") / "quecc_text")


def test_the_processor_finds_the_question_of_each_image(quecc_folder, saved, pictures):
    """Pictures and text are all it needs; the answers are our model's, also in a padded batch."""
    model, folder = quecc_folder
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    theirs, ours, settings = loaded(folder), ready(model, saved("llama_grouped")), dict(do_sample=False)
    questions, answers = (PROMPT, LONGER), []
    for picture, question in zip(pictures, questions, strict=True):
        inputs = processor(images=picture, text=vicuna(question), return_tensors="pt")
        out = theirs.generate(**inputs, max_new_tokens=8, **settings)
        answers += processor.batch_decode(out, skip_special_tokens=True)
        assert answers[-1].strip() == ours.generate(picture, question, max_new_tokens=8)
    texts = [vicuna(question) for question in questions]
    inputs = processor(images=pictures, text=texts, padding=True, padding_side="left", return_tensors="pt")
    assert (inputs["attention_mask"] == 0).any() and (inputs["question_mask"] == 0).any()
    out = theirs.generate(**inputs, max_new_tokens=8, **settings)
    assert processor.batch_decode(out, skip_special_tokens=True) == answers
    assert "question_ids" not in processor(text=[PROMPT], return_tensors="pt")


CONVERSATION = [
    ("<image>\nWhat is in the picture?", "A small red circle."),
    ("The shape is green, is it not? ", "It is."),
    ("What? <image><image>\nOn a blue square?", "A circle on a blue square."),
    ("<image>", "The shape."),
    ("<image>What is in the picture?", None),
]


@pytest.mark.parametrize("decoder", ["llama_grouped", "qwen2", "llama"])
def test_questions_of_a_long_conversation(decoder, composed, saved, tmp_path):
    """Several images, several turns, a turn without words: the tokens that our data pipeline marks."""
    folder = exported(composed("clip", decoder, "quecc", scale_factor=2, head_dim=16), tmp_path / "quecc")
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    template = TEMPLATES["vicuna_v1"]
    rounds = [template.user.format(question) + template.assistant for question, _ in CONVERSATION]
    answers = [f" {answer}{template.end}" for _, answer in CONVERSATION[:-1]] + [""]
    text = template.system + "".join(part for pair in zip(rounds, answers, strict=True) for part in pair)
    tokenizer = tokens.load(saved(decoder))
    mine = tokenize(conversation.asked(CONVERSATION, 5), template, tokenizer, question_length=24)
    inputs = processor(text=text)
    found = [
        [token for token, live in zip(ids, mask, strict=True) if live]
        for ids, mask in zip(inputs["question_ids"], inputs["question_mask"], strict=True)
    ]
    assert found == [ids[ids >= 0].tolist() for ids in mine.questions]
    assert [len(ids) > 0 for ids in found] == [True, True, True, False, True]


def test_questions_end_as_in_the_template_of_the_workdir(quecc_folder, saved, pictures, tmp_path):
    """ "brief" has nothing between a question and its answer: in a prompt the question goes on to its end."""
    model, _ = quecc_folder
    work = tmp_path / "work"
    work.mkdir()
    write_workdir(dataclasses.replace(model, template="brief"), work, "work")
    ours = deltallava_jax.load(work)
    assert ours.template == "brief"
    folder = exported(read_workdir(work), tmp_path / "quecc")
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    processor.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "processor_config.json").read_text())
    assert processor.question_end == again["question_end"] == ""
    inputs = processor(images=pictures[0], text=f"<image>\n{LONGER}", return_tensors="pt")
    out = loaded(folder).generate(**inputs, do_sample=False, max_new_tokens=8)
    expected = ours.generate(pictures[0], LONGER, max_new_tokens=8)
    assert processor.batch_decode(out, skip_special_tokens=True)[0].strip() == expected


def test_text_after_a_workdir(delta_folder, saved, pictures, tmp_path):
    """Our own loading of the workdir and of the export answers like the model itself."""
    model, folder = delta_folder
    (tmp_path / "work").mkdir()
    write_workdir(model, tmp_path / "work", "work")
    expected = ready(model, saved("llama_grouped")).generate(pictures[0], PROMPT, budget=4, max_new_tokens=8)
    for path in (tmp_path / "work", folder):
        assert deltallava_jax.load(path).generate(pictures[0], PROMPT, budget=4, max_new_tokens=8) == expected


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
ours = [name for name, module in sys.modules.items() if module and name.split(".")[0] in ("jax", "flax", "jaxlib")]
assert not ours, ours
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ------------------------------------------------------------------ after training


def test_a_tower_kept_frozen_is_exported_as_it_was(composed, tmp_path):
    """Both stages held it in bfloat16; the export has the bits of the float16 checkpoint that stage 1 began with."""
    model = composed("clip", "llama_grouped", "mlp", "float16")
    start, stage1, work = tmp_path / "start", tmp_path / "stage1", tmp_path / "work"
    for folder, began in ((start, None), (stage1, start), (work, stage1)):
        folder.mkdir()
        if began:
            optimizer = OptimizerConfig(frozen=("vision/",))
            cfg = Config(name="work", init_from=str(began), model=model.cfg, optimizer=optimizer)
            (folder / "config.json").write_text(json.dumps(to_dict(cfg)))
    write_workdir(model, start, "start")
    trained = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32) + 0.125, model.params)
    trained, _ = split(trained, ("vision/",))
    _, frozen = split(model.params, ("vision/",))
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

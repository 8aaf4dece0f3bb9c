"""Exports of systems that select patches or read the question: transformers gives the same logits and tokens."""

import dataclasses

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from deltallava_jax.config import FastVConfig  # noqa: E402
from deltallava_jax.convert.export import write_hf, write_llava  # noqa: E402
from deltallava_jax.errors import ConfigError, ConversionError  # noqa: E402
from deltallava_jax.models import systems  # noqa: E402
from tests.convert.checkpoints import (  # noqa: E402
    pixels,
    rows_of,
    torch_pixels,
    torch_questions,
    torch_rows,
)
from tests.convert.exports import assert_close, exported, loaded, our_logits, our_tokens  # noqa: E402

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

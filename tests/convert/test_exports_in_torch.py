"""Exports with PyTorch code of their own behave as any model of transformers: trained, resized, asked."""

import dataclasses

import pytest

torch = pytest.importorskip("torch")

from transformers import AutoModelForImageTextToText  # noqa: E402

from deltallava_jax.config import system_config  # noqa: E402
from deltallava_jax.convert.export import write_hf  # noqa: E402
from deltallava_jax.convert.workdir import compose  # noqa: E402
from deltallava_jax.models import systems  # noqa: E402
from tests.convert.checkpoints import pixels, rows_of, torch_pixels, torch_rows  # noqa: E402
from tests.models.rows import random_params  # noqa: E402

SETTINGS = {
    "delta": dict(scale_factor=2, head_dim=16, block_head_dim=8, rank=4),
    "evit": dict(prune_layers=(0, 1), keep_ratio=0.5),  # runs layers of the tower itself
}
TOWERS = {"delta": "clip", "evit": "clip_fine"}


@pytest.fixture(scope="module", params=[("delta", "llama_grouped"), ("delta", "qwen2"), ("evit", "llama_grouped")])
def folder(request, saved, tmp_path_factory):
    """An export; Qwen2's has a tied head."""
    projector, decoder = request.param
    made = compose(saved(TOWERS[projector]), saved(decoder), "mlp", {})
    sizes = {key: getattr(made.cfg.projector, key) for key in ("grid", "in_width", "out_width")}
    cfg = dataclasses.replace(made.cfg, projector=system_config(name=projector, **sizes, **SETTINGS[projector]))
    params = made.params | {"projector": random_params(systems.init_params, cfg.projector)}
    folder = tmp_path_factory.mktemp("torch") / f"{projector}_{decoder}"
    folder.mkdir()
    write_hf(dataclasses.replace(made, cfg=cfg, params=params), folder)
    return folder


@pytest.fixture
def model(folder):
    return AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)


@pytest.fixture
def inputs(model):
    ids = torch_rows(rows_of([1, 1], [12, 9]), image_token=model.config.image_token_index)
    return ids | {"pixel_values": torch_pixels(pixels(2))}


def gradients(model, inputs) -> dict[str, torch.Tensor]:
    model.train()
    model.zero_grad()
    labels = torch.where(inputs["attention_mask"].bool(), inputs["input_ids"], -100)
    model(**inputs, labels=labels).loss.backward()
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_gradient_checkpointing_gives_the_same_gradients(model, inputs):
    """What Trainer(gradient_checkpointing=True) turns on."""
    expected = gradients(model, inputs)
    model.gradient_checkpointing_enable()
    calls = []
    for module in model.modules():
        if (once := getattr(module, "_gradient_checkpointing_func", None)) is not None:
            module._gradient_checkpointing_func = lambda *a, once=once, **k: calls.append(1) or once(*a, **k)
    found = gradients(model, inputs)
    assert len(calls) >= model.config.text_config.num_hidden_layers
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-4)


def test_token_embeddings_are_resized_together(model, inputs, folder, tmp_path):
    """Embedding, head and configs; old logits stay; saved and loaded again it is the same model."""
    model.eval()
    size = model.config.text_config.vocab_size
    with torch.no_grad():
        before = model(**inputs).logits
    model.resize_token_embeddings(size + 7)
    assert model.get_input_embeddings().weight.shape[0] == model.get_output_embeddings().weight.shape[0] == size + 7
    assert model.config.text_config.vocab_size == model.language_model.config.vocab_size == size + 7
    tied = model.config.text_config.tie_word_embeddings
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    with torch.no_grad():
        after = model(**inputs).logits
    torch.testing.assert_close(after[..., :size], before)
    labels = torch.where(inputs["attention_mask"].bool(), inputs["input_ids"], -100)
    assert torch.isfinite(model(**inputs, labels=labels).loss)
    again = tmp_path / f"{folder.name}_again"  # transformers keeps modules by the name of the folder
    model.save_pretrained(again)
    again = AutoModelForImageTextToText.from_pretrained(again, trust_remote_code=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits, after)


def test_embeddings_are_replaced(model):
    """As adapters do it."""
    size, width = model.get_input_embeddings().weight.shape
    fresh, head = torch.nn.Embedding(size, width), torch.nn.Linear(width, size, bias=False)
    model.set_input_embeddings(fresh)
    model.set_output_embeddings(head)
    assert model.get_input_embeddings() is model.language_model.model.embed_tokens is fresh
    assert model.get_output_embeddings() is model.language_model.lm_head is head


def test_generate_takes_ids_under_every_name(model):
    ids = torch.tensor([[5, 6, 7, 8]])
    options = dict(do_sample=False, max_new_tokens=5, eos_token_id=None, pad_token_id=0)
    expected = model.generate(input_ids=ids, **options).tolist()
    assert model.generate(ids, **options).tolist() == expected
    assert model.generate(inputs=ids, **options).tolist() == expected
    embeds = model.get_input_embeddings()(ids)
    assert model.generate(inputs_embeds=embeds, **options).tolist() == expected

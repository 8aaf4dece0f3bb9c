"""LoRA adapters of peft and LLaVA through the converter: beside their base, merged, and back, compared with peft."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

import ml_dtypes  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

import deltallava_jax  # noqa: E402
from deltallava_jax.config import LoraConfig, workdir_config  # noqa: E402
from deltallava_jax.convert.pretrained import Pretrained  # noqa: E402
from deltallava_jax.convert.workdir import open_model, read_workdir, write_workdir  # noqa: E402
from deltallava_jax.models import lora  # noqa: E402
from deltallava_jax.models.names import flatten  # noqa: E402
from tests.convert import adapters  # noqa: E402
from tests.convert.adapters import (  # noqa: E402
    BOTH,
    IMAGES,
    PROMPTS,
    ROWS,
    SOME,
    adapted_modules,
    llava_adapter,
    save_peft,
    their_logits,
    their_tokens,
    weights,
    with_adapter,
)
from tests.convert.checkpoints import assert_same_bits, assert_same_params, convert, tensors  # noqa: E402
from tests.convert.exports import DELTA, loaded, our_logits, our_tokens  # noqa: E402
from tests.convert.layouts import tower_folder  # noqa: E402

KINDS = {
    "decoder": dict(),
    "some, rslora": dict(targets=SOME, use_rslora=True, r=6, lora_alpha=4, lora_dropout=0.0),
    "tower": dict(targets=BOTH, lora_alpha=5),
}


@pytest.fixture(scope="module")
def adapter(saved, tmp_path_factory):
    """adapter(kind, source): an adapter's folder of peft; nobody writes into it."""
    root, made = tmp_path_factory.mktemp("adapters"), {}

    def adapter(kind: str = "decoder", source: str = "llava"):
        if (kind, source) not in made:
            made[kind, source] = save_peft(saved(source), root / f"{source}-{len(made)}", **KINDS[kind])
        return made[kind, source]

    return adapter


def assert_close(mine, reference):
    reference = reference.numpy()[..., : mine.shape[-1]]
    assert reference.std() > 0.1
    np.testing.assert_allclose(mine, reference, atol=1e-5 * max(1, np.abs(reference).max()))


# ------------------------------------------------------------------ peft


@pytest.mark.parametrize("kind", KINDS)
def test_peft_to_ours_and_back(kind, adapter, saved, tmp_path):
    """The same tensors to the bit and the same settings; the base is the source's."""
    source, base = adapter(kind), saved("llava")
    convert(source, tmp_path / "work", "--base", base)
    settings = adapters.config(source)
    ours = workdir_config(tmp_path / "work").lora
    assert (ours.rank, ours.alpha, ours.dropout) == (settings["r"], settings["lora_alpha"], settings["lora_dropout"])
    assert ours.rslora == settings["use_rslora"]
    model = read_workdir(tmp_path / "work")
    assert sorted(lora.shapes(ours, {path: leaf.shape for path, leaf in flatten(model.params).items()})) == sorted(
        model.adapters
    )
    convert(tmp_path / "work", tmp_path / "back", "--to", "peft")
    back = tmp_path / "back"
    assert_same_bits(weights(back), weights(source))
    assert_same_bits(tensors(back / "base"), tensors(base))
    again = adapters.config(back)
    for key in ("peft_type", "task_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "bias", "modules_to_save",
                "fan_in_fan_out", "rank_pattern", "alpha_pattern"):  # fmt: skip
        assert again[key] == settings[key], key
    assert again["base_model_name_or_path"] == str(back / "base")
    assert adapted_modules(base, back) == adapted_modules(base, source) != set()


@pytest.mark.parametrize("source", ["llava", "llava_qwen2", "llava_siglip"])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_peft(kind, source, adapter, saved, tmp_path):
    """Merged here; merged and exported; and the adapter that --to peft writes, on its base."""
    base, folder = saved(source), adapter(kind, source)
    reference = their_logits(with_adapter(base, folder))
    plain = their_logits(loaded(base))
    assert np.abs(reference - plain).max() > 0.1
    mine = our_logits(open_model(folder, base=base, merge=True), ROWS, IMAGES, 16)
    assert_close(mine, reference)
    convert(folder, tmp_path / "merged", "--base", base, "--to", "hf")
    assert_close(mine, their_logits(loaded(tmp_path / "merged")))
    convert(folder, tmp_path / "peft", "--base", base, "--to", "peft")
    assert_close(mine, their_logits(with_adapter(tmp_path / "peft" / "base", tmp_path / "peft")))


def test_greedy_tokens_are_those_of_peft(adapter, saved, tmp_path):
    """The adapter on its base, over two devices too, and workdirs with it beside and merged."""
    base, folder = saved("llava"), adapter()
    convert(folder, tmp_path / "beside", "--base", base)
    convert(folder, tmp_path / "merged", "--base", base, "--merge")
    assert workdir_config(tmp_path / "merged").lora is None
    expected = their_tokens(with_adapter(base, folder))
    assert expected != their_tokens(loaded(base))
    for model in (
        deltallava_jax.load(folder, base=base),
        deltallava_jax.load(folder, base=base, tensor=2),
        deltallava_jax.load(folder),  # adapter_config.json names it
        deltallava_jax.load(tmp_path / "beside"),
        deltallava_jax.load(tmp_path / "merged"),
    ):
        assert our_tokens(model, PROMPTS, IMAGES, 16) == expected
        assert model.tokenizer.vocab_size == 300 and model.template == "vicuna_v1"


def test_merging_is_in_float32(saved, tmp_path):
    """W + scale B A of a bfloat16 base is rounded once."""
    base = saved("llava", "bfloat16")
    folder = save_peft(saved("llava"), tmp_path / "lora", targets=SOME)
    convert(folder, tmp_path / "merged", "--base", base, "--to", "hf")
    before, after, named = tensors(base), tensors(tmp_path / "merged"), weights(folder)
    changed = 0
    for name, value in before.items():
        module = name.removesuffix(".weight").replace("language_model.model.", "base_model.model.model.language_model.")
        if f"{module}.lora_A.weight" in named:
            product = named[f"{module}.lora_B.weight"] @ named[f"{module}.lora_A.weight"]
            expected = (value.astype(np.float32) + np.float32(6 / 4) * product).astype(ml_dtypes.bfloat16)
            off = after[name].view(np.int16).astype(int) - expected.view(np.int16)
            assert np.abs(off).max() <= 1 and (off != 0).mean() < 1e-2  # the order of the sums in float32
            changed += 1
        else:
            assert_same_bits({name: after[name]}, {name: value})
    assert changed == len(named) // 2 == 4


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_workdir_with_a_quantised_base_is_merged_as_it_answers(kind, composed, tmp_path):
    model = adapted(composed("clip", "llama_grouped", "mlp"), base=kind)
    (tmp_path / "work").mkdir()
    write_workdir(model, tmp_path / "work", "work")
    convert(tmp_path / "work", tmp_path / "merged", "--merge")
    beside, merged = (deltallava_jax.load(tmp_path / name).params for name in ("work", "merged"))
    jax.tree.map(np.testing.assert_array_equal, beside, merged)
    convert(tmp_path / "work", tmp_path / "peft", "--to", "peft")
    assert_same_params(read_workdir(tmp_path / "work").params, model.params)


def test_ranks_and_alphas_by_pattern_are_merged_as_peft_does(saved, tmp_path, target):
    patterns = dict(rank_pattern={"q_proj": 2, "layers.1.mlp.up_proj": 7}, alpha_pattern={"v_proj": 11})
    folder = save_peft(saved("llava"), tmp_path / "lora", **patterns)
    mine = our_logits(open_model(folder, base=saved("llava"), merge=True), ROWS, IMAGES, 16)
    assert_close(mine, their_logits(with_adapter(saved("llava"), folder)))


def test_an_adapter_of_a_decoder_alone(saved, tmp_path):
    base = saved("llama_grouped")
    folder = save_peft(base, tmp_path / "lora", list(adapters.LINEARS), kind=AutoModelForCausalLM)
    convert(folder, tmp_path / "back", "--base", base, "--to", "peft")
    assert_same_bits(weights(tmp_path / "back"), weights(folder))
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "back").eval()
    convert(folder, tmp_path / "merged", "--base", base, "--to", "hf")
    whole, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval(), torch.arange(3, 40)[None]
    with torch.no_grad():
        assert_close(whole(ids).logits.numpy(), model(ids).logits)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_adapters_of_other_dtypes_keep_their_values(dtype, adapter, saved, tmp_path):
    folder = shutil.copytree(adapter(), tmp_path / "lora")
    named = {name: value.astype(dtype) for name, value in weights(folder).items()}
    adapters.write_weights(folder, {name.replace(".weight", ".default.weight"): v for name, v in named.items()})
    convert(folder, tmp_path / "back", "--base", saved("llava"), "--to", "peft")
    assert_same_bits(weights(tmp_path / "back"), {name: value.astype(np.float32) for name, value in named.items()})


def test_names_of_older_versions(adapter, saved, tmp_path):
    """Of transformers before 4.52, and torch files."""
    folder = shutil.copytree(adapter("tower"), tmp_path / "lora")
    (folder / "adapter_model.safetensors").unlink()
    named = {
        name.replace("model.model.language_model.", "model.language_model.model.").replace(
            "model.model.vision_tower.", "model.vision_tower.vision_model."
        ): torch.tensor(value)
        for name, value in weights(adapter("tower")).items()
    }
    assert not set(named) & set(weights(adapter("tower")))
    torch.save(named, folder / "adapter_model.bin")
    ours = [open_model(one, base=saved("llava")) for one in (folder, adapter("tower"))]
    assert_same_params(*(model.adapters for model in ours))


# ------------------------------------------------------------------ models with PyTorch code of ours


def adapted(model: Pretrained, targets: str = "q,v,down", **settings) -> Pretrained:
    """The model with random adapters, and in its own dtype."""
    cfg = LoraConfig(**dict(rank=3, alpha=4, dropout=0.1, targets=targets) | settings)
    shapes = lora.shapes(cfg, {path: leaf.shape for path, leaf in flatten(model.params).items()})
    rng = np.random.default_rng(0)
    made = {path: jax.numpy.asarray(0.3 * rng.standard_normal(shape, np.float32)) for path, shape in shapes.items()}
    return dataclasses.replace(model, lora=cfg, adapters=made)


@pytest.mark.parametrize(
    "targets", ["q,v,down", "^decoder/layers/(q|up)$|^vision/layers/(k|o|down)$"], ids=["decoder", "tower"]
)
def test_a_delta_model(targets, composed, tmp_path):
    """Written as a workdir, for peft, read back, merged: always the same."""
    model = adapted(composed("clip", "llama_grouped", "delta", **DELTA), targets)
    (tmp_path / "work").mkdir()
    write_workdir(model, tmp_path / "work", "delta")
    assert_same_params(read_workdir(tmp_path / "work").adapters, model.adapters)
    convert(tmp_path / "work", tmp_path / "delta", "--to", "peft")
    theirs = with_adapter(tmp_path / "delta" / "base", tmp_path / "delta")
    mine = our_logits(model.merged(), ROWS, IMAGES, 16)
    assert_close(mine, their_logits(theirs, opened=1))
    tokens = our_tokens(deltallava_jax.load(tmp_path / "work"), PROMPTS, IMAGES, 16)
    assert tokens == their_tokens(theirs, opened=1) == our_tokens(model.merged(), PROMPTS, IMAGES, 16)
    again = open_model(tmp_path / "delta")  # its base is found by name
    assert_same_params(again.adapters, model.adapters)
    assert dataclasses.replace(again.lora, targets="") == dataclasses.replace(model.lora, targets="")
    shutil.move(tmp_path / "delta", tmp_path / "moved")
    assert_same_params(open_model(tmp_path / "moved").adapters, model.adapters)


# ------------------------------------------------------------------ LLaVA


def test_llava_to_ours_and_back(adapter, saved, tmp_path, capsys):
    source, projector = llava_adapter(saved("llava"), adapter(), tmp_path / "llava-lora")
    convert(source, tmp_path / "work", "--base", saved("llava"))
    said = capsys.readouterr().err
    assert "lmsys/vicuna-7b-v1.5" in said and str(saved("llava")) in said
    assert f"the projector: from {source / 'non_lora_trainables.bin'}" in said
    assert workdir_config(tmp_path / "work").data.aspect == "pad"
    back = tmp_path / "llava-again-lora"
    convert(tmp_path / "work", back, "--to", "llava")
    assert "the projector: in " in capsys.readouterr().err
    assert_same_bits(weights(back), weights(source))
    state = torch.load(back / "non_lora_trainables.bin", weights_only=True)
    assert_same_bits(
        {name: value.numpy() for name, value in state.items()},
        {f"base_model.model.{name}": value for name, value in projector.items()},
    )
    ours, theirs = adapters.config(back), adapters.config(source)
    for key in ("peft_type", "task_type", "r", "lora_alpha", "lora_dropout", "bias", "base_model_name_or_path"):
        assert ours[key] == theirs[key], key
    ours, theirs = (json.loads((folder / "config.json").read_text()) for folder in (back, source))
    for key in ("model_type", "mm_projector_type", "mm_hidden_size", "mm_vision_select_layer", "image_aspect_ratio"):
        assert ours[key] == theirs[key], key
    assert not list(back.glob("model*.safetensors"))
    again = open_model(back, base=saved("llava"))
    assert_same_params(again.adapters, read_workdir(tmp_path / "work").adapters)


def test_llava_adapters_answer_as_peft_with_that_projector(adapter, saved, tmp_path):
    source, projector = llava_adapter(saved("llava"), adapter(), tmp_path / "llava-lora")
    theirs = with_adapter(saved("llava"), adapter())
    layers = theirs.get_base_model().model.multi_modal_projector
    for ours, name in ((layers.linear_1, "0"), (layers.linear_2, "2")):
        for part in ("weight", "bias"):
            getattr(ours, part).data = torch.tensor(projector[f"model.mm_projector.{name}.{part}"])
    reference = their_logits(theirs)
    convert(source, tmp_path / "peft", "--base", saved("llava"), "--to", "peft")
    assert_close(their_logits(with_adapter(tmp_path / "peft" / "base", tmp_path / "peft")).numpy(), reference)
    convert(source, tmp_path / "whole", "--base", saved("llava"), "--to", "llava", "--merge")
    assert_close(our_logits(open_model(tmp_path / "whole"), ROWS, IMAGES, 16), reference)


def test_a_base_without_tower_and_projector(adapter, saved, tmp_path, target):
    """LLaVA's published adapters: the base is Vicuna alone, and config.json names the tower."""
    base = tmp_path / "vicuna"
    whole = loaded(saved("llava"))
    text = AutoModelForCausalLM.from_config(whole.config.text_config)
    text.model.load_state_dict(whole.model.language_model.state_dict())
    text.lm_head.load_state_dict(whole.lm_head.state_dict())
    text.save_pretrained(base)
    source, _ = llava_adapter(saved("llava"), adapter(), tmp_path / "llava-lora")
    tower = tower_folder(saved("llava"), tmp_path / "clip")
    model = open_model(source, base=base, vision=tower)
    same = open_model(source, base=saved("llava"))
    assert model.cfg == same.cfg and model.aspect == same.aspect == "pad"
    assert_same_params(model.params, same.params)
    assert_same_params(model.adapters, same.adapters)
    with pytest.raises(deltallava_jax.errors.ConversionError, match="give the tower's folder with --vision"):
        open_model(source, base=base)

"""Tiny Hugging Face models with random parameters, saved into folders, and what tests do with such folders."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path

import ml_dtypes  # noqa: F401  safetensors asks numpy for bfloat16
import numpy as np
import torch
import transformers as t
from safetensors.numpy import load_file
from tokenizers import AddedToken, Tokenizer
from tokenizers.processors import ByteLevel, TemplateProcessing
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from deltallava_jax import __main__
from deltallava_jax.data import tokens
from deltallava_jax.data.conversation import Tokenized
from deltallava_jax.inference.generate import prompt_batch
from deltallava_jax.models.names import flatten
from deltallava_jax.sequence import Batch
from tests.models import hf

t.logging.set_verbosity_error()
t.logging.disable_progress_bar()

WIDTH, VOCAB, SIDE, IMAGE_TOKEN = 32, 320, 34, 319
FULL = 300  # tokens of the tokenizer: a decoder with so many rows has none for the image token
# 34 pixels leave a remainder of two, which the patch convolution cuts off: a grid of 4 x 4.
TOWER = dict(
    image_size=SIDE,
    patch_size=8,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
)
TEXT = dict(
    vocab_size=VOCAB,
    hidden_size=WIDTH,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=256,
)
# Positions beyond 16 / low_freq_factor are stretched, so that rows of 40 tokens differ from plain rotary positions.
LLAMA3_ROPE = dict(
    rope_type="llama3",
    rope_theta=50.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)
PLAIN_ROPE = dict(rope_type="default", rope_theta=50.0)


def _llama(**changes):
    return t.LlamaConfig(**{**TEXT, "rms_norm_eps": 1e-5, "num_key_value_heads": 2, **changes})


def _qwen2(**changes):
    rope = dict(rope_type="default", rope_theta=1e6)
    return t.Qwen2Config(**{**TEXT, "eos_token_id": 2, "rope_parameters": rope, "num_key_value_heads": 1, **changes})


def _llava(text, **vision):
    return t.LlavaForConditionalGeneration(
        t.LlavaConfig(
            vision_config=t.CLIPVisionConfig(**{**TOWER, **vision}),
            text_config=text,
            image_token_index=IMAGE_TOKEN,
            image_seq_length=16,
        )
    )


def _siglip_llava(text):
    """The tower's last layer, all of its patches, and its pooling head, which LLaVA has no use for."""
    return t.LlavaForConditionalGeneration(
        t.LlavaConfig(
            vision_config=t.SiglipVisionConfig(**TOWER),
            text_config=text,
            image_token_index=IMAGE_TOKEN,
            image_seq_length=16,
            vision_feature_select_strategy="full",
            vision_feature_layer=-1,
        )
    )


def _pair(model, config, **changes):
    """CLIPModel or SiglipModel with a tiny text side."""
    text = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
    return model(config(vision_config=dict(TOWER), text_config=text, **changes))


MODELS = {
    "llama": lambda: t.LlamaForCausalLM(_llama(num_key_value_heads=4, vocab_size=FULL)),
    "llama_grouped": lambda: t.LlamaForCausalLM(_llama(rope_parameters=PLAIN_ROPE, rms_norm_eps=1e-2)),
    "llama3": lambda: t.LlamaForCausalLM(_llama(rope_parameters=LLAMA3_ROPE)),
    "qwen2": lambda: t.Qwen2ForCausalLM(_qwen2(tie_word_embeddings=True, vocab_size=FULL)),
    "clip": lambda: t.CLIPVisionModel(t.CLIPVisionConfig(**TOWER)),
    # 64 patches: more than PruMerge merges into one.
    "clip_fine": lambda: t.CLIPVisionModel(t.CLIPVisionConfig(**{**TOWER, "patch_size": 4})),
    "siglip": lambda: t.SiglipVisionModel(t.SiglipVisionConfig(**TOWER)),
    "clip_pair": lambda: _pair(t.CLIPModel, t.CLIPConfig, projection_dim=32),
    "siglip_pair": lambda: _pair(t.SiglipModel, t.SiglipConfig),
    "llava": lambda: _llava(_llama(rope_parameters=PLAIN_ROPE)),
    "llava_qwen2": lambda: _llava(_qwen2()),
    "llava_siglip": lambda: _siglip_llava(_llama()),
    # A tower of width 128 for the release's Delta projector, whose head width of 128 no tensor shows.
    "llava_wide": lambda: _llava(_llama(), hidden_size=128),
}
DECODERS = ("llama", "llama_grouped", "llama3", "qwen2")
TOWERS = ("clip", "clip_fine", "clip_pair", "siglip", "siglip_pair")
LLAVAS = ("llava", "llava_qwen2")

TEXTS = ["What is in the picture? ", "A small red circle on a blue square.", "The shape is green, is it not?"] * 3


@functools.cache
def tokenizer() -> tokens.Tokenizer:
    made = tokens.train(TEXTS, FULL)
    assert made.vocab_size == FULL
    return made


@functools.cache
def model(name: str):
    """The model of that name, float32, its parameters redrawn; nobody changes it."""
    torch.manual_seed(0)
    made = MODELS[name]()
    for part in (made.vision_model, made.text_model) if name.endswith("_pair") else (made,):
        hf.randomise(part, seed=len(name))
    return made.eval()


def save(name: str, folder: Path, dtype: str = "float32") -> Path:
    """The model as Hugging Face publishes such: weights, configs, tokenizer, image processor. Returns the folder.

    Of the tokenizers Llama's begin with <s> and Qwen2's do not; that of "llama" is as we write our own."""
    copy = MODELS[name]()
    copy.load_state_dict(model(name).state_dict())
    copy.to(getattr(torch, dtype)).save_pretrained(folder)
    if name not in TOWERS:
        tokenizer().save(folder / "tokenizer.json")
        if name != "llama":
            sides = {"padding_side": "left"} if "llava" in name else {}
            publish_tokenizer(folder, bos=None if "qwen2" in name else "<s>", **sides)
    if name not in DECODERS:
        size = {"shortest_edge": SIDE}
        processor = CLIPImageProcessorPil(size=size, crop_size=SIDE)
        if "siglip" in name:
            processor = SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE})
        processor.save_pretrained(folder)
    return folder


def publish_tokenizer(folder: Path, bos: str | None, **settings) -> None:
    """The folder's tokenizer as published ones are: <s> is added when text is encoded, a token for padding is named."""
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.post_processor = ByteLevel(trim_offsets=False)
    if bos is not None:
        special = [(bos, backend.token_to_id(bos))]
        backend.post_processor = TemplateProcessing(single=f"{bos} $A", special_tokens=special)
    backend.save(str(folder / "tokenizer.json"))
    names = {"bos_token": bos, "eos_token": "</s>", "pad_token": "<pad>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names | settings))


TEXTS_END = "<|endoftext|>"  # of the decoder that ``chat_decoder`` writes, in its generation_config.json
SPECIAL = (TEXTS_END, "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")


def chat_decoder(source: Path, folder: Path, bos: str | None) -> Path:
    """A copy of a decoder whose tokenizer knows every template's special tokens, and whose texts end with another."""
    shutil.copytree(source, folder)
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    backend.save(str(folder / "tokenizer.json"))
    publish_tokenizer(folder, bos)
    for name in ("config.json", "generation_config.json"):
        values = json.loads((folder / name).read_text()) if (folder / name).is_file() else {}
        values |= {"eos_token_id": backend.token_to_id(TEXTS_END), "pad_token_id": 0, "bos_token_id": 1}
        (folder / name).write_text(json.dumps(values | {"max_position_embeddings": 640}))
    return folder


def tensors(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of a folder's safetensors files, by name."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        found.update(load_file(file))
    assert found, f"no safetensors in {folder}"
    return found


def write_tensors(folder: Path, named: dict[str, np.ndarray]) -> None:
    from safetensors.numpy import save_file

    save_file({name: np.ascontiguousarray(value) for name, value in named.items()}, folder / "model.safetensors")


def write_config(folder: Path, **values) -> None:
    (folder / "config.json").write_text(json.dumps(values, indent=3))


def renamed(named: dict, *pairs: tuple[str, str]) -> dict:
    """The tensors with the first matching prefix of ``pairs`` (old, new) replaced; nothing may be left over."""

    def rename(name):
        return next(new + name.removeprefix(old) for old, new in pairs if name.startswith(old))

    return {rename(name): value for name, value in named.items()}


def assert_same_bits(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    """Equal names, dtypes, shapes and bytes."""
    assert sorted(ours) == sorted(theirs)
    for name, value in ours.items():
        other = theirs[name]
        assert (value.dtype, value.shape) == (other.dtype, other.shape), name
        assert value.tobytes() == other.tobytes(), f"{name} has other bits"


def copy_with(folder: Path, target: Path, named: dict[str, np.ndarray]) -> Path:
    """A copy of a folder with other weights. Returns it."""
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("*.safetensors", "*.bin", "*.index.json"))
    write_tensors(target, named)
    return target


def convert(*arguments) -> None:
    """python -m deltallava_jax convert, in this process."""
    options = __main__.parse(["convert", *map(str, arguments)])
    options.main(options)


COMPANIONS = ("config.json", "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json",
              "generation_config.json")  # fmt: skip


def assert_same_folder(ours, theirs):
    """Tensors, names and companion files."""
    assert_same_bits(tensors(ours), tensors(theirs))
    kept = [name for name in COMPANIONS if (theirs / name).exists()]
    assert "config.json" in kept
    for name in kept:
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name


def folders(parent, *names):
    """New empty folders."""
    for name in names:
        (parent / name).mkdir()
    return [parent / name for name in names]


def assert_same_params(ours: dict, theirs: dict):
    ours, theirs = ({path: np.asarray(leaf) for path, leaf in flatten(tree).items()} for tree in (ours, theirs))
    assert_same_bits(ours, theirs)


# ------------------------------------------------------------------ rows of ids for both sides


def rows_of(images: list[int], lengths: list[int], vocab: int = FULL, seed: int = 0) -> list[Tokenized]:
    """Random prompts: of each its length, with 0 in the place of each image, images after the first token."""
    rng = np.random.default_rng(seed)
    rows = []
    for count, length in zip(images, lengths, strict=True):
        ids = rng.integers(3, vocab, length).astype(np.int32)
        positions = np.arange(1, 1 + 2 * count, 2, dtype=np.int32)
        ids[positions] = 0
        nothing = np.zeros(length, np.int32)
        rows.append(Tokenized(ids, nothing.astype(bool), positions, nothing, np.zeros((count, 0), np.int32)))
    return rows


def pixels(count: int, seed: int = 1) -> np.ndarray:
    """[count, SIDE, SIDE, 3] normalised pixels."""
    return np.random.default_rng(seed).standard_normal((count, SIDE, SIDE, 3)).astype(np.float32)


def torch_pixels(images: np.ndarray) -> torch.Tensor:
    return torch.tensor(images.transpose(0, 3, 1, 2))


def torch_rows(rows: list[Tokenized], opened: int = 1, left: bool = False, image_token: int = IMAGE_TOKEN) -> dict:
    """input_ids and attention_mask of the rows, with ``opened`` image tokens for each image, padded on one side."""
    ids = [[i for x in row.ids.tolist() for i in ([image_token] * opened if x == 0 else [x])] for row in rows]
    length = max(map(len, ids))
    pad = lambda row, value: (left * [value] * (length - len(row))) + row + (not left) * [value] * (length - len(row))
    return {
        "input_ids": torch.tensor([pad(row, 0) for row in ids]),
        "attention_mask": torch.tensor([pad([1] * len(row), 0) for row in ids]),
    }


def torch_questions(rows: list[Tokenized]) -> dict:
    """question_ids and question_mask of every image's question, padded on the right."""
    found = [ids[ids >= 0].tolist() for row in rows for ids in row.questions]
    length = max(map(len, found))
    return {
        "question_ids": torch.tensor([ids + [0] * (length - len(ids)) for ids in found]),
        "question_mask": torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids in found]),
    }


def our_batch(rows: list[Tokenized], images: np.ndarray) -> Batch:
    """The rows with their images, which are given one after the other."""
    batch = prompt_batch(rows, max(len(row.ids) for row in rows))
    padded = np.zeros((*batch.image_positions.shape, *images.shape[1:]), images.dtype)
    start = 0
    for row, prompt in enumerate(rows):
        count = len(prompt.image_positions)
        padded[row, :count] = images[start : start + count]
        start += count
    return dataclasses.replace(batch, images=padded)

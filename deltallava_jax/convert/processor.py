"""The files beside an export's weights: tokenizer, image processor, processor, chat template, generation config."""

from __future__ import annotations

from pathlib import Path

from deltallava_jax.convert import chat_template
from deltallava_jax.convert.folder import write_json
from deltallava_jax.convert.pretrained import Pretrained
from deltallava_jax.convert.read import read_json
from deltallava_jax.data import tokens
from deltallava_jax.data.conversation import IMAGE as IMAGE_TOKEN
from deltallava_jax.data.conversation import TEMPLATES, end_id
from deltallava_jax.models import systems


def with_image_token(model: Pretrained):
    """(id of the image token, the tokenizer to save or None if the model has none)."""
    file = next((file for file in model.kept if file.name in tokens.FILES), None)
    if file is None:
        return model.hf.get("image_token_index", model.cfg.decoder.vocab_size), None
    tokenizer, token = tokens.load(file.parent).exported(IMAGE_TOKEN)
    return token, tokenizer


def write_processor(model: Pretrained, folder: Path, plain: bool) -> None:
    """preprocessor_config.json, processor_config.json and tokenizer_config.json."""
    vision = model.cfg.vision
    side = {"height": vision.image_size, "width": vision.image_size}
    crop = {"size": {"shortest_edge": vision.image_size}, "do_center_crop": True, "crop_size": side}
    resizing = {
        "square": {"image_processor_type": "CLIPImageProcessor", **crop},
        "pad": {"image_processor_type": "LlavaImageProcessor", "do_pad": True, **crop},
        "squash": {"image_processor_type": "SiglipImageProcessor", "size": side},
    }
    pixels = resizing[model.aspect] | {
        "do_resize": True, "resample": 3,
        "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "image_mean": list(vision.image_mean), "image_std": list(vision.image_std),
        "do_convert_rgb": True,
    }  # fmt: skip
    processor = {
        "processor_class": "LlavaProcessor",
        "image_token": IMAGE_TOKEN,
        "patch_size": vision.patch_size,
        "vision_feature_select_strategy": "default" if vision.family == "clip" else "full",
        "num_additional_image_tokens": 1 if vision.family == "clip" else 0,
    }
    if not plain:
        code = "processing_deltallava.DeltaLlavaProcessor"
        processor = {"processor_class": "DeltaLlavaProcessor", "auto_map": {"AutoProcessor": code}}
        if systems.reads_question(model.cfg.projector):
            processor["question_end"] = TEMPLATES[model.template].question_end
    write_json(folder / "preprocessor_config.json", pixels)
    write_json(folder / "processor_config.json", processor)
    if (folder / "tokenizer.json").exists():
        file = folder / "tokenizer_config.json"
        config = read_json(file) if file.exists() else {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
        config |= {"tokenizer_class": config.get("tokenizer_class", "PreTrainedTokenizerFast")}
        config |= {"image_token": IMAGE_TOKEN, "processor_class": processor["processor_class"]}
        write_json(file, config)


def write_prompting(model: Pretrained, folder: Path) -> None:
    """The chat template and the tokens that end an answer, in a whole model's folder. An equivalent template stays."""
    jinja = chat_template.read_jinja(folder)
    if jinja is None or (chat_template.recognise(jinja) or chat_template.FALLBACK) != model.template:
        write_chat_template(model, folder)
    if any((folder / name).is_file() for name in tokens.FILES):
        _write_ends(folder, end_id(TEMPLATES[model.template], tokens.load(folder)))


def write_padding_side(folder: Path) -> None:
    """Left, so that a row's answer does not depend on the rest of the batch."""
    file = folder / "tokenizer_config.json"
    if file.is_file() and (config := read_json(file)).get("padding_side") != "left":
        write_json(file, config | {"padding_side": "left"})


def write_chat_template(model: Pretrained, folder: Path) -> None:
    """chat_template.jinja, in place of the decoder's own, which is for text only."""
    (folder / "chat_template.json").unlink(missing_ok=True)
    for name in ("processor_config.json", "tokenizer_config.json"):
        if (folder / name).is_file() and "chat_template" in (config := read_json(folder / name)):
            write_json(folder / name, {key: value for key, value in config.items() if key != "chat_template"})
    (folder / chat_template.FILE).write_text(chat_template.to_jinja(TEMPLATES[model.template]))


def _write_ends(folder: Path, end: int | None) -> None:
    """Adds ``end`` to the tokens that end an answer, in generation_config.json and in the decoder's config."""
    config = read_json(folder / "config.json")
    file = folder / "generation_config.json"
    text = config.get("text_config", config)
    special = {key: text[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in text}
    generation = read_json(file) if file.is_file() else special
    for path, whole, section in ((folder / "config.json", config, text), (file, generation, generation)):
        named = section.get("eos_token_id")
        ends = named if isinstance(named, list) else [] if named is None else [named]
        if end is not None and end not in ends:
            section["eos_token_id"] = [*ends, end] if ends else end
            write_json(path, whole)

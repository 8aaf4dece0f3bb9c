"""What stands beside an export's weights for AutoProcessor: tokenizer, image processor, processor."""

from __future__ import annotations

from pathlib import Path

from deltallava_jax.convert.folder import write_json
from deltallava_jax.convert.read import Pretrained, read_json
from deltallava_jax.data import tokens
from deltallava_jax.data.conversation import IMAGE as IMAGE_TOKEN
from deltallava_jax.data.conversation import TEMPLATES
from deltallava_jax.models import projectors


def with_image_token(model: Pretrained):
    """(id of the image token, the tokenizer to save, None where the model has none)."""
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
        if projectors.reads_question(model.cfg.projector):
            processor["question_end"] = TEMPLATES[model.template].question_end
    write_json(folder / "preprocessor_config.json", pixels)
    write_json(folder / "processor_config.json", processor)
    if (folder / "tokenizer.json").exists():
        file = folder / "tokenizer_config.json"
        config = read_json(file) if file.exists() else {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
        config |= {"tokenizer_class": config.get("tokenizer_class", "PreTrainedTokenizerFast")}
        config |= {"image_token": IMAGE_TOKEN, "processor_class": processor["processor_class"]}
        write_json(file, config)

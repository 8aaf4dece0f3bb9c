"""Exports our models for PyTorch: in Hugging Face's layout and in the original LLaVA layout."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp

from deltallava_jax.config import DecoderConfig, ModelConfig, ProjectorConfig, VisionConfig, preset, to_dict
from deltallava_jax.convert.families import decoder_family, tower_family
from deltallava_jax.convert.folder import write_json
from deltallava_jax.convert.pretrained import CheckpointLayout, Pretrained
from deltallava_jax.convert.processor import (
    with_image_token,
    write_chat_template,
    write_padding_side,
    write_processor,
    write_prompting,
)
from deltallava_jax.convert.read import KNOWN_TOWERS, PROJECTOR_KEY, read_json
from deltallava_jax.convert.shards import SHARD_BYTES, write_weights
from deltallava_jax.errors import ConversionError
from deltallava_jax.models import systems
from deltallava_jax.models.layers import Params
from deltallava_jax.models.names import flatten, unflatten
from deltallava_jax.models.systems.base import ScaleConfig
from deltallava_jax.models.vision import check_needs

HF = CheckpointLayout(
    "vision_tower.vision_model.", "multi_modal_projector.", "language_model.model.", "language_model.", True
)
HF_DECODER = CheckpointLayout(decoder="model.", head="")
HF_TOWER = CheckpointLayout(vision="vision_model.")
LLAVA = CheckpointLayout("model.vision_tower.vision_tower.vision_model.", "model.mm_projector.", "model.", "", False)
TORCH_MODULES = Path(__file__).parent / "torch_modules"


def write_hf(model: Pretrained, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """A folder for transformers. A model with the MLP projector becomes a LlavaForConditionalGeneration, a decoder or a
    tower alone the model of its family; other projectors come with their PyTorch code (trust_remote_code). Adapters are
    merged.

    Raises ConversionError for other subsets of the parts, for FastV, or for a projector without PyTorch code."""
    model = model.merged()
    cfg = model.cfg
    _refuse_fastv(cfg, "hf")
    if cfg.whole:
        _write_whole_hf(model, folder, shard_bytes)
    elif cfg.decoder and not (cfg.vision or cfg.projector):
        layout = model.layout if _hf_kind(model.hf) == "part" else HF_DECODER
        config = model.hf or decoder_family(cfg.decoder).to_hf(cfg.decoder)
        _write(model, folder, layout, config, shard_bytes)
    elif cfg.vision and not (cfg.decoder or cfg.projector):
        layout = model.layout if _hf_kind(model.hf) == "part" else HF_TOWER
        config = model.hf or tower_family(cfg.vision).to_hf(cfg.vision)
        if "vision_config" in config:  # the tower of a CLIPModel
            family = tower_family(cfg.vision)
            config = {
                "architectures": [family.architecture],
                **config["vision_config"],
                "model_type": family.model_type,
            }
        _write(model, folder, layout, config, shard_bytes)
    else:
        parts = ", ".join(part for part in ("vision", "projector", "decoder") if getattr(cfg, part))
        raise ConversionError(f"--to hf: the model has only {parts}; expected a whole model, a decoder or a tower")


def _write_whole_hf(model: Pretrained, folder: Path, shard_bytes: int) -> None:
    cfg = model.cfg
    plain = systems.system(cfg.projector).is_llava
    if _hf_kind(model.hf) == "llava" and unchanged(model):
        _write(model, folder, model.layout, model.hf, shard_bytes)
    else:
        token, tokenizer = with_image_token(model)
        params, decoder = _with_image_row(model.params, cfg.decoder, token)
        model = dataclasses.replace(
            model, cfg=dataclasses.replace(cfg, decoder=decoder), params=params, extra={}, layout=None
        )
        config = _llava_config(model, token, plain)
        _write(model, folder, HF if plain else dataclasses.replace(HF, hf_projector=False), config, shard_bytes)
        if tokenizer is not None:
            tokenizer.save(str(folder / "tokenizer.json"))
        write_processor(model, folder, plain)
        write_chat_template(model, folder)
    write_prompting(model, folder)
    write_padding_side(folder)
    if not plain:
        for file in (*TORCH_MODULES.glob("*_deltallava.py"), TORCH_MODULES / "projector_parts.py"):
            shutil.copy(file, folder)
        shutil.copy(projector_code(cfg.projector), folder / "projector.py")


def projector_code(cfg: ProjectorConfig) -> Path:
    """The file with a system's PyTorch code. Raises ConversionError if there is none."""
    file = TORCH_MODULES / systems.system(cfg).torch_code
    if not file.is_file():
        raise ConversionError(f"--to hf: there is no PyTorch code for the {cfg.name} projector")
    return file


def _refuse_fastv(cfg: ModelConfig, to: str) -> None:
    """Raises ConversionError for FastV, which transformers' decoders do not implement."""
    if cfg.fastv:
        raise ConversionError(
            f"--to {to} does not support model.fastv, which drops visual tokens inside the decoder; to export the "
            "model without it, which has the same weights, set model.fastv to null in the workdir's config.json"
        )


def write_llava(model: Pretrained, folder: Path, shard_bytes: int | None = SHARD_BYTES) -> None:
    """A folder in the original LLaVA layout: names, shapes and config.json as haotian-liu/LLaVA's code reads them.
    Adapters are merged.

    shard_bytes: None for all but the weights, as beside an adapter. Raises ConversionError for a model that lacks one
    of its parts, or for FastV."""
    model = model.merged()
    cfg = model.cfg
    _refuse_fastv(cfg, "llava")
    if not (cfg.projector and cfg.decoder and cfg.vision):
        raise ConversionError(f"--to llava needs a whole model; this one has no {', no '.join(cfg.missing)}")
    if "mm_vision_tower" in model.hf and unchanged(model):
        _write(model, folder, model.layout, model.hf, shard_bytes)
        name = model.hf["mm_vision_tower"]
        known = name.split("/")[-1] in KNOWN_TOWERS or Path(name).is_absolute()
        if model.layout.vision is not None and not known and shard_bytes:
            (folder / name).mkdir(parents=True)
            write_json(folder / name / "config.json", tower_family(cfg.vision).to_hf(cfg.vision))
        write_prompting(model, folder)
        return
    vision = tower_family(cfg.vision)
    published = next((name for name, key in KNOWN_TOWERS.items() if cfg.vision == preset(VisionConfig, key)), None)
    owner = "openai" if cfg.vision.family == "clip" else "google"
    tower = f"{owner}/{published}" if published else "vision_tower"
    qwen = cfg.decoder.qkv_bias
    config = (
        decoder_family(cfg.decoder).to_hf(cfg.decoder)
        | _kept_keys(model.hf)
        | {
            "model_type": "llava_qwen" if qwen else "llava_llama",
            "architectures": ["LlavaQwenForCausalLM" if qwen else "LlavaLlamaForCausalLM"],
            "mm_vision_tower": tower,
            "mm_hidden_size": cfg.vision.width,
            "mm_projector_type": "mlp2x_gelu" if systems.system(cfg.projector).is_llava else cfg.projector.name,
            "mm_vision_select_layer": cfg.projector.select_layer,
            "mm_vision_select_feature": "patch",
            "mm_use_im_start_end": False,
            "mm_use_im_patch_token": False,
            "image_aspect_ratio": model.aspect,
            PROJECTOR_KEY: to_dict(cfg.projector),
        }
    )
    if isinstance(cfg.projector, ScaleConfig):
        config["scale_factor"] = cfg.projector.scale_factors[0]
    _write(model, folder, LLAVA, config, shard_bytes)
    write_chat_template(model, folder)
    write_prompting(model, folder)
    if published is None and shard_bytes:
        (folder / tower).mkdir()
        write_json(folder / tower / "config.json", vision.to_hf(cfg.vision))


def _hf_kind(hf: dict) -> str | None:
    """ "llava" or "part" for a Hugging Face config.json of a whole model or of a part of one, else None."""
    if "text_config" in hf:
        return "llava"
    return None if "mm_vision_tower" in hf or not hf else "part"


def unchanged(model: Pretrained) -> bool:
    """Whether the source's config.json and the files beside it still describe the model."""

    def parts(cfg: ModelConfig) -> tuple:
        return cfg.vision, cfg.projector, cfg.decoder

    return model.origin is not None and (parts(model.origin), model.origin_aspect) == (parts(model.cfg), model.aspect)


# ------------------------------------------------------------------ config.json


def _llava_config(model: Pretrained, image_token: int, plain: bool) -> dict:
    cfg = model.cfg
    text = decoder_family(cfg.decoder).to_hf(cfg.decoder) | _kept_keys(model.hf)
    vision = tower_family(cfg.vision).to_hf(cfg.vision)
    if cfg.vision.family == "siglip":
        vision["vision_use_head"] = False
    config = {
        "architectures": ["LlavaForConditionalGeneration" if plain else "DeltaLlavaForConditionalGeneration"],
        "model_type": "llava" if plain else "deltallava",
        "dtype": _main_dtype(model.params),
        "image_token_index": image_token,
        "text_config": text,
        "vision_config": vision,
        "tie_word_embeddings": cfg.decoder.tied_head,
    }
    if plain:
        return config | {
            "vision_feature_layer": cfg.projector.select_layer,
            "vision_feature_select_strategy": "default" if cfg.vision.family == "clip" else "full",
            "projector_hidden_act": "gelu",
            "image_seq_length": cfg.projector.grid**2,
        }
    needs = systems.needs(cfg.projector, cfg.vision.layers)
    check_needs(cfg.vision, needs)
    return config | {
        PROJECTOR_KEY: to_dict(cfg.projector),
        "select": {**to_dict(needs), "drop_cls": cfg.vision.family == "clip"},
        "budgets": list(systems.budgets(cfg.projector)),
        "auto_map": {
            "AutoConfig": "configuration_deltallava.DeltaLlavaConfig",
            "AutoModel": "modeling_deltallava.DeltaLlavaForConditionalGeneration",
            "AutoModelForImageTextToText": "modeling_deltallava.DeltaLlavaForConditionalGeneration",
        },
    }


def _kept_keys(hf: dict) -> dict:
    """The keys of the decoder's config in a source's config.json that generation needs and DecoderConfig lacks."""
    text = hf.get("text_config", hf)
    return {key: text[key] for key in ("max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
            if key in text}  # fmt: skip


def _untied(config: dict) -> dict:
    """The config.json with tie_word_embeddings false, also in its text_config."""
    config = config | {"tie_word_embeddings": False} if config.get("tie_word_embeddings") else config
    return config | {"text_config": _untied(config["text_config"])} if "text_config" in config else config


def _main_dtype(params: Params) -> str:
    sizes: dict[str, int] = {}
    for leaf in jax.tree.leaves(params):
        sizes[str(leaf.dtype)] = sizes.get(str(leaf.dtype), 0) + leaf.size
    return max(sizes, key=sizes.get)


def _with_image_row(params: Params, cfg: DecoderConfig, token: int) -> tuple[Params, DecoderConfig]:
    """Embedding and head with a row for the image token; new rows are the mean of the others, so never the argmax."""
    if token < cfg.vocab_size:
        return params, cfg
    size = -(-(token + 1) // 64) * 64
    flat = flatten(params)
    for path, axis in (("decoder/embed/embedding", 0), ("decoder/head/out/kernel", 1)):
        if path in flat:
            leaf = flat[path]
            mean = jnp.mean(leaf, axis, keepdims=True, dtype=jnp.float32).astype(leaf.dtype)
            flat[path] = jnp.concatenate([leaf, jnp.repeat(mean, size - cfg.vocab_size, axis)], axis)
    return unflatten(flat), dataclasses.replace(cfg, vocab_size=size)


def _write(model: Pretrained, folder: Path, layout: CheckpointLayout, config: dict, shard_bytes: int | None) -> None:
    """Kept files, config.json and, unless ``shard_bytes`` is None, the weights, in shards of at most as many."""
    if model.cfg.decoder and not model.cfg.decoder.tied_head:  # a source may claim a tied head and hold another matrix
        config = _untied(config)
    dtypes = {str(leaf.dtype) for leaf in jax.tree.leaves(model.params)}
    for key in ("dtype", "torch_dtype"):
        if key in config and config[key] not in dtypes:  # the parameters were cast
            config = config | {key: _main_dtype(model.params)}
    for file in model.kept:
        shutil.copy(file, folder / file.name)
    if not (folder / "config.json").is_file() or read_json(folder / "config.json") != config:
        write_json(folder / "config.json", config)
    if shard_bytes:
        write_weights(model, folder, layout, shard_bytes)

"""Reads checkpoints as our models: Hugging Face folders, the original LLaVA layout, projector files."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding

from deltallava_jax import config
from deltallava_jax.config import (
    ASPECTS,
    ModelConfig,
    ProjectorConfig,
    VisionConfig,
    drop_foreign,
    from_dict,
    preset,
    settings_of,
    system_config,
)
from deltallava_jax.convert.arrays import load_array, unstacked_arrays
from deltallava_jax.convert.chat_template import FALLBACK, template_of
from deltallava_jax.convert.families import DECODERS, PAIRS, TOWERS, refuse
from deltallava_jax.convert.pretrained import CheckpointLayout, Pretrained, shapes_of
from deltallava_jax.convert.tensors import ADAPTER_FILES, Tensor, equal, find
from deltallava_jax.errors import ConfigError, ConversionError
from deltallava_jax.models import systems, vlm
from deltallava_jax.models.layers import Params
from deltallava_jax.models.names import require_match, unflatten
from deltallava_jax.progress import progress_bar

# Towers that the original layout's config.json names, and the presets of their sizes.
KNOWN_TOWERS = {
    "clip-vit-large-patch14-336": "clip_l_14_336",
    "clip-vit-large-patch14": "clip_l_14_224",
    "clip-vit-base-patch32": "clip_b_32_224",
    "siglip-so400m-patch14-384": "siglip_so400m_14_384",
}
Shard = Callable[[str, tuple[int, ...]], Sharding]
PARTS = ("vision", "projector", "decoder", "head")
PROJECTOR_KEY = "deltallava_projector"  # the whole ProjectorConfig, in the config.json of our exports


def read(
    path: Path,
    *,
    vision: Path | None = None,
    dtype: str | None = None,
    shard: Shard | None = None,
    unstacked: bool = False,
    progress: bool = True,
) -> Pretrained:
    """The model in a folder in Hugging Face's or the original LLaVA layout, or in a projector's weights file.

    vision: the tower's folder, for checkpoints that only name it. dtype: of the parameters; by default as saved.
    shard(path, shape): each parameter's sharding; by default the first device. unstacked: the decoder in the form of
    ``decoder.unstacked``, its matrices in the compute dtype unless ``dtype`` is given. Raises ConversionError for a
    damaged or unknown checkpoint, WeightMismatch with both sides if the weights do not match config.json."""
    tensors = find(path)
    folder = path if path.is_dir() else path.parent
    hf = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    layout = _layout(tensors)
    if vision is not None and not vision.is_dir():
        raise ConversionError(f"--vision {vision} does not exist")
    if vision is not None and "mm_vision_tower" not in hf:
        raise ConversionError(f"--vision is for checkpoints that name a tower they lack; {path} names none")
    if not hf and layout.projector != "":
        raise ConversionError(f"{path} has no config.json, which describes the model")
    try:
        cfg = _config(path, hf, layout, tensors, vision)
        aspect = _aspect(path, hf, cfg.vision, vision)
    except (TypeError, KeyError, AttributeError, ZeroDivisionError) as error:
        raise ConversionError(f"{folder / 'config.json'} holds an invalid value: {error!r}") from error
    cfg = _with_own_head(cfg, layout, tensors)
    tower = None
    if "mm_vision_tower" in hf and layout.vision is None and cfg.vision:
        tower = read(tower_folder(path, hf["mm_vision_tower"], vision), dtype=dtype, shard=shard, progress=progress)
    own = cfg if tower is None else dataclasses.replace(cfg, vision=None)
    params, extra = _load(own, layout, tensors, dtype, shard, progress, unstacked)
    if tower is not None:
        params = {"vision": tower.params["vision"], **params}
    kept = sorted(file for file in folder.iterdir() if _is_kept(file)) if path.is_dir() else []
    template = template_of(folder) if cfg.whole else FALLBACK
    return Pretrained(cfg, params, layout, cfg, hf, kept, extra, template, aspect, aspect)


def read_projector(path: Path, dtype: str | None = None) -> Pretrained:
    """Only the projector of a checkpoint, whatever else it holds. Raises as ``read`` does."""
    tensors = find(path)
    file = (path if path.is_dir() else path.parent) / "config.json"
    found = _layout(tensors)
    if found.projector is None:
        raise ConversionError(f"{path} holds no projector; known systems: {', '.join(systems.SYSTEMS)}")
    layout = CheckpointLayout(projector=found.projector, hf_projector=found.hf_projector)
    cfg = ModelConfig(
        None, _projector_config(read_json(file) if file.is_file() else {}, layout, tensors, None, 0), None
    )
    names = {entry.torch for entry in layout.name_table(cfg)}
    own = {name: tensor for name, tensor in tensors.items() if name in names}
    params, _ = _load(cfg, layout, own, dtype, None, False)
    return Pretrained(cfg, params, layout, cfg)


def read_json(path: Path) -> dict:
    """The object in a JSON file. Raises ConversionError if the file is missing or holds something else."""
    try:
        return config.read_json(path)
    except ConfigError as error:
        raise ConversionError(str(error)) from error


def _is_kept(file: Path) -> bool:
    """Whether a file beside the weights belongs to the model: config, tokenizer, processor, template, but not code."""
    known = file.suffix in (".json", ".txt", ".model", ".jinja") and file.name not in ADAPTER_FILES
    return file.is_file() and known and ".index." not in file.name


# ------------------------------------------------------------------ layout and config


def _layout(tensors: dict[str, Tensor]) -> CheckpointLayout:
    """The prefixes, found by tensor names that every family has."""

    def before(*endings: str) -> str | None:
        return next((name.removesuffix(end) for end in endings for name in tensors if name.endswith(end)), None)

    projector = None
    for marker in ("multi_modal_projector.", "mm_projector.", *systems.prefixes()):
        found = next((name for name in tensors if marker in name), None)
        if found is not None:
            projector = found[: found.index(marker) + len(marker)]
            break
    head = before("lm_head.weight")
    decoder = before("embed_tokens.weight", "layers.0.input_layernorm.weight")
    vision = before("embeddings.patch_embedding.weight", "post_layernorm.weight")
    if projector is None and decoder is None and vision is None:
        projector = ""  # a projector's state dict alone
    return CheckpointLayout(
        vision=vision,
        projector=projector,
        decoder=decoder,
        head=head if head is not None else decoder,
        hf_projector=f"{projector}linear_1.weight" in tensors,
    )


def _config(
    path: Path, hf: dict, layout: CheckpointLayout, tensors: dict[str, Tensor], vision: Path | None
) -> ModelConfig:
    """The model's config, from config.json and, for the projector, from its tensors' shapes."""
    kind = hf.get("model_type") or ""
    preprocessor = _preprocessor(path)
    dtype = "float32" if all(t.dtype == np.float32 for t in tensors.values()) else "bfloat16"
    model = functools.partial(ModelConfig, dtype=dtype)
    if kind in DECODERS and layout.projector is None:
        return model(None, None, DECODERS[kind].to_ours(hf))
    if kind in TOWERS or kind in PAIRS:
        section = hf.get("vision_config", {}) if kind in PAIRS else hf
        return model(TOWERS[PAIRS.get(kind, kind)].to_ours(section, preprocessor), None, None)
    alone = layout.projector is not None and layout.decoder is layout.vision is None
    if alone and (layout.projector or not kind):
        return model(None, _projector_config(hf, layout, tensors, None, 0), None)
    if "text_config" in hf:
        if not isinstance(hf["text_config"], dict):
            raise ConversionError(f"{path}: text_config={hf['text_config']!r} in config.json; expected an object")
        text, tower = dict(hf["text_config"]), dict(hf.get("vision_config") or {})
        text.setdefault("tie_word_embeddings", hf.get("tie_word_embeddings", False))
        text_kind, tower_kind = text.get("model_type", "llama"), tower.get("model_type", "clip_vision_model")
        if text_kind not in DECODERS or tower_kind not in TOWERS:
            raise _unknown(path, f"{kind} of {text_kind} and {tower_kind}")
        vision_cfg = TOWERS[tower_kind].to_ours(tower, preprocessor)
        refuse(hf, kind, vision_feature_select_strategy="default" if vision_cfg.family == "clip" else "full",
               projector_hidden_act="gelu", multimodal_projector_bias=True, quantization_config=None)  # fmt: skip
        decoder_cfg = DECODERS[text_kind].to_ours(text)
        layer = hf.get("vision_feature_layer", -2)
        if not isinstance(layer, int):
            raise ConversionError(f"{kind} option vision_feature_layer={layer!r} is not supported; expected a number")
    elif "mm_vision_tower" in hf:
        text_kind = "qwen2" if "qwen" in kind else "llama"
        if kind not in ("llava", "llava_llama", "llava_qwen", "llava_qwen2", *DECODERS):
            raise _unknown(path, kind)
        refuse(hf, kind, mm_vision_select_feature="patch", mm_use_im_start_end=False, quantization_config=None)
        decoder_cfg = DECODERS[text_kind].to_ours(hf)
        layer = hf.get("mm_vision_select_layer", -2)
        vision_cfg = _named_tower(path, hf["mm_vision_tower"], layout, vision)
    else:
        raise _unknown(path, kind)
    if layout.projector is None:
        raise ConversionError(f"{path} holds no projector weights (multi_modal_projector.* or mm_projector.*)")
    layer = layer if layer < 0 else layer - (vision_cfg.layers + 1)
    return model(vision_cfg, _projector_config(hf, layout, tensors, vision_cfg, layer), decoder_cfg)


def _unknown(path: Path, kind: str | None) -> ConversionError:
    known = ", ".join([*DECODERS, *TOWERS, *PAIRS, "llava", "llava_llama"])
    return ConversionError(f"{path} holds a model of model_type {kind!r}; known: {known}")


def _preprocessor(path: Path) -> dict:
    """Settings of the image processor; transformers 5 saves them in processor_config.json."""
    whole = path / "processor_config.json"
    settings = read_json(whole).get("image_processor") if whole.is_file() else None
    alone = path / "preprocessor_config.json"
    return settings or (read_json(alone) if alone.is_file() else {})


def _aspect(path: Path, hf: dict, cfg: VisionConfig | None, vision: Path | None) -> str:
    """How images become square: by config.json, else by the image processor, else by the tower's family."""
    aspect = hf.get("image_aspect_ratio")
    if aspect == "square" and PROJECTOR_KEY not in hf:  # in the original code: whatever the tower's processor does
        aspect = None
    if aspect is not None and aspect not in ASPECTS:
        raise ConversionError(f"option image_aspect_ratio={aspect!r} is not supported; known: {', '.join(ASPECTS)}")
    if aspect is not None or cfg is None:
        return aspect or "square"
    folder = tower_folder(path, hf["mm_vision_tower"], vision) if "mm_vision_tower" in hf else path
    pixels = _preprocessor(folder or path)
    if pixels.get("do_pad"):
        return "pad"
    size = pixels.get("size")
    squashed = "height" in size if isinstance(size, dict) else cfg.family == "siglip"
    return "squash" if squashed else "square"


def tower_folder(path: Path, name: str, vision: Path | None) -> Path | None:
    """The folder of the tower that the original layout names in mm_vision_tower; ``vision`` if that is given."""
    if not isinstance(name, str):
        raise ConversionError(f"{path}: mm_vision_tower={name!r} in config.json; expected the tower's name")
    folders = [vision] if vision else [path / name, Path(name)]
    return next((folder for folder in folders if (folder / "config.json").is_file()), None)


def _named_tower(path: Path, name: str, layout: CheckpointLayout, vision: Path | None) -> VisionConfig:
    """The config of that tower, from its folder or from a preset."""
    folder = tower_folder(path, name, vision)
    if folder is not None:
        hf = read_json(folder / "config.json")
        kind = PAIRS.get(hf.get("model_type"), hf.get("model_type"))
        if kind not in TOWERS:
            raise _unknown(folder, hf.get("model_type"))
        return TOWERS[kind].to_ours(hf.get("vision_config", hf), _preprocessor(folder))
    if layout.vision is None or name.split("/")[-1] not in KNOWN_TOWERS:
        raise ConversionError(f"{path} names the tower {name!r} but lacks it; give its folder with --vision")
    return preset(VisionConfig, KNOWN_TOWERS[name.split("/")[-1]])


def _projector_config(
    hf: dict, layout: CheckpointLayout, tensors: dict[str, Tensor], vision: VisionConfig | None, select_layer: int
) -> ProjectorConfig:
    """The projector's config, from config.json in our exports, else from the shapes of its tensors."""
    prefix = layout.projector or ""
    shapes = {name.removeprefix(prefix): t.shape for name, t in tensors.items() if name.startswith(prefix)}
    if layout.hf_projector:
        shapes = {name.replace("linear_1.", "0.").replace("linear_2.", "2."): shape for name, shape in shapes.items()}
    if PROJECTOR_KEY in hf:
        values = drop_foreign(hf[PROJECTOR_KEY], PROJECTOR_KEY)
        return from_dict(ProjectorConfig, values, f"{PROJECTOR_KEY}.")
    settings = systems.infer(shapes)
    if settings is None:
        listed = ", ".join(list(shapes)[:4]) or "none"
        raise ConversionError(f"the projector is not of a known system; its tensors: {listed}, ...")
    if vision is not None:
        settings |= {"grid": vision.grid, "select_layer": select_layer}
    if "scale_factor" in hf:
        settings |= settings_of(settings["name"], {"scale_factor": hf["scale_factor"]})
    return system_config(**settings)


# ------------------------------------------------------------------ loading


def _with_own_head(cfg: ModelConfig, layout: CheckpointLayout, tensors: dict[str, Tensor]) -> ModelConfig:
    """Unties a tied head if the file holds an output matrix other than the embedding, as transformers does."""
    head = tensors.get(f"{layout.head}lm_head.weight")
    if not (cfg.decoder and cfg.decoder.tied_head and head):
        return cfg
    embedding = tensors.get(f"{layout.decoder}embed_tokens.weight")
    if embedding is not None and equal(head, embedding):
        return cfg
    return dataclasses.replace(cfg, decoder=dataclasses.replace(cfg.decoder, tied_head=False))


def _load(cfg, layout, tensors, dtype, shard, progress, unstacked=False) -> tuple[Params, dict[str, Tensor]]:
    """(parameters, tensors that the model does not use)."""
    table = dataclasses.replace(layout, **{part: "" for part in PARTS if getattr(layout, part) is None}).name_table(cfg)
    shapes = shapes_of(jax.eval_shape(lambda: vlm.init_params(cfg, jax.random.key(0))))
    used = {name for entry in table for name in entry.torch_names(shapes[entry.path])}
    extra = {name: tensor for name, tensor in tensors.items() if is_extra(name) and name not in used}
    if cfg.decoder and cfg.decoder.tied_head:
        tensors = {name: t for name, t in tensors.items() if not name.endswith("lm_head.weight")}
    require_match(table, {name: tensor.shape for name, tensor in tensors.items()}, shapes, is_extra)
    flat = {}
    for entry in progress_bar(table, "reading", unit="arrays", shown=progress):
        parts = [tensors[name] for name in entry.torch_names(shapes[entry.path])]
        sharding = shard(entry.path, shapes[entry.path]) if shard else SingleDeviceSharding(jax.local_devices()[0])
        if unstacked and entry.path.startswith("decoder/"):
            flat.update(unstacked_arrays(entry, parts, sharding, dtype, cfg.dtype))
        else:
            flat[entry.path] = load_array(entry, parts, sharding, dtype)
    params = unflatten(flat)
    if unstacked and cfg.decoder:
        layers = params["decoder"]["layers"]
        params["decoder"]["layers"] = tuple(layers[str(number)] for number in range(cfg.decoder.layers))
    return params, {name: t for name, t in extra.items() if not _is_text_tower(name)}


def is_extra(name: str) -> bool:
    """Whether the model does not use a tensor of published checkpoints: buffers, pooling heads, CLIP's text tower."""
    ending = ("position_ids", "rotary_emb.inv_freq")
    return name.endswith(ending) or name.startswith("head.") or ".head." in name or _is_text_tower(name)


def _is_text_tower(name: str) -> bool:
    return name.startswith(("text_model.", "text_projection.", "visual_projection.", "logit_scale", "logit_bias"))

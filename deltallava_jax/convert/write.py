"""Our models as folders that PyTorch loads: Hugging Face's layout and the original LLaVA layout.

Everything is written beside its place under another name and moved there whole: what is cut short never looks done."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from deltallava_jax.config import DecoderConfig, ModelConfig, VisionConfig, preset, to_dict
from deltallava_jax.convert.families import decoder_family, tower_family
from deltallava_jax.convert.read import KNOWN_TOWERS, PROJECTOR_KEY, Layout, Pretrained, read_json
from deltallava_jax.convert.tensors import DTYPES, Tensor
from deltallava_jax.data import tokens
from deltallava_jax.data.conversation import IMAGE as IMAGE_TOKEN
from deltallava_jax.data.conversation import TEMPLATES
from deltallava_jax.errors import ConversionError
from deltallava_jax.models import projectors
from deltallava_jax.models.layers import Params
from deltallava_jax.models.names import TRANSFORMS, Entry, flatten, unflatten
from deltallava_jax.models.vision import check_needs
from deltallava_jax.progress import progress_bar

HF = Layout("vision_tower.vision_model.", "multi_modal_projector.", "language_model.model.", "language_model.", True)
HF_DECODER = Layout(decoder="model.", head="")
HF_TOWER = Layout(vision="vision_model.")
LLAVA = Layout("model.vision_tower.vision_tower.vision_model.", "model.mm_projector.", "model.", "", False)
TORCH_MODULES = Path(__file__).parent / "torch_modules"
SHARD_BYTES = 5 * 10**9


def write_hf(model: Pretrained, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """A folder for transformers. An MLP model becomes a LlavaForConditionalGeneration, a decoder or a tower alone the
    model of its family, any other projector brings its PyTorch code (trust_remote_code).

    Raises ConversionError for a model with only some of its parts, one that prunes in its decoder, or a projector
    without PyTorch code."""
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
        if "vision_config" in config:  # of a CLIPModel the tower remains
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
    cfg, plain = model.cfg, model.cfg.projector.name == "mlp"
    if _hf_kind(model.hf) == "llava" and unchanged(model):
        _write(model, folder, model.layout, model.hf, shard_bytes)
    else:
        token, tokenizer = _with_image_token(model)
        params, decoder = _with_room(model.params, cfg.decoder, token)
        model = dataclasses.replace(
            model, cfg=dataclasses.replace(cfg, decoder=decoder), params=params, extra={}, layout=None
        )
        config = _llava_config(model, token, plain)
        _write(model, folder, HF if plain else dataclasses.replace(HF, hf_projector=False), config, shard_bytes)
        if tokenizer is not None:
            tokenizer.save(str(folder / "tokenizer.json"))
        _write_processor(model, folder, plain)
    if not plain:
        for file in (*TORCH_MODULES.glob("*_deltallava.py"), TORCH_MODULES / "projector_parts.py"):
            shutil.copy(file, folder)
        shutil.copy(projector_code(cfg.projector.name), folder / "projector.py")


def projector_code(name: str) -> Path:
    """The PyTorch code of a projector. Raises ConversionError if there is none."""
    file = TORCH_MODULES / f"projector_{name.removesuffix('_plus')}.py"
    if not file.is_file():
        raise ConversionError(f"--to hf: there is no PyTorch code for the {name} projector")
    return file


def _refuse_fastv(cfg: ModelConfig, to: str) -> None:
    """ConversionError for a model that prunes visual tokens inside its decoder: PyTorch's decoders do not."""
    if cfg.fastv:
        raise ConversionError(
            f"--to {to} cannot express model.fastv, which drops visual tokens inside the decoder; the weights are the "
            "plain model's: to export that one, set model.fastv to null in the workdir's config.json"
        )


def write_llava(model: Pretrained, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """A folder in the original LLaVA layout: names, shapes and config.json as haotian-liu/LLaVA's code reads them.

    Raises ConversionError for a model that lacks projector or decoder, or that prunes in its decoder."""
    cfg = model.cfg
    _refuse_fastv(cfg, "llava")
    if not (cfg.projector and cfg.decoder and cfg.vision):
        raise ConversionError("--to llava needs tower, projector and decoder; this model lacks some of them")
    if "mm_vision_tower" in model.hf and unchanged(model):
        _write(model, folder, model.layout, model.hf, shard_bytes)
        name = model.hf["mm_vision_tower"]
        known = name.split("/")[-1] in KNOWN_TOWERS or Path(name).is_absolute()
        if model.layout.vision is not None and not known:
            (folder / name).mkdir(parents=True)
            _write_json(folder / name / "config.json", tower_family(cfg.vision).to_hf(cfg.vision))
        return
    vision = tower_family(cfg.vision)
    published = next((name for name, key in KNOWN_TOWERS.items() if cfg.vision == preset(VisionConfig, key)), None)
    owner = "openai" if cfg.vision.family == "clip" else "google"
    tower = f"{owner}/{published}" if published else "vision_tower"
    qwen = cfg.decoder.qkv_bias
    config = decoder_family(cfg.decoder).to_hf(cfg.decoder) | {
        "model_type": "llava_qwen" if qwen else "llava_llama",
        "architectures": ["LlavaQwenForCausalLM" if qwen else "LlavaLlamaForCausalLM"],
        "mm_vision_tower": tower,
        "mm_hidden_size": cfg.vision.width,
        "mm_projector_type": "mlp2x_gelu" if cfg.projector.name == "mlp" else cfg.projector.name,
        "mm_vision_select_layer": cfg.projector.select_layer,
        "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": model.aspect,
        "scale_factor": cfg.projector.scale_factors[0],
        PROJECTOR_KEY: to_dict(cfg.projector),
    }
    _write(model, folder, LLAVA, config, shard_bytes)
    if published is None:
        (folder / tower).mkdir()
        _write_json(folder / tower / "config.json", vision.to_hf(cfg.vision))


def _hf_kind(hf: dict) -> str | None:
    """ "llava" or "part" for a Hugging Face config.json of a whole model or of a part of one, else None."""
    if "text_config" in hf:
        return "llava"
    return None if "mm_vision_tower" in hf or not hf else "part"


def unchanged(model: Pretrained) -> bool:
    """Whether the kept config.json and its companions still describe the model."""
    parts = lambda cfg: (cfg.vision, cfg.projector, cfg.decoder)
    return model.origin is not None and (parts(model.origin), model.origin_aspect) == (parts(model.cfg), model.aspect)


# ------------------------------------------------------------------ config.json and its companions


def _llava_config(model: Pretrained, image_token: int, plain: bool) -> dict:
    cfg, hf = model.cfg, model.hf
    text = decoder_family(cfg.decoder).to_hf(cfg.decoder) | _kept_keys(hf.get("text_config", hf))
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
    needs = projectors.needs(cfg.projector, cfg.vision.layers)
    check_needs(cfg.vision, needs)
    return config | {
        PROJECTOR_KEY: to_dict(cfg.projector),
        "select": {**to_dict(needs), "drop_cls": cfg.vision.family == "clip"},
        "budgets": list(projectors.budgets(cfg.projector)),
        "auto_map": {
            "AutoConfig": "configuration_deltallava.DeltaLlavaConfig",
            "AutoModel": "modeling_deltallava.DeltaLlavaForConditionalGeneration",
            "AutoModelForImageTextToText": "modeling_deltallava.DeltaLlavaForConditionalGeneration",
        },
    }


def _kept_keys(text: dict) -> dict:
    """What of a source's decoder config we do not hold ourselves and generation needs."""
    return {key: text[key] for key in ("max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
            if key in text}  # fmt: skip


def _main_dtype(params: Params) -> str:
    sizes: dict[str, int] = {}
    for leaf in jax.tree.leaves(params):
        sizes[str(leaf.dtype)] = sizes.get(str(leaf.dtype), 0) + leaf.size
    return max(sizes, key=sizes.get)


def _with_image_token(model: Pretrained):
    """(id of the image token, the tokenizer to save, None where the model has none)."""
    file = next((file for file in model.kept if file.name in tokens.FILES), None)
    if file is None:
        return model.hf.get("image_token_index", model.cfg.decoder.vocab_size), None
    tokenizer, token = tokens.load(file.parent).exported(IMAGE_TOKEN)
    return token, tokenizer


def _with_room(params: Params, cfg: DecoderConfig, token: int) -> tuple[Params, DecoderConfig]:
    """Embedding and head with a row for the image token; new rows are the mean of the others, so never the answer."""
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


def _write_processor(model: Pretrained, folder: Path, plain: bool) -> None:
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
    _write_json(folder / "preprocessor_config.json", pixels)
    _write_json(folder / "processor_config.json", processor)
    if (folder / "tokenizer.json").exists():
        file = folder / "tokenizer_config.json"
        config = read_json(file) if file.exists() else {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
        config |= {"tokenizer_class": config.get("tokenizer_class", "PreTrainedTokenizerFast")}
        config |= {"image_token": IMAGE_TOKEN, "processor_class": processor["processor_class"]}
        _write_json(file, config)


def _write_json(path: Path, value) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_card(model: Pretrained, folder: Path, name: str, source: Path | None) -> None:
    """README.md: what the model is, how it was trained, its results; both from ``source`` where that is a workdir."""
    cfg = model.cfg
    parts = [f"| {part} | {describe(getattr(cfg, part))} |" for part in ("vision", "projector", "decoder")]
    lines = [
        "---", "library_name: transformers", "pipeline_tag: image-text-to-text", "---", "", f"# {name}", "",
        "Exported by deltallava_jax.", "",
        "| Part | |", "|---|---|", *parts, f"| parameters | {model.size:,} |", "",
    ]  # fmt: skip
    if (folder / "modeling_deltallava.py").is_file():
        template = TEMPLATES[model.template]
        prompt = template.user.format(f"{IMAGE_TOKEN}\\nWhat is this?") + template.assistant
        budgets = ", ".join(map(str, projectors.budgets(cfg.projector)))
        lines += [
            "```python", "from transformers import AutoModelForImageTextToText, AutoProcessor", "",
            f'model = AutoModelForImageTextToText.from_pretrained("{name}", trust_remote_code=True)',
            f'processor = AutoProcessor.from_pretrained("{name}", trust_remote_code=True)',
            f'inputs = processor(images=image, text="{prompt}", return_tensors="pt")',
            f"tokens = model.generate(**inputs, max_new_tokens=32)  # budget=: {budgets} tokens an image",
            "print(processor.batch_decode(tokens, skip_special_tokens=True)[0])", "```", "",
        ]  # fmt: skip
    results = [read_json(file) for file in sorted((source / "eval").glob("*_*.json"))] if source else []
    if results:
        lines += ["## Results", "", "| Task | Tokens an image | Images | Accuracy | n |", "|---|---|---|---|---|"]
        lines += [
            f"| {r['task']} | {r['budget']} | {'noise' if r['blind'] else 'real'} | {r['accuracy']:.4f} | {r['n']} |"
            for r in results if "accuracy" in r
        ] + [""]  # fmt: skip
    if source is not None and (source / "checkpoints").is_dir():
        lines += ["## Training configuration", "", "```json", (source / "config.json").read_text().strip(), "```", ""]
    (folder / "README.md").write_text("\n".join(lines))


def describe(part) -> str:
    """The settings of a config section that are not its defaults, in one line."""
    if part is None:
        return "none"
    changed = {f.name: getattr(part, f.name) for f in dataclasses.fields(part) if getattr(part, f.name) != f.default}
    return ", ".join(f"{key} {value}" for key, value in changed.items()) or "defaults"


# ------------------------------------------------------------------ tensors


@dataclass(frozen=True)
class _Out:
    """One tensor to write: its name, shape and dtype, and which part of which parameter it is."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    entry: Entry | None = None
    layer: int | None = None

    @property
    def bytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize


def _write(model: Pretrained, folder: Path, layout: Layout, config: dict, shard_bytes: int) -> None:
    """Kept files, config.json and the weights, in shards of at most ``shard_bytes``."""
    held = {str(leaf.dtype) for leaf in jax.tree.leaves(model.params)}
    for key in ("dtype", "torch_dtype"):
        if key in config and config[key] not in held:  # the parameters were cast
            config = config | {key: _main_dtype(model.params)}
    for file in model.kept:
        shutil.copy(file, folder / file.name)
    if not (folder / "config.json").is_file() or read_json(folder / "config.json") != config:
        _write_json(folder / "config.json", config)
    flat, outs = flatten(model.params), []
    table = layout.table(model.cfg if layout.vision is not None else dataclasses.replace(model.cfg, vision=None))
    for entry in table:
        leaf = flat[entry.path]
        for layer, name in enumerate(entry.torch_names(leaf.shape)):
            shape = entry.torch_shape(leaf.shape)
            outs.append(_Out(name, shape, np.dtype(leaf.dtype), entry, layer if entry.stacked else None))
    if layout == model.layout:
        outs += [_Out(name, tensor.shape, tensor.dtype) for name, tensor in model.extra.items()]
    shards: list[list[_Out]] = [[]]
    for out in outs:
        if shards[-1] and sum(o.bytes for o in shards[-1]) + out.bytes > shard_bytes:
            shards.append([])
        shards[-1].append(out)
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        where = {out.name: name for name, shard in zip(names, shards, strict=True) for out in shard}
        total = {"total_size": sum(out.bytes for out in outs)}
        _write_json(folder / "model.safetensors.index.json", {"metadata": total, "weight_map": where})
    on_host: dict[str, np.ndarray] = {}  # the parameter that is being written, on the host

    def value(out: _Out) -> np.ndarray:
        if out.entry is None:
            return model.extra[out.name].read()
        if out.entry.path not in on_host:
            on_host.clear()
            on_host[out.entry.path] = np.asarray(flat[out.entry.path])
        whole = on_host[out.entry.path]
        part = whole if out.layer is None else whole[out.layer]
        return TRANSFORMS[out.entry.kind][1](part)

    bar = progress_bar(what="writing", total=sum(o.bytes for o in outs), unit="B")
    for name, shard in zip(names, shards, strict=True):
        _write_safetensors(folder / name, shard, value, bar)
    bar.close()


def _write_safetensors(path: Path, outs: list[_Out], value, bar) -> None:
    """One safetensors file, a tensor at a time: the library's own writer wants all of them in memory at once."""
    kinds = {np.dtype(dtype): kind for kind, dtype in DTYPES.items()}
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for out in outs:
        header[out.name] = {"dtype": kinds[out.dtype], "shape": out.shape, "data_offsets": [offset, offset + out.bytes]}
        offset += out.bytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for out in outs:
            file.write(np.ascontiguousarray(value(out)).reshape(-1).view(np.uint8).data)
            bar.update(out.bytes)


def write_extra(path: Path, extra: dict[str, Tensor]) -> None:
    """Tensors as they are, in one safetensors file."""
    outs = [_Out(name, tensor.shape, tensor.dtype) for name, tensor in extra.items()]
    with progress_bar(unit="B", shown=False) as bar:
        _write_safetensors(path, outs, lambda out: extra[out.name].read(), bar)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill that becomes ``path`` when the block ends well and is removed otherwise.

    Raises ConversionError if ``path`` exists and is not an empty folder."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConversionError(f"{path} exists already; give a new folder, or remove it first")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConversionError(f"{path} cannot be made: {error}") from error
    work = Path(tempfile.mkdtemp(prefix=f".{path.name}-unfinished-", dir=path.parent))
    try:
        yield work
        work.chmod(0o755)
        if path.exists():
            path.rmdir()
        work.rename(path)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise

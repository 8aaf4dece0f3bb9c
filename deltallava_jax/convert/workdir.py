"""Converted workdirs: written for training and evaluation, read back for exports.

Beside config.json, tokenizer.json and checkpoints/, a converted workdir has source/: the files beside the original
weights, origin.json (their layout), extra.safetensors (tensors that the model does not use)."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import jax

from deltallava_jax import cli
from deltallava_jax.config import Config, DataConfig, ModelConfig, ProjectorConfig, dtype_name, from_dict, to_dict
from deltallava_jax.convert.adapters import base_of, with_adapter
from deltallava_jax.convert.pretrained import CheckpointLayout, Pretrained, fitted, joined
from deltallava_jax.convert.read import Shard, read, read_json, read_projector
from deltallava_jax.convert.shards import write_extra
from deltallava_jax.convert.tensors import find, is_adapter
from deltallava_jax.data import tokens
from deltallava_jax.errors import ConversionError
from deltallava_jax.models import lora, systems
from deltallava_jax.models.names import flatten, unflatten
from deltallava_jax.training.checkpoints import Checkpoints
from deltallava_jax.workdir import Workdir


def has_adapters(path: Path) -> bool:
    """Whether a folder is a LoRA adapter's, or a workdir with adapters."""
    return is_adapter(path) or (Workdir(path).exists and Workdir(path).config.lora is not None)


def open_model(
    path: Path,
    *,
    dtype: str | None = None,
    vision: Path | None = None,
    base: Path | None = None,
    merge: bool = False,
    shard: Shard | None = None,
) -> Pretrained:
    """The model of a workdir, of a LoRA adapter's folder, or of any checkpoint that ``read`` supports.

    base: the base model's folder, for an adapter; by default the one that it names. merge: adapters, if there are any,
    into the matrices; in float32, before they get ``dtype``. shard: as in ``read``, for what is no workdir."""
    dtype = dtype_name(dtype)
    if is_adapter(path):
        found = base_of(path, base)
        model = with_adapter(path, found, open_model(found, shard=shard), vision=vision, merge=merge)
    elif base is not None:
        raise ConversionError(f"--base is for a LoRA adapter; {path} holds no adapter_config.json and adapter_model")
    elif not Workdir(path).exists:
        return read(path, dtype=dtype, vision=vision, shard=shard)
    elif vision is not None:
        raise ConversionError(f"--vision is for checkpoints that name a tower they lack; {path} is a workdir")
    else:
        model = read_workdir(path)
    model = model.merged() if merge else model
    return model.cast(dtype) if dtype else model


def read_workdir(path: Path) -> Pretrained:
    """The newest model of a workdir, adapters apart, and the layout of the weights that it was initialized with. Raises
    CheckpointError, ConfigError or ConversionError for files that are missing or broken."""
    home = Workdir(path)
    cfg = home.config
    params, adapters = home.parts() if cfg.lora else (home.params(), {})
    source = home.source
    layout = origin = None
    hf = {}
    extra = {}
    origin_aspect = "square"
    base_name = cfg.init_from
    trained = lora.trained_whole(flatten(params).keys() - home.base.keys()) if cfg.lora and cfg.init_from else []
    kept = [path / name for name in ("tokenizer.json", "tokenizer_config.json") if (path / name).is_file()]
    if source is None and home.missing_init:
        cli.log(
            f"note: {home.missing_init}, which {path} was initialized from, is missing, and so are its source files"
        )
    if source is not None:
        about = read_json(source / "origin.json")
        layout = CheckpointLayout(**about["layout"]) if about["layout"] else None
        origin = from_dict(ModelConfig, about["model"])
        origin_aspect = about.get("aspect", "square")
        kept = sorted(file for file in source.iterdir() if file.name not in ("origin.json", "extra.safetensors"))
        hf = read_json(source / "config.json") if (source / "config.json").is_file() else {}
        base_name = base_name or about.get("base", "")
        extra = find(source / "extra.safetensors") if (source / "extra.safetensors").is_file() else {}
    return Pretrained(
        cfg.model, params, layout, origin, hf, kept, extra, cfg.data.template, cfg.data.aspect, origin_aspect,
        cfg.lora, adapters, base_name if cfg.lora else "", sorted(trained),
    )  # fmt: skip


def write_workdir(model: Pretrained, folder: Path, name: str) -> None:
    """A workdir with the model, and its adapters, as step 0, to evaluate, export or train (--config.init_from)."""
    model.require_base("a converted workdir")
    data = DataConfig(template=model.template, aspect=model.aspect)
    config = Config(name=name, model=model.cfg, data=data, lora=model.lora)
    tokenizer = next((file for file in model.kept if file.name in tokens.FILES), None) if model.cfg.decoder else None
    Workdir(folder).write(config, tokens.load(tokenizer.parent) if tokenizer else None)
    source = folder / "source"
    source.mkdir()
    for file in model.kept:
        shutil.copy(file, source / file.name)
    if model.hf and not (source / "config.json").exists():
        (source / "config.json").write_text(json.dumps(model.hf, indent=2))
    about = {
        "layout": dataclasses.asdict(model.layout) if model.layout else None,
        "model": to_dict(model.origin or model.cfg),
        "aspect": model.origin_aspect if model.origin else model.aspect,
    }
    if model.base_name:
        about["base"] = model.base_name
    (source / "origin.json").write_text(json.dumps(about, indent=2))
    if model.extra:
        write_extra(source / "extra.safetensors", model.extra)
    checkpoints = Checkpoints(folder, create=True)
    checkpoints.save_params(unflatten(flatten(model.params) | model.adapters))
    checkpoints.close()


def compose(
    vision: Path, decoder: Path, projector: str, settings: dict, *, dtype: str | None = None, seed: int = 0
) -> Pretrained:
    """A new model: the tower of one checkpoint, the decoder of another, and a projector.

    projector: the name of a system, to initialize randomly, or a file or folder with trained parameters. settings:
    fields of ProjectorConfig, e.g. scale_factor. Raises ConversionError, ConfigError, WeightMismatch."""
    dtype = dtype_name(dtype)
    trained = None
    if projector not in systems.SYSTEMS:
        path = Path(projector)
        known = ", ".join(systems.SYSTEMS)
        if not path.exists():
            raise ConversionError(f"--projector {projector} is neither a file nor a folder; known systems: {known}")
        trained = open_model(path, dtype=dtype) if Workdir(path).exists else read_projector(path, dtype)
        if trained.cfg.projector is None:
            raise ConversionError(f"--projector {projector} holds no projector; known systems: {known}")
    tower = open_model(vision, dtype=dtype, merge=True)
    text = open_model(decoder, dtype=dtype, merge=True)
    for part, model, path in (("vision", tower, vision), ("decoder", text, decoder)):
        if getattr(model.cfg, part) is None:
            raise ConversionError(f"--{part} {path} holds no {'tower' if part == 'vision' else part}")
    v = tower.cfg.vision
    d = text.cfg.decoder
    if trained is None:
        fit = dict(grid=v.grid, in_width=v.width, out_width=d.width)
        cfg = from_dict(ProjectorConfig, {"name": projector} | fit | settings, "projector.")
        weights = systems.init_params(cfg, jax.random.key(seed))
        weights = jax.tree.map(lambda leaf: leaf.astype(dtype or leaf.dtype), weights)
    else:
        cfg = fitted(trained.cfg.projector, v, d, settings, f"--projector {projector}")
        weights = trained.params["projector"]
    return joined(tower, text, cfg, weights)

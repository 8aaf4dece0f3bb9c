"""Workdirs, ours: what conversion writes for training and evaluation, and reads back for exports.

Beside config.json, tokenizer.json and checkpoints/ a converted workdir has source/: the files that stood beside the
original weights, origin.json (how they were laid out), extra.safetensors (tensors that the model has no use for)."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
from jax.sharding import NamedSharding, Sharding, SingleDeviceSharding

from deltallava_jax.config import (
    DTYPES,
    Config,
    DataConfig,
    ModelConfig,
    ProjectorConfig,
    from_dict,
    to_dict,
    workdir_config,
)
from deltallava_jax.convert.read import Layout, Pretrained, fits, read, read_json, read_projector
from deltallava_jax.convert.tensors import find
from deltallava_jax.convert.write import write_extra
from deltallava_jax.data import tokens
from deltallava_jax.errors import CheckpointError, ConversionError
from deltallava_jax.inference.model import Model, check_template
from deltallava_jax.models import projectors
from deltallava_jax.models.decoder import MATRICES, unstacked
from deltallava_jax.models.names import flatten, unflatten
from deltallava_jax.parallel import rules
from deltallava_jax.parallel.mesh import tensor_mesh
from deltallava_jax.training.checkpoints import Checkpoints, Place, as_saved


def is_workdir(path: Path) -> bool:
    return (path / "checkpoints").is_dir()


def open_model(path: Path, *, dtype: str | None = None, vision: Path | None = None) -> Pretrained:
    """The model of a workdir, or of anything that ``read`` knows."""
    if not is_workdir(path):
        return read(path, dtype=dtype, vision=vision)
    if vision is not None:
        raise ConversionError(f"--vision is for checkpoints that name their tower and lack it; {path} is a workdir")
    model = read_workdir(path)
    if dtype is None:
        return model
    return dataclasses.replace(model, params=jax.tree.map(lambda leaf: leaf.astype(dtype), model.params))


def load_model(path: Path, dtype: str | None = None, tensor: int = 1, template: str | None = None) -> Model:
    """A model ready to answer, with the tokenizer and template beside it and its images' aspect. template: another
    than its own; a decoder alone has none of its own, and continues texts.

    Each of ``tensor`` devices reads its share of what they divide, so that the model is nowhere whole and nowhere
    twice; the decoder is read in the form that answers (``decoder.unstacked``)."""
    if template is not None:
        check_template(template)
    mesh = tensor_mesh(tensor) if tensor > 1 else None
    first = SingleDeviceSharding(jax.local_devices()[0])
    shard = lambda path, shape: NamedSharding(mesh, rules.spec_for(path, shape, mesh)) if mesh else first
    if is_workdir(path):
        model = _read_to_answer(path, dtype, shard)
    else:
        model = read(path, dtype=dtype, shard=shard, unstacked=True)
    if dtype in DTYPES:
        model.cfg = dataclasses.replace(model.cfg, dtype=dtype)
    folder = path if path.is_dir() else path.parent
    tokenizer = tokens.load(folder) if any((folder / name).is_file() for name in tokens.FILES) else None
    own = model.template if model.cfg.whole else None
    loaded = Model(model.cfg, model.params, tokenizer, own, model.aspect)
    return loaded if template is None else loaded.with_template(template)


def _read_to_answer(path: Path, dtype: str | None, shard: Callable[[str, tuple[int, ...]], Sharding]) -> Pretrained:
    compute = workdir_config(path).model.dtype

    def place(name, saved):
        matrix = name.startswith("decoder/") and name.endswith(MATRICES)
        kind = dtype or (compute if matrix else saved.dtype)
        return jax.ShapeDtypeStruct(saved.shape, kind, sharding=shard(name, saved.shape))

    model = read_workdir(path, place)
    if model.cfg.decoder:
        model.params["decoder"] = unstacked(model.params["decoder"], model.cfg.decoder, donate=True)
    return model


def read_workdir(path: Path, place: Place | None = None) -> Pretrained:
    """The newest parameters of a workdir. What training kept frozen comes from the workdir it began with, where that
    is still there, and so has every bit of the original. place: as in ``Checkpoints.restore_params``."""
    cfg = workdir_config(path)
    checkpoints = Checkpoints(path)
    step = checkpoints.latest()
    if step is None:
        raise CheckpointError(f"{path} holds no finished checkpoint; train first")
    place = place or as_saved
    began = Path(cfg.init_from) if cfg.init_from and is_workdir(Path(cfg.init_from)) else None
    source = next((folder / "source" for folder in (path, began) if folder and (folder / "source").is_dir()), None)
    frozen = {}
    if began is not None and cfg.optimizer.frozen:
        kept_frozen = set(checkpoints.frozen_paths(step))
        frozen = flatten(read_workdir(began, lambda *one: place(*one) if one[0] in kept_frozen else None).params)
    trained = checkpoints.restore_params(step, cfg.model, lambda *one: None if one[0] in frozen else place(*one))
    params = unflatten(flatten(trained) | frozen)
    layout = origin = None
    hf, extra, origin_aspect = {}, {}, "square"
    kept = [path / name for name in ("tokenizer.json", "tokenizer_config.json") if (path / name).is_file()]
    if source is not None:
        about = read_json(source / "origin.json")
        layout = Layout(**about["layout"]) if about["layout"] else None
        origin = from_dict(ModelConfig, about["model"])
        origin_aspect = about.get("aspect", "square")
        kept = sorted(file for file in source.iterdir() if file.name not in ("origin.json", "extra.safetensors"))
        hf = read_json(source / "config.json") if (source / "config.json").is_file() else {}
        extra = find(source / "extra.safetensors") if (source / "extra.safetensors").is_file() else {}
    return Pretrained(
        cfg.model, params, layout, origin, hf, kept, extra, cfg.data.template, cfg.data.aspect, origin_aspect
    )


def write_workdir(model: Pretrained, folder: Path, name: str) -> None:
    """A workdir with the model as step 0: to evaluate, to export, or to train from (--config.init_from)."""
    config = Config(name=name, model=model.cfg, data=DataConfig(template=model.template, aspect=model.aspect))
    (folder / "config.json").write_text(json.dumps(to_dict(config), indent=2))
    source = folder / "source"
    source.mkdir()
    for file in model.kept:
        shutil.copy(file, source / file.name)
    if model.hf and not (source / "config.json").exists():
        (source / "config.json").write_text(json.dumps(model.hf, indent=2))
    tokenizer = next((file for file in model.kept if file.name in tokens.FILES), None)
    if model.cfg.decoder and tokenizer is not None:
        tokens.load(tokenizer.parent).save(folder / "tokenizer.json")
    about = {
        "layout": dataclasses.asdict(model.layout) if model.layout else None,
        "model": to_dict(model.origin or model.cfg),
        "aspect": model.origin_aspect if model.origin else model.aspect,
    }
    (source / "origin.json").write_text(json.dumps(about, indent=2))
    if model.extra:
        write_extra(source / "extra.safetensors", model.extra)
    checkpoints = Checkpoints(folder, create=True)
    checkpoints.save_params(model.params)
    checkpoints.close()


def compose(
    vision: Path, decoder: Path, projector: str, settings: dict, *, dtype: str | None = None, seed: int = 0
) -> Pretrained:
    """A new model: the tower of one checkpoint, the decoder of another, and a projector.

    projector: the name of a system, for fresh parameters, or a file or folder with trained ones. settings: fields of
    ProjectorConfig, e.g. scale_factor. Raises ConversionError, ConfigError, WeightMismatch."""
    trained = None
    if projector not in projectors.SYSTEMS:
        path, known = Path(projector), ", ".join(projectors.SYSTEMS)
        if not path.exists():
            raise ConversionError(f"--projector {projector} is neither a file nor a folder; known systems: {known}")
        trained = open_model(path, dtype=dtype) if is_workdir(path) else read_projector(path, dtype)
        if trained.cfg.projector is None:
            raise ConversionError(f"--projector {projector} holds no projector; known systems: {known}")
    tower, text = open_model(vision, dtype=dtype), open_model(decoder, dtype=dtype)
    for part, model, path in (("vision", tower, vision), ("decoder", text, decoder)):
        if getattr(model.cfg, part) is None:
            raise ConversionError(f"--{part} {path} holds no {'tower' if part == 'vision' else part}")
    v, d = tower.cfg.vision, text.cfg.decoder
    fitted = dict(grid=v.grid, in_width=v.width, out_width=d.width)
    if trained is None:
        projector_cfg = from_dict(ProjectorConfig, {"name": projector} | fitted | settings, "projector.")
        weights = projectors.init_params(projector_cfg, jax.random.key(seed))
        weights = jax.tree.map(lambda leaf: leaf.astype(dtype or leaf.dtype), weights)
    else:
        own = trained.cfg.projector
        for key, value in fitted.items():
            if key != "grid" and getattr(own, key) != value:
                raise ConversionError(
                    f"--projector {projector} has {key}={getattr(own, key)}, but the model needs {value}"
                )
        values = to_dict(own) | {"grid": v.grid} | settings
        projector_cfg, weights = from_dict(ProjectorConfig, values, "projector."), trained.params["projector"]
        fits(projector_cfg, weights)
    params = {"vision": tower.params["vision"], "projector": weights, "decoder": text.params["decoder"]}
    cfg = ModelConfig(v, projector_cfg, d, dtype=text.cfg.dtype)
    kept = [file for file in text.kept if file.name not in ("config.json", "preprocessor_config.json")]
    kept += [file for file in tower.kept if file.name == "preprocessor_config.json"]
    return Pretrained(cfg, params, None, None, text.hf, kept, aspect=tower.aspect)

"""Reads LoRA adapters: peft's folders, and LLaVA's, in which non_lora_trainables.bin holds the projector."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from pathlib import Path

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from deltallava_jax import cli
from deltallava_jax.arrays import Array
from deltallava_jax.config import ASPECTS, LoraConfig, ModelConfig, settings_of
from deltallava_jax.convert.families import Values, decoder_family, refuse, tower_family
from deltallava_jax.convert.pretrained import Pretrained, fitted, joined, shapes_of, validate_projector, validate_tower
from deltallava_jax.convert.read import PROJECTOR_KEY, read, read_json, read_projector, tower_folder
from deltallava_jax.convert.tensors import ADAPTER_CONFIG, NON_LORA, find, find_adapter
from deltallava_jax.errors import ConversionError, WeightMismatch
from deltallava_jax.models import lora
from deltallava_jax.models.names import Entry, require_match

WRAPPED = "base_model.model."  # before the names of the modules of a model that peft wraps
# Module paths before "layers.0" of the decoder and before "encoder.layers.0" of the tower: of the original LLaVA and of
# a decoder alone, of transformers' LLaVA since 4.52, of older versions and of our exports with code, of bare models.
DECODERS = ("model.", "model.language_model.", "language_model.model.", "model.language_model.model.", "")
TOWERS = (
    "model.vision_tower.vision_tower.vision_model.",
    "model.vision_tower.vision_model.",
    "model.vision_tower.",
    "vision_tower.vision_model.",
    "vision_tower.",
    "vision_model.",
    "",
)
# Keys of adapter_config.json: those that are read, and those that change no output of what is read.
READ = ("peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern",
        "base_model_name_or_path", "init_lora_weights")  # fmt: skip
HARMLESS = ("task_type", "inference_mode", "target_modules", "exclude_modules", "auto_mapping", "peft_version",
            "revision", "runtime_config", "megatron_core", "layers_pattern", "loftq_config", "eva_config",
            "qalora_group_size", "ensure_weight_tying")  # fmt: skip
STARTS = (None, True, False, "gaussian", "eva", "orthogonal")  # init_lora_weights that leave the base as it was


def module_names(cfg: ModelConfig, decoder: str, tower: str) -> dict[str, str]:
    """{our module: its path in PyTorch, {} for the layer} of every matrix of the layers.

    decoder, tower: the paths before their layers."""
    found = {}
    for part, family, prefix in (("decoder", decoder_family, decoder), ("vision", tower_family, tower)):
        section = getattr(cfg, part)
        for entry in family(section).name_table(section) if section else []:
            path = f"{part}/{entry.path}"
            if re.search(lora.MATRICES, path):
                found[path.removesuffix("/kernel")] = prefix + entry.torch.removesuffix(".weight")
    return found


def tensor_names(module: str) -> tuple[str, str]:
    """Names of the tensors A and B of a module of PyTorch."""
    return f"{WRAPPED}{module}.lora_A.weight", f"{WRAPPED}{module}.lora_B.weight"


def base_of(path: Path, base: Path | None) -> Path:
    """The folder of an adapter's base model: ``base``, or the one that adapter_config.json names: as it is, in the
    adapter's folder, or, as both may have been moved, in there by its last name. Raises ConversionError."""
    name = read_json(path / ADAPTER_CONFIG).get("base_model_name_or_path")
    if base is not None:
        if not base.exists():
            raise ConversionError(f"--base {base} does not exist")
        return base
    folders = [Path(name), path / name, path / Path(name).name] if isinstance(name, str) and name else []
    found = next((folder for folder in folders if folder.is_dir() and folder.resolve() != path.resolve()), None)
    if found is None:
        missing = f"{name!r}, which is no folder here" if folders else "a base model that it does not name"
        raise ConversionError(f"{path} is a LoRA adapter of {missing}; give the base model's folder with --base")
    return found


def with_adapter(
    path: Path, base_path: Path, base: Pretrained, *, vision: Path | None = None, merge: bool = False
) -> Pretrained:
    """A base model with the adapter of a folder, and with the projector of its non_lora_trainables.bin.

    base_path: the base model's folder. vision: the tower's, where a LLaVA folder names one that the base lacks. merge:
    allow ranks and scales that differ among the modules, for ``Pretrained.merged``. Raises ConversionError for what is
    not supported, WeightMismatch with both sides if the adapter is another model's."""
    config = read_json(path / ADAPTER_CONFIG)
    _refuse(path, config)
    name = str(config.get("base_model_name_or_path") or "")
    cli.log(f"{path}: a LoRA adapter of {name or 'an unnamed base model'}, read on {base_path}")
    if name and Path(name).name != base_path.resolve().name:
        cli.log(f"note: {ADAPTER_CONFIG} names another folder than {base_path}; check that it is the same base model")
    if base.lora is not None:
        cli.log(f"note: {base_path} has adapters of its own, which are merged into it first")
        base = base.merged()
    model = _with_projector(path, base_path, base, vision)
    try:
        settings, adapters = _read(path, config, model, merge)
    except WeightMismatch as error:
        listed = str(error).partition("\n")[2]
        raise WeightMismatch(
            f"the adapter {path} does not fit the base model {base_path}: it is another model's, incomplete, or adapts "
            f"more than the matrices of the layers:\n{listed}"
        ) from error
    return dataclasses.replace(model, lora=settings, adapters=adapters, base_name=name)


def _refuse(path: Path, config: dict) -> None:
    """Raises ConversionError for an option of adapter_config.json that is not honoured."""

    def unsupported(key: str) -> ConversionError:
        return ConversionError(
            f"{path / ADAPTER_CONFIG}: option {key}={config[key]!r} is not supported; merge the adapter with peft's "
            "merge_and_unload() and convert what that saves"
        )

    if config.get("peft_type") != "LORA":
        raise ConversionError(f"{path / ADAPTER_CONFIG}: peft_type={config.get('peft_type')!r}; expected 'LORA'")
    if config.get("init_lora_weights") not in STARTS:
        raise unsupported("init_lora_weights")
    for key, value in config.items():
        off = value in (None, False, [], {}) or (key == "bias" and value == "none")
        if not off and key not in READ + HARMLESS:
            raise unsupported(key)


# ------------------------------------------------------------------ the matrices


def _read(path: Path, config: dict, model: Pretrained, merge: bool) -> tuple[LoraConfig, dict[str, Array]]:
    """(settings, {path: float32 array}) of the adapter."""
    tensors = {name.replace(".default.weight", ".weight"): tensor for name, tensor in find_adapter(path).items()}
    adapted = {re.sub(r"\.lora_[AB]\.weight$", "", name).removeprefix(WRAPPED) for name in tensors}
    prefixes = _prefix(adapted, DECODERS, "layers."), _prefix(adapted, TOWERS, "encoder.layers.")
    shapes = shapes_of(model.params)
    get = Values(config, ADAPTER_CONFIG)
    table, ours, ranks, alphas, stacks = [], {}, {}, {}, {}
    for module, pattern in module_names(model.cfg, *prefixes).items():
        layers, inputs, outputs = shapes[f"{module}/kernel"]
        names = [pattern.format(layer) for layer in range(layers)]
        if adapted.isdisjoint(names):
            continue
        ranks[module] = _each(path, config, "rank_pattern", get.whole("r", 8), names)
        alphas[module] = _each(path, config, "alpha_pattern", get.real("lora_alpha", 8), names)
        a, b = zip(*map(tensor_names, names), strict=True)
        stacks |= {f"{module}/{lora.A}": a, f"{module}/{lora.B}": b}
        for layer, rank in enumerate(ranks[module]):
            for kind, name, shape in ((lora.A, a[layer], (inputs, rank)), (lora.B, b[layer], (rank, outputs))):
                table.append(Entry(name, f"{module}/{kind} of layer {layer}", "linear"))
                ours[table[-1].path] = shape
    require_match(table, {name: tensor.shape for name, tensor in tensors.items()}, ours)
    if not stacks:
        raise ConversionError(f"{path} holds no adapters (lora_A and lora_B)")
    settings = _settings(path, config, ranks, alphas, merge)
    sharding = jax.tree.leaves(model.params)[0].sharding
    if isinstance(sharding, NamedSharding):
        sharding = NamedSharding(sharding.mesh, PartitionSpec())
    adapters = {}
    for stack, names in stacks.items():
        parts = [tensors[name].read().astype(np.float32).T for name in names]
        if len(_several(ranks)) > 1 or len(_several(alphas)) > 1:
            module, _, kind = stack.rpartition("/")
            parts = [
                _aligned(part, kind, settings, rank, alpha)
                for part, rank, alpha in zip(parts, ranks[module], alphas[module], strict=True)
            ]
        adapters[stack] = jax.device_put(np.stack(parts), sharding)
    return settings, adapters


def _prefix(modules: Iterable[str], known: tuple[str, ...], stem: str) -> str:
    """The module path, of the known ones, below which most modules have their layers."""
    return max(known, key=lambda prefix: sum(module.startswith(f"{prefix}{stem}") for module in modules))


def _each(path: Path, config: dict, key: str, default: float, modules: list[str]) -> list:
    """The rank or alpha of each module: that of the first pattern, a regular expression of its last names, or
    ``default``."""
    patterns = config.get(key) or {}
    try:
        found = [next((v for p, v in patterns.items() if re.match(rf"(.*\.)?({p})$", m)), default) for m in modules]
        if all(value > 0 for value in found):
            return found
    except (re.error, AttributeError, TypeError):
        pass
    raise ConversionError(f"{path / ADAPTER_CONFIG}: {key}={patterns!r}; expected numbers above 0 by pattern")


def _several(values: dict[str, list]) -> list:
    return sorted({value for of_module in values.values() for value in of_module})


def _settings(path: Path, config: dict, ranks: dict, alphas: dict, merge: bool) -> LoraConfig:
    """The adapter's settings; targets: what matches exactly the modules that have adapters.

    Raises ConversionError for several ranks or alphas, unless they are merged: then the largest."""
    (*smaller, rank), (*lower, alpha) = _several(ranks), _several(alphas)
    if (smaller or lower) and not merge:
        raise ConversionError(
            f"{path / ADAPTER_CONFIG}: rank_pattern or alpha_pattern give modules other ranks ({_several(ranks)}) or "
            f"alphas ({_several(alphas)}), and here there is one of each; --merge adds such an adapter to the matrices"
        )
    names = {part: [m.rsplit("/", 1)[1] for m in ranks if m.startswith(f"{part}/")] for part in ("decoder", "vision")}
    targets = ",".join(names["decoder"])
    if names["vision"]:
        targets = "|".join(f"^{part}/layers/({'|'.join(found)})$" for part, found in names.items() if found)
    dropout = Values(config, ADAPTER_CONFIG).real("lora_dropout", 0.0)
    return LoraConfig(rank, float(alpha), dropout, targets, bool(config.get("use_rslora")))


def _aligned(part: np.ndarray, kind: str, settings: LoraConfig, rank: int, alpha: float) -> np.ndarray:
    """A or B of a module with another rank or alpha, so that ``settings`` give the same product: with zeros up to their
    rank, B times its scale relative to theirs."""
    missing = settings.rank - rank
    if kind == lora.A:
        return np.pad(part, [(0, 0), (0, missing)])
    scale = LoraConfig(rank, alpha, rslora=settings.rslora).scale
    return np.pad(part, [(0, missing), (0, 0)]) * np.float32(scale / settings.scale)


# ------------------------------------------------------------------ the projector


def _with_projector(path: Path, base_path: Path, base: Pretrained, vision: Path | None) -> Pretrained:
    """The base with the projector of a LLaVA folder and, if it lacks one, with the tower that the folder names."""
    file = path / NON_LORA
    if vision is not None and (base.cfg.vision or not file.is_file()):
        raise ConversionError(
            f"--vision is for an adapter with {NON_LORA} whose base model has no tower, unlike {path}"
        )
    if not file.is_file() or not find(file):  # LLaVA writes an empty one where the projector was not trained
        if base.cfg.projector:
            cli.log(f"the projector: from {base_path}")
        return base
    if base.cfg.decoder is None:
        raise ConversionError(f"the base model {base_path} holds no decoder, which {path} adapts")
    hf = read_json(path / "config.json") if (path / "config.json").is_file() else {}
    refuse(hf, "LLaVA", mm_vision_select_feature="patch", mm_use_im_start_end=False)
    trained = read_projector(file)
    _require_projector_alone(file, trained)
    tower = base if base.cfg.vision else _tower(path, base_path, hf, vision)
    own, weights = base.cfg.projector, trained.params["projector"]
    described = PROJECTOR_KEY in hf  # the projector's whole config, in our exports
    settings = {}
    if not described:
        if own is not None and own.name == trained.cfg.projector.name:
            trained = base  # the same system: its settings that no tensor shows
        layer = hf.get("mm_vision_select_layer", own.select_layer if own else -2)
        settings["select_layer"] = layer if layer < 0 else layer - (tower.cfg.vision.layers + 1)
    if "scale_factor" in hf and not described:
        settings |= settings_of(trained.cfg.projector.name, {"scale_factor": hf["scale_factor"]})
    cfg = fitted(trained.cfg.projector, tower.cfg.vision, base.cfg.decoder, settings, f"the projector in {file}")
    cli.log(f"the projector: from {file}")
    if tower is not base:
        model = joined(tower, base, cfg, weights)
    else:
        validate_projector(cfg, weights)
        params = base.params | {"projector": weights}
        model = dataclasses.replace(base, cfg=dataclasses.replace(base.cfg, projector=cfg), params=params)
        validate_tower(model.cfg)
    aspect = hf.get("image_aspect_ratio")
    if aspect is None or (aspect == "square" and not described):  # whatever the tower's processor does
        return model
    if aspect not in ASPECTS:
        raise ConversionError(f"option image_aspect_ratio={aspect!r} is not supported; known: {', '.join(ASPECTS)}")
    return dataclasses.replace(model, aspect=aspect)


def _require_projector_alone(file: Path, trained: Pretrained) -> None:
    """Raises WeightMismatch listing the tensors of non_lora_trainables.bin that are not the projector's."""
    known = {entry.torch for entry in trained.layout.name_table(trained.cfg)}
    others = [f"  unexpected  {name}  {tensor.shape}" for name, tensor in find(file).items() if name not in known]
    if others:
        raise WeightMismatch(f"{file} holds more than a projector:\n" + "\n".join(others[:40]))


def _tower(path: Path, base_path: Path, hf: dict, vision: Path | None) -> Pretrained:
    """The tower that a LLaVA folder names, or the one given."""
    name = hf.get("mm_vision_tower")
    folder = vision if vision or name is None else tower_folder(path, name, None)
    if folder is None or not folder.is_dir():
        named = f"; {path} names {name!r}" if name else ""
        raise ConversionError(
            f"the base model {base_path} holds no tower{named}: give the tower's folder with --vision"
        )
    tower = read(folder)
    if tower.cfg.vision is None:
        raise ConversionError(f"--vision {folder} holds no tower")
    return tower

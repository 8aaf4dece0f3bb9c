"""Converts checkpoints. The source's format is detected.

    python -m deltallava_jax convert llava-1.5-7b-hf runs/llava            # to a workdir, to evaluate or to train
    python -m deltallava_jax convert runs/delta delta-hf --to hf           # for transformers
    python -m deltallava_jax convert runs/delta delta-llava --to llava     # the original LLaVA layout
    python -m deltallava_jax convert --vision clip-vit-large-patch14-336 --decoder vicuna-7b-v1.5 \\
        --projector delta --scale-factor 2 runs/start                      # a new model, to pretrain
    python -m deltallava_jax convert --vision clip-vit-large-patch14-336 --decoder vicuna-7b-v1.5 \\
        --config configs/llava.py:mqt-pretrain runs/mqt_start              # with a configuration's projector
    python -m deltallava_jax convert my-lora runs/mine --base llava-1.5-7b-hf  # a LoRA adapter of peft or LLaVA
    python -m deltallava_jax convert my-lora whole-hf --base llava-1.5-7b-hf --to hf  # merged with its base
    python -m deltallava_jax convert runs/mine mine-lora --to peft         # the adapter, for peft and vLLM
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

FORMATS = ("orbax", "hf", "llava", "peft")
FITTED = ("grid", "in_width", "out_width")  # projector settings that are determined by tower and decoder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "paths", nargs="+", metavar="[SRC] DST", help="source and destination; no source when composing"
    )
    parser.add_argument("--to", choices=FORMATS, default="orbax", help="format of DST (default: orbax, a workdir)")
    parser.add_argument("--dtype", help="dtype of all parameters: float32, bfloat16 or float16 (default: unchanged); "
                        "adapters stay float32")  # fmt: skip
    parser.add_argument("--base", type=Path, help="of a LoRA adapter: its base model, a folder or a workdir "
                        "(default: the one that it names)")  # fmt: skip
    parser.add_argument(
        "--merge", action="store_true", help="LoRA adapters into the matrices, in float32 (always with --to hf)"
    )
    parser.add_argument("--vision", type=Path, help="folder of the tower: to compose, or that a LLaVA checkpoint names")
    parser.add_argument("--decoder", type=Path, help="to compose: folder of the decoder")
    parser.add_argument(
        "--projector", help="to compose: a system's name (initialized randomly), or a file or folder (trained)"
    )
    parser.add_argument("--config", help="to compose: the projector of a configuration, FILE or FILE:STAGE")
    parser.add_argument("--scale-factor", metavar="S", help="of the projector; several (2,4,8) make it elastic")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="another setting of the projector",
    )
    parser.add_argument("--seed", type=int, default=0, help="for a randomly initialized projector")


def _settings(options: argparse.Namespace) -> dict:
    """ProjectorConfig fields of --scale-factor and --set. Raises ConfigError."""
    from deltallava_jax.config import parse_value
    from deltallava_jax.errors import ConfigError

    settings = {}
    for text in options.set + ([f"scale_factor={options.scale_factor}"] if options.scale_factor else []):
        key, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--set {text}: expected KEY=VALUE")
        settings[key] = parse_value(value)
    return settings


def main(options: argparse.Namespace) -> None:
    from deltallava_jax.config import load_config, to_dict
    from deltallava_jax.convert.card import write_card
    from deltallava_jax.convert.export import write_hf, write_llava
    from deltallava_jax.convert.export_adapters import write_llava_adapter, write_peft
    from deltallava_jax.convert.folder import new_folder
    from deltallava_jax.convert.workdir import compose, has_adapters, open_model, write_workdir
    from deltallava_jax.errors import ConfigError

    *sources, target = map(Path, options.paths)
    settings = _settings(options)
    if options.config:
        values = to_dict(load_config(options.config).model.projector)
        settings = {key: value for key, value in values.items() if key not in FITTED} | settings
        options.projector = settings.pop("name")
    if options.decoder or options.projector:
        if sources or not (options.vision and options.decoder and options.projector):
            raise ConfigError(
                "composing takes --vision, --decoder and --projector (or --config), and one path, the destination"
            )
        if options.base or options.merge:
            raise ConfigError("--base and --merge are for a LoRA adapter as the source, not for composing")
    elif len(sources) != 1:
        raise ConfigError(f"convert takes a source and a destination, got {len(options.paths)} paths")
    if options.merge and options.to == "peft":
        raise ConfigError("--merge leaves no adapter for --to peft; use one of them")
    if options.merge and not has_adapters(sources[0]):
        raise ConfigError(f"--merge is for LoRA adapters; {sources[0]} has none")
    with new_folder(target) as folder:  # before reading anything, to refuse an existing target at once
        if sources:
            model = open_model(
                sources[0], dtype=options.dtype, vision=options.vision, base=options.base,
                merge=options.merge or options.to == "hf",
            )  # fmt: skip
            if settings:
                model = model.with_projector(settings)
        else:
            model = compose(
                options.vision, options.decoder, options.projector,
                settings, dtype=options.dtype, seed=options.seed,
            )  # fmt: skip
        if options.to == "orbax":
            write_workdir(model, folder, target.name)
        elif options.to == "peft":
            write_peft(model, folder, target)
        elif model.lora:
            write_llava_adapter(model, folder, target)
        else:
            {"hf": write_hf, "llava": write_llava}[options.to](model, folder)
            write_card(model, folder, target.name, sources[0] if sources else None)
    parts = [part for part in ("vision", "projector", "decoder") if getattr(model.cfg, part)]
    parts = ", ".join([*parts, "adapters"] if model.lora else parts)
    print(f"{target}: {model.size:,} parameters ({parts}), as {options.to}", file=sys.stderr)

"""Converts checkpoints. The source's format is detected.

    python -m deltallava_jax convert llava-1.5-7b-hf runs/llava            # to a workdir, to evaluate or to train
    python -m deltallava_jax convert runs/delta delta-hf --to hf           # for transformers
    python -m deltallava_jax convert runs/delta delta-llava --to llava     # the original LLaVA layout
    python -m deltallava_jax convert --vision clip-vit-large-patch14-336 --decoder vicuna-7b-v1.5 \\
        --projector delta --scale-factor 2 runs/start                      # a new model, to pretrain
    python -m deltallava_jax convert --vision clip-vit-large-patch14-336 --decoder vicuna-7b-v1.5 \\
        --config configs/llava.py:mqt-pretrain runs/mqt_start              # with a configuration's projector
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

FORMATS = ("orbax", "hf", "llava")
FITTED = ("grid", "in_width", "out_width")  # projector settings that are determined by tower and decoder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "paths", nargs="+", metavar="[SRC] DST", help="source and destination; no source when composing"
    )
    parser.add_argument("--to", choices=FORMATS, default="orbax", help="format of DST (default: orbax, a workdir)")
    parser.add_argument("--dtype", help="dtype of all parameters: float32, bfloat16 or float16 (default: unchanged)")
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
    from deltallava_jax.convert.folder import new_folder
    from deltallava_jax.convert.workdir import compose, open_model, write_workdir
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
    elif len(sources) != 1:
        raise ConfigError(f"convert takes a source and a destination, got {len(options.paths)} paths")
    with new_folder(target) as folder:  # before reading anything, to refuse an existing target at once
        if sources:
            model = open_model(sources[0], dtype=options.dtype, vision=options.vision)
            if settings:
                model = model.with_projector(settings)
        else:
            model = compose(
                options.vision, options.decoder, options.projector,
                settings, dtype=options.dtype, seed=options.seed,
            )  # fmt: skip
        if options.to == "orbax":
            write_workdir(model, folder, target.name)
        else:
            {"hf": write_hf, "llava": write_llava}[options.to](model, folder)
            write_card(model, folder, target.name, sources[0] if sources else None)
    parts = ", ".join(part for part in ("vision", "projector", "decoder") if getattr(model.cfg, part))
    print(f"{target}: {model.size:,} parameters ({parts}), as {options.to}", file=sys.stderr)

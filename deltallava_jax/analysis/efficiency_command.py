"""The operations and cache of an answer, by system and number of visual tokens: the paper's Figure 3.

    python -m deltallava_jax flops                                # LLaVA-1.5's MLP and Delta, CLIP-L/14-336, Vicuna-7B
    python -m deltallava_jax flops --config configs/finetune_13b.py --budgets 144,36,16 --json
    python -m deltallava_jax flops --decoder qwen2_7b --systems all --text 40 --new 10 --plots plots

One image, a prompt of --text tokens, --new tokens of answer. Each number is given twice: "exact" counts every
matrix product of the programs that run, "paper" is the paper's own arithmetic (two matrices in the decoder's MLP where
there are three, two maps of the projector), which gives its published numbers. Nothing is executed: it takes seconds.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from deltallava_jax import cli
from deltallava_jax.analysis import units
from deltallava_jax.config import (
    PRESETS,
    Config,
    DecoderConfig,
    VisionConfig,
    compose,
    load_config,
    override,
    preset,
    settings_of,
)
from deltallava_jax.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", help="a Python file with get_config(), as for train.py; its system by default")
    parser.add_argument("--tower", help=f"instead of the configuration's: {', '.join(PRESETS[VisionConfig])}")
    parser.add_argument("--decoder", help=f"instead of the configuration's: {', '.join(PRESETS[DecoderConfig])}")
    parser.add_argument("--systems", default="", help="comma-separated, as published; or all")
    parser.add_argument("--budgets", default="", help="visual tokens per image, comma-separated")
    parser.add_argument("--text", type=int, default=68, metavar="T", help="tokens of text in the prompt (default: 68)")
    parser.add_argument("--new", type=int, default=30, metavar="G", help="tokens of the answer (default: 30)")
    parser.add_argument("--json", action="store_true", help="print a list of rows")
    parser.add_argument(
        "--plots",
        type=Path,
        metavar="DIR",
        help="also write DIR/flops.png (needs matplotlib: the extra plots)",
    )
    parser.add_argument("--config.SECTION.KEY", metavar="VALUE", help="overrides a setting; may be repeated")
    parser.set_defaults(overrides=[])


def main(options: argparse.Namespace) -> None:
    from deltallava_jax.analysis import efficiency
    from deltallava_jax.analysis.efficiency_plot import plot, require_matplotlib

    if options.plots:
        require_matplotlib()
    if options.text < 1 or options.new < 0:
        raise ConfigError(
            f"--text {options.text} --new {options.new}; expected --text of 1 or more, --new of 0 or more"
        )
    model = base_model(options)
    grid = model.vision.grid
    squares = tuple((grid // s) ** 2 for s in range(1, grid + 1) if grid % s == 0)
    requested = parse_budgets(options.budgets)
    rows = []
    for cfg in models(model, options):
        default = efficiency.BUDGETS if grid == 24 else squares
        for budget in requested or efficiency.budgets_of(cfg, default):
            rows += efficiency.rows(cfg, budget, options.text, options.new)
    print(json.dumps(rows, indent=2) if options.json else format_table(rows))
    if options.plots:
        options.plots.mkdir(parents=True, exist_ok=True)
        plot(rows, options.plots / "flops.png")
        cli.log(f"written to {options.plots / 'flops.png'}")


def base_model(options: argparse.Namespace):
    """The model with the given tower, projector and decoder; by default CLIP-L/14-336, Delta and Vicuna-7B."""
    cfg = load_config(options.config) if options.config else Config()
    cfg = override(cfg, cli.overrides(options.overrides, f"{cli.program()} flops")).model
    cfg.require_whole("a count of operations")
    if not options.tower and not options.decoder:
        return cfg
    vision = preset(VisionConfig, options.tower) if options.tower else cfg.vision
    text = preset(DecoderConfig, options.decoder) if options.decoder else cfg.decoder
    fitted = dict(grid=vision.grid, in_width=vision.width, out_width=text.width, levels=())
    if cfg.projector.grid != vision.grid:
        fitted |= dict(scale_factor=1)  # fits any grid; the budgets replace it
    projector = dataclasses.asdict(cfg.projector) | settings_of(cfg.projector.name, fitted)
    return compose(vision, text, projector, fastv=cfg.fastv, dtype=cfg.dtype)


def models(model, options: argparse.Namespace) -> list:
    """The model with each of the given systems; by default the configuration's, without one the MLP and Delta."""
    from deltallava_jax.analysis.efficiency import system_names, with_system
    from deltallava_jax.models import systems
    from deltallava_jax.models.vision import check_needs

    names = options.systems.split(",") if options.systems else ["mlp", "delta"]
    if options.systems == "all":
        names = system_names()
    elif options.config and not options.systems:
        return [model]
    found = []
    for name in names:
        cfg = with_system(model, name)
        try:
            check_needs(cfg.vision, systems.needs(cfg.projector, cfg.vision.layers))
        except ConfigError as error:
            if options.systems != "all":
                raise
            cli.log(f"{name} is left out: {error}")
            continue
        found.append(cfg)
    return found


def parse_budgets(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")] if text else []
    except ValueError:
        raise ConfigError(f"--budgets {text!r}: expected numbers, e.g. 144,36,16") from None


def format_table(rows: list[dict]) -> str:
    """The rows as text: operations by part, and the cache."""
    head = ["system", "tokens", "convention", "vision", "projector", "prefill", "decode", "total", "cache"]
    lines = [
        f"operations for an image, {rows[0]['text_tokens']} tokens of text and {rows[0]['new_tokens']} new ones",
        "",
    ]
    lines.append(f"{head[0]:14} {head[1]:>6} {head[2]:>10}" + "".join(f"{name:>12}" for name in head[3:]))
    for row in rows:
        parts = [row[f"{name}_tflops"] for name in ("vision", "projector", "prefill", "decode", "total")]
        cells = [units.operations(1e12 * value) for value in parts] + [units.size(row["cache_bytes"])]
        own = f"{row['system']:14} {row['budget']:6} {row['convention']:>10}"
        lines.append(own + "".join(f"{cell:>12}" for cell in cells))
    return "\n".join(lines)

"""LLaVA data sets: what is in them, and as ArrayRecord.

    python -m deltallava_jax data check --json llava_v1_5_mix665k.json --images LLaVA-Tuning --tokenizer vicuna-7b-v1.5
    python -m deltallava_jax data build --json llava_v1_5_mix665k.json --images LLaVA-Tuning --out mix665k
    python -m deltallava_jax data check --array-record mix665k --tokenizer vicuna-7b-v1.5

check exits with 1 if more of the records than --max-bad-fraction cannot be used. Without --tokenizer it counts with
the one that training from scratch makes of the records. build leaves out what check finds broken whatever the length
of rows, and goes on where it stopped; train on the result with --config.data.array_record=mix665k.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    for name, line in (("check", "counts, lengths and faults"), ("build", "write ArrayRecord files")):
        action = actions.add_parser(name, help=line)
        checks = name == "check"
        action.add_argument("--json", required=not checks, nargs="+", metavar="FILE", help="JSON or JSONL of records")
        action.add_argument("--images", required=not checks, help="folder that the records' image paths begin from")
        action.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: one a core)")
        if not checks:
            action.add_argument("--out", required=True, type=Path, help="folder of the data set")
            continue
        action.add_argument("--array-record", metavar="DIR", help="instead of these: a folder that build made")
        action.add_argument("--tokenizer", help="Hugging Face folder, or a tokenizer.json")
        action.add_argument("--template", default="vicuna_v1", help="of the conversations (default: vicuna_v1)")
        action.add_argument("--row-length", type=int, default=2048, help="length limit, visual tokens included")
        action.add_argument("--tokens", type=int, default=144, help="visual tokens an image")
        action.add_argument("--no-decode", action="store_true", help="only look whether images are there")
        action.add_argument("--max-bad-fraction", type=float, default=0.01)
        action.add_argument("--report", type=Path, help="also write the report as JSON")


def main(options: argparse.Namespace) -> None:
    {"check": _check, "build": _build}[options.action](options)


def _check(options: argparse.Namespace) -> None:
    from deltallava_jax.config import DataConfig, DecoderConfig, VisionConfig, preset
    from deltallava_jax.data import tokens
    from deltallava_jax.data.check import check, format_report
    from deltallava_jax.data.conversation import known_template
    from deltallava_jax.data.pipeline import Rows
    from deltallava_jax.data.sources import training_source
    from deltallava_jax.errors import ConfigError

    known_template(options.template, setting="--template")
    if bool(options.array_record) == bool(options.json and options.images):
        raise ConfigError("expected --json FILE ... and --images FOLDER, or --array-record DIR")
    cfg = DataConfig(
        dataset="llava",
        json=tuple(options.json or ()),
        images=options.images or "",
        array_record=options.array_record or "",
        template=options.template,
        row_length=options.row_length,
    )
    source = training_source(cfg)
    if options.tokenizer:
        tokenizer = tokens.load(options.tokenizer)
    else:
        size = preset(DecoderConfig, "tiny").vocab_size
        tokenizer = tokens.train(source.texts(), size)
        print(
            f"counted with a tokenizer of {size} tokens made of these records, as training from scratch makes it; "
            "--tokenizer DIR counts with another",
            file=sys.stderr,
        )
    plan = Rows(source, tokenizer, cfg, VisionConfig()).plan((options.tokens,), 0)
    report = check(source, plan, options.workers, decode=not options.no_decode)
    print(format_report(report))
    if options.report:
        options.report.write_text(json.dumps(report, indent=2) + "\n")
    bad = 1 - report["usable"] / report["records"]
    if bad > options.max_bad_fraction:
        sys.exit(
            f"not fit to train on: {bad:.1%} of the records cannot be used, more than {options.max_bad_fraction:.1%}"
        )


def _build(options: argparse.Namespace) -> None:
    from deltallava_jax.config import DataConfig
    from deltallava_jax.data.array_record import build
    from deltallava_jax.data.sources import training_source
    from deltallava_jax.errors import count_faults

    source = training_source(DataConfig(dataset="llava", json=tuple(options.json), images=options.images))
    made = build(source, options.out, options.workers)
    print(f"{options.out}: {made['records']:,} records, {made['bytes']:,} bytes", file=sys.stderr)
    if made["faults"]:
        listed = options.out / "faults.txt"
        listed.write_text("".join(f"{why}\n" for _, why in made["faults"]))
        kinds = count_faults(kind for kind, _ in made["faults"])
        print(f"{len(made['faults']):,} records were left out, listed in {listed}: {kinds}", file=sys.stderr)

"""Checks LLaVA data sets and converts them to ArrayRecord.

    python -m deltallava_jax data check --json llava_v1_5_mix665k.json --images LLaVA-Tuning --tokenizer vicuna-7b-v1.5
    python -m deltallava_jax data build --json llava_v1_5_mix665k.json --images LLaVA-Tuning --out mix665k
    python -m deltallava_jax data check --array-record mix665k --tokenizer vicuna-7b-v1.5

check exits with 1 if more than --max-bad-fraction of the records are unusable. Without --tokenizer it counts with the
tokenizer that training from scratch would train on the records. build leaves out the records that are broken whatever
the length of the rows, and resumes where it stopped; train on its folder with --config.data.array_record=mix665k.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    for name, line in (("check", "report counts, lengths and faults"), ("build", "write ArrayRecord files")):
        action = actions.add_parser(name, help=line)
        checks = name == "check"
        action.add_argument("--json", required=not checks, nargs="+", metavar="FILE", help="JSON or JSONL of records")
        action.add_argument("--images", required=not checks, help="root folder of the records' image paths")
        action.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: one per core)")
        if not checks:
            action.add_argument("--out", required=True, type=Path, help="folder of the data set")
            continue
        action.add_argument(
            "--array-record", metavar="DIR", help="a folder written by build, instead of --json and --images"
        )
        action.add_argument("--tokenizer", help="Hugging Face folder, or a tokenizer.json")
        action.add_argument("--template", default="vicuna_v1", help="conversation template (default: vicuna_v1)")
        action.add_argument("--row-length", type=int, default=2048, help="length limit, visual tokens included")
        action.add_argument("--tokens", type=int, default=144, help="visual tokens per image")
        action.add_argument("--no-decode", action="store_true", help="only check that image files exist")
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
            f"counted with a tokenizer of {size} tokens trained on these records, as in training from scratch; "
            "use --tokenizer DIR for another",
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
            f"not fit to train on: {bad:.1%} of the records are unusable, more than {options.max_bad_fraction:.1%}"
        )


def _build(options: argparse.Namespace) -> None:
    from deltallava_jax.config import DataConfig
    from deltallava_jax.data.array_record import build
    from deltallava_jax.data.sources import training_source
    from deltallava_jax.errors import count_faults

    source = training_source(DataConfig(dataset="llava", json=tuple(options.json), images=options.images))
    built = build(source, options.out, options.workers)
    print(f"{options.out}: {built['records']:,} records, {built['bytes']:,} bytes", file=sys.stderr)
    if built["faults"]:
        file = options.out / "faults.txt"
        file.write_text("".join(f"{message}\n" for _, message in built["faults"]))
        kinds = count_faults(kind for kind, _ in built["faults"])
        print(f"{len(built['faults']):,} records were left out, listed in {file}: {kinds}", file=sys.stderr)

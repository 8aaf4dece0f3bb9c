"""LLaVA data sets: what is in them, and as ArrayRecord.

    python -m deltallava_jax data check --json llava_v1_5_mix665k.json --images LLaVA-Tuning --tokenizer vicuna-7b-v1.5
    python -m deltallava_jax data build --json llava_v1_5_mix665k.json --images LLaVA-Tuning --out mix665k

check exits with 1 if more of the records than --max-bad-fraction cannot be used. build goes on where it stopped;
train on the result with --config.data.array_record=mix665k.
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
        action.add_argument("--json", required=True, nargs="+", metavar="FILE", help="JSON or JSONL of records")
        action.add_argument("--images", required=True, help="folder that the records' image paths begin from")
        action.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: one a core)")
        if name == "build":
            action.add_argument("--out", required=True, type=Path, help="folder of the data set")
            continue
        action.add_argument("--tokenizer", required=True, help="Hugging Face folder, or a tokenizer.json")
        action.add_argument("--template", default="vicuna_v1", help="of the conversations (default: vicuna_v1)")
        action.add_argument("--row-length", type=int, default=2048, help="length limit, visual tokens included")
        action.add_argument("--tokens", type=int, default=144, help="visual tokens an image")
        action.add_argument("--no-decode", action="store_true", help="only look whether images are there")
        action.add_argument("--max-bad-fraction", type=float, default=0.01)
        action.add_argument("--report", type=Path, help="also write the report as JSON")


def main(options: argparse.Namespace) -> None:
    from deltallava_jax.config import DataConfig
    from deltallava_jax.data.sources import training_source

    source = training_source(DataConfig(dataset="llava", json=tuple(options.json), images=options.images))
    {"check": _check, "build": _build}[options.action](options, source)


def _check(options: argparse.Namespace, source) -> None:
    from deltallava_jax.data import tokens
    from deltallava_jax.data.check import Checker, check, table
    from deltallava_jax.data.conversation import TEMPLATES
    from deltallava_jax.errors import ConfigError

    if options.template not in TEMPLATES:
        raise ConfigError(f"--template is {options.template!r}; known: {', '.join(TEMPLATES)}")
    limit = options.row_length - (options.tokens - 1)
    if limit < 2:
        raise ConfigError(f"--row-length {options.row_length} has no room for an image of {options.tokens} tokens")
    checker = Checker(source, TEMPLATES[options.template], tokens.load(options.tokenizer), limit, not options.no_decode)
    report = check(checker, options.workers)
    print(table(report))
    if options.report:
        options.report.write_text(json.dumps(report, indent=2) + "\n")
    bad = 1 - report["usable"] / max(report["records"], 1)
    if bad > options.max_bad_fraction:
        sys.exit(
            f"not fit to train on: {bad:.1%} of the records cannot be used, more than {options.max_bad_fraction:.1%}"
        )


def _build(options: argparse.Namespace, source) -> None:
    from deltallava_jax.data.array_record import build

    made = build(source, options.out, options.workers)
    print(f"{options.out}: {made['records']:,} records, {made['bytes']:,} bytes", file=sys.stderr)
    if made["faults"]:
        listed = options.out / "faults.txt"
        listed.write_text("".join(f"{fault}\n" for fault in made["faults"]))
        print(f"{len(made['faults']):,} records were left out; they are listed in {listed}", file=sys.stderr)

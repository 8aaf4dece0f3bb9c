"""Options of chat, demo and serve that select and load a model."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, metavar="DIR", help="a workdir, or a Hugging Face or LLaVA folder")
    parser.add_argument("--template", help="of prompts, e.g. chatml; the model's own by default")
    parser.add_argument("--dtype", help="of weights and computing, e.g. bfloat16; the model's own by default")
    parser.add_argument("--tensor", type=int, default=1, help="devices that share every layer, for a large model")


def port(text: str) -> int:
    """A port number; the system would silently replace one that is too large."""
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r}; expected 0 to 65535")
    return int(text)


def load_model(options: argparse.Namespace):
    from deltallava_jax import load

    print(f"loading {options.model}", file=sys.stderr)
    return load(options.model, dtype=options.dtype, tensor=options.tensor, template=options.template)

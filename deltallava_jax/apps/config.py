"""The settings of a configuration.

    python -m deltallava_jax config show configs/llava.py:mqt-finetune
    python -m deltallava_jax config show configs/easy_vqa.py --config.model.projector.name=mqt     # with overrides

Prints every setting with its type, its value, its default where that differs, and its purpose.
"""

from __future__ import annotations

import argparse

from deltallava_jax import cli
from deltallava_jax.config.show import show


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    action = actions.add_parser("show", help="print every setting")
    action.add_argument("file", metavar="FILE", help="a Python file with get_config(), or FILE:SYSTEM-STAGE")
    action.add_argument("--config.SECTION.KEY", metavar="VALUE", help="overrides a setting; may be repeated")
    parser.set_defaults(overrides=[])


def main(options: argparse.Namespace) -> None:
    print(show(options.file, cli.overrides(options.overrides, f"{cli.program()} config show")))

"""The command line: deltallava COMMAND --help, or python -m deltallava_jax COMMAND --help

In a copy of the repository, train.py and eval.py are the same as train and eval."""

from __future__ import annotations

import argparse
import importlib
import os
import select
import sys

from deltallava_jax import cli

# command -> (module with add_arguments(parser) and main(options), one line of help)
COMMANDS = {
    "train": ("deltallava_jax.apps.train", "trains a model"),
    "eval": ("deltallava_jax.apps.eval", "evaluates a workdir's newest checkpoint"),
    "config": ("deltallava_jax.apps.config", "every setting of a configuration and its purpose"),
    "data": ("deltallava_jax.data.command", "LLaVA data sets: check them, build them into ArrayRecord"),
    "convert": ("deltallava_jax.convert.command", "checkpoints of Hugging Face, LLaVA and ours, into each other"),
    "plan": ("deltallava_jax.analysis.plan_command", "memory, operations and collectives of a run on a machine"),
    "tune": ("deltallava_jax.apps.tune", "which implementation of attention is fastest on the devices at hand"),
    "chat": ("deltallava_jax.apps.chat", "a conversation with a model in the terminal"),
    "demo": ("deltallava_jax.apps.demo", "a web page to ask a model about pictures"),
    "serve": ("deltallava_jax.apps.serve", "a server with OpenAI's protocol"),
    "flops": ("deltallava_jax.analysis.efficiency_command", "operations and cache of an answer by system and tokens"),
    "gradcam": ("deltallava_jax.analysis.gradcam_command", "where in an image an answer comes from, as a picture"),
}

PROCESSES = ("train", "eval")  # may run as several processes, which their modules' run(arguments) supervises


def parse(arguments: list[str]) -> argparse.Namespace:
    """Options of one command, with ``main`` to run it. Only that command's module is imported."""
    parser = argparse.ArgumentParser(
        prog=cli.program(), description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (module, line) in COMMANDS.items():
        selected = name in arguments[:1]
        module = importlib.import_module(module) if selected else None
        command = commands.add_parser(
            name,
            help=line,
            description=module.__doc__ if selected else None,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if selected:
            module.add_arguments(command)
            command.set_defaults(main=module.main)
    options, rest = parser.parse_known_args(arguments)
    if hasattr(options, "overrides"):
        options.overrides, rest = rest, []
    if rest and (not hasattr(options, "paths") or any(text.startswith("-") for text in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:  # argparse ends a list of paths at the first option after it
        options.paths += rest
    return options


def _run(options: argparse.Namespace) -> None:
    """Runs a command; ends quietly, as SIGPIPE does, where the reader of its output has gone (``| head``)."""
    try:
        options.main(options)
        sys.stdout.flush()
    except BrokenPipeError:
        reader = select.poll()
        reader.register(sys.stdout, 0)
        if not reader.poll(0):  # another pipe
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at Python's end
        sys.exit(141)


def main(arguments: list[str] | None = None) -> None:
    """Runs a command line."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] in PROCESSES:
        return importlib.import_module(COMMANDS[arguments[0]][0]).run(arguments[1:])
    options = parse(arguments)
    cli.run(lambda: _run(options))


if __name__ == "__main__":
    main()

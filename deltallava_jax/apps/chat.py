"""A chat with a model in the terminal; the answers are streamed.

    python -m deltallava_jax chat runs/easy_vqa --image shape.png

The model is a workdir of train.py, or a Hugging Face or LLaVA folder. While it runs:
    /image PATH    ask the next question about this image; repeat it for several images
    /budget K      use K visual tokens per image and start a new conversation
    /reset         start a new conversation without images: needed between questions to a model trained on single ones
    /help, /quit   Ctrl-C stops an answer, Ctrl-D exits"""

from __future__ import annotations

import argparse
import signal
import sys
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path

from deltallava_jax.apps import options as shared
from deltallava_jax.errors import ConfigError, UserError
from deltallava_jax.inference.sampling import Sampling

COMMANDS = __doc__.partition("While it runs:\n")[2]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    shared.add_model(parser)
    parser.add_argument("--image", type=Path, action="append", default=[], help="for the first question; repeatable")
    parser.add_argument("--budget", type=int, help="visual tokens per image; the projector's largest by default")
    parser.add_argument("--stop", action="append", default=[], help="a text that ends an answer; repeatable")
    for field in fields(Sampling):
        if field.name != "stop":
            kind = int if field.name == "seed" else type(field.default)
            default = "a new one for each answer" if field.name == "seed" else field.default
            name = "--" + field.name.replace("_", "-")
            parser.add_argument(name, type=kind, default=field.default, help=f"{default} by default")


def sampling(options: argparse.Namespace) -> dict:
    """The fields of ``Sampling`` among a command's options."""
    return {field.name: getattr(options, field.name) for field in fields(Sampling)}


def main(options: argparse.Namespace) -> None:
    with suppress(ImportError):  # Windows has none
        import readline  # noqa: F401  # gives input() arrow keys and a history
    settings = sampling(options)
    Sampling(**settings)
    terminal = Terminal(shared.load_model(options), options.budget, settings)
    for image in options.image:
        terminal.image(str(image))
    print(f"/help for help; the first answer compiles the model\n{terminal.about}")
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            print(end="\n" if sys.stdin.isatty() else "")
            break
        except KeyboardInterrupt:
            print("\nCtrl-D or /quit ends the program")
            continue
        if line == "/quit":
            break
        try:
            terminal.execute(line)
        except UserError as error:
            print(f"error: {error}")


class Terminal:
    """A chat session in the terminal."""

    def __init__(self, model, budget: int | None, settings: dict):
        self.model = model
        self.settings = settings
        self.images, self.shown = [], []
        self.start(budget)

    def start(self, budget: int | None) -> None:
        if self.model.cfg.whole:
            budget = self.model.engine.budget(budget)
        self.budget = budget
        self.chat = self.model.chat(budget=budget, **self.settings)

    @property
    def about(self) -> str:
        from deltallava_jax.models import systems

        if not self.model.cfg.whole:
            return "a decoder alone, without images" + ("" if self.model.template else ": it continues texts")
        known = ", ".join(map(str, systems.budgets(self.model.cfg.projector)))
        return f"{self.budget} visual tokens per image (of {known})"

    def execute(self, line: str) -> None:
        """Executes a line. Raises UserError."""
        command, _, value = line.partition(" ")
        if command == "/image":
            self.image(value.strip().strip("'\""))
        elif command == "/budget":
            if not value.strip().isdecimal():
                raise ConfigError(f"/budget {value.strip()!r}: expected a number of visual tokens, e.g. /budget 16")
            self.start(int(value))
            self.images, self.shown = self.images or self.shown, []
            about_images = f", still about {len(self.images)} image(s)" if self.images else ""
            print(f"{self.about}; new conversation{about_images}")
        elif command == "/reset":
            self.start(self.budget)
            self.images, self.shown = [], []
            print("new conversation")
        elif command == "/help":
            print(COMMANDS)
        elif command.startswith("/"):
            raise ConfigError(f"unknown command {command}; /help lists them")
        elif line:
            self.answer(line)

    def image(self, path: str) -> None:
        if not path:
            raise ConfigError("/image: expected a file, e.g. /image shape.png")
        if not self.model.cfg.whole:
            raise ConfigError("the model has no vision tower, so it takes no images")
        self.model.pixels(path)
        self.images.append(path)
        kept = "; the conversation so far is kept, /reset clears it" if self.chat.last else ""
        print(f"the next question is about {', '.join(self.images)}{kept}")

    def answer(self, question: str) -> None:
        answer = self.chat.stream(question, self.images)
        self.shown, self.images = self.shown + self.images, []
        with interrupts(answer.cancel):
            for piece in answer:
                print(piece, end="", flush=True)
        how = f", seed {answer.seed}" if self.settings["temperature"] else ""
        how += ", stopped" if answer.finish == "cancelled" else ""
        print(f"\n[{speed(answer)}{how}]", flush=True)


def speed(answer) -> str:
    """A line about an answer's tokens and seconds, compiling separately."""
    line = f"{answer.tokens} tokens, the first after {duration(answer.seconds_to_first)}"
    if answer.tokens > 1:
        steady = (answer.tokens - 1) / max(answer.seconds - answer.seconds_to_first, 1e-9)
        line += f", then {f'{steady:.3g}' if steady < 1000 else f'{steady:,.0f}'} tokens/s"
    if answer.seconds_compiling:
        line += f", compiling took {duration(answer.seconds_compiling)} more"
    return line


def duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


@contextmanager
def interrupts(stop):
    """Within it Ctrl-C calls ``stop``."""
    before = signal.signal(signal.SIGINT, lambda *_: stop())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)

"""python -m deltallava_jax chat, driven through its pipes."""

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from deltallava_jax import cli
from deltallava_jax.__main__ import parse
from tests.inference.models import model, picture

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "deltallava_jax", "chat"]
QUESTION = "what color is the shape?"
STATISTICS = re.compile(
    r"\[(\d+) tokens, the first after [\d.]+ m?s(, then [\d.,]+ tokens/s)?(, compiling took [\d.]+ m?s more)?"
    r"(, seed \d+)?(, stopped)?\]"
)


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    file = tmp_path_factory.mktemp("images") / "a shape.png"
    Image.fromarray(picture()).save(file)
    return file


def test_a_conversation(workdir, image):
    lines = [f"/image '{image}'", QUESTION, "is it red?", "/budget 4", QUESTION, "/budget 4", QUESTION, "/budget 3",
             "/budget \u00b2", "/image", "/image none.png", "/nothing", "/reset", "/help"]  # fmt: skip
    done = subprocess.run([*COMMAND, workdir, "--max-new-tokens=8"], input="\n".join(lines), cwd=ROOT,
                          capture_output=True, text=True, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stderr
    chat = model().chat(max_new_tokens=8)
    expected = [chat.ask(QUESTION, picture()), chat.ask("is it red?")]
    expected += [model().generate(picture(), QUESTION, budget=4, max_new_tokens=8)] * 2
    at = 0
    for answer in expected:
        at = done.stdout.index(f"{answer}\n[", at) + len(answer)
    compiled = [bool(found[3]) for found in STATISTICS.finditer(done.stdout)]
    assert compiled == [True, True, True, False]
    errors = [line for line in done.stdout.splitlines() if line.startswith("error: ")]
    for line, words in zip(
        errors, ["delta makes 16, 4, 1", "expected a number", "expected a file", "none.png", "unknown"], strict=True
    ):
        assert words in line
    assert len(errors) == 5 and "; new conversation, still about 1 image(s)" in done.stdout


def test_ctrl_c_ends_the_answer_and_not_the_program(workdir):
    with subprocess.Popen([*COMMAND, workdir, "--max-new-tokens=6000"], cwd=ROOT, stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, text=True) as process:  # fmt: skip
        try:
            enter = lambda line: (process.stdin.write(line + "\n"), process.stdin.flush())
            assert "help" in process.stdout.readline() and "16 visual tokens" in process.stdout.readline()
            enter(QUESTION)
            process.stdout.read(20)  # the answer has begun
            process.send_signal(signal.SIGINT)
            text = ""
            while not (found := STATISTICS.search(text)):
                text += process.stdout.readline()
            assert found[5] and int(found[1]) < 6000
            enter("/reset")
            assert process.stdout.readline() == "new conversation\n"
            enter("/quit")
            assert process.wait(timeout=60) == 0
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["chat", "--image=nothere.png"], "error: image nothere.png: "),
        (["gradcam", "--image=nothere.png", "--prompt=what?"], "error: image nothere.png: "),
        (["chat", "--template=chatm"], "error: template is 'chatm'; did you mean 'chatml'?"),
        (["chat", "--dtype=float8"], "error: .*float8"),
        (["serve", "--template=chatm"], "error: template is 'chatm'; did you mean 'chatml'?"),
        (["chat", "--stop="], "error: stop=.*none of them empty"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_bad_options_are_one_line(workdir, command, words, capfd):
    if command[0] == "serve":
        pytest.importorskip("uvicorn")
    with pytest.raises(SystemExit) as ended:
        options = parse([command[0], str(workdir), *command[1:]])
        cli.run(lambda: options.main(options))
    assert ended.value.code == 2
    lines = capfd.readouterr().err.splitlines()
    assert re.match(words, lines[-1]) and "Traceback" not in "".join(lines)


def test_a_folder_without_a_model_is_one_line(tmp_path):
    done = subprocess.run([*COMMAND, tmp_path], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith("error: ") and "Traceback" not in done.stderr

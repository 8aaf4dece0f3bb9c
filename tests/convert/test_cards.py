"""Model cards: their Python runs as it stands, and they print what holds of the whole model."""

import contextlib
import dataclasses
import io
import re

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")

import deltallava_jax  # noqa: E402
from deltallava_jax.convert.workdir import write_workdir  # noqa: E402
from deltallava_jax.data.conversation import TEMPLATES  # noqa: E402
from deltallava_jax.workdir import Workdir  # noqa: E402
from tests.convert.checkpoints import convert  # noqa: E402


@pytest.fixture(scope="module")
def workdir(chat_model, tmp_path_factory):
    """workdir(projector, template): a workdir of a model of those."""
    root = tmp_path_factory.mktemp("workdirs")

    def workdir(projector: str, template: str):
        folder = root / f"{projector}_{template}"
        if not folder.exists():
            folder.mkdir()
            write_workdir(dataclasses.replace(chat_model(projector), template=template), folder, folder.name)
        return folder

    return workdir


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The folder that a card's code runs in: picture.png, and the export beside it."""
    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(5).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save("picture.png")
    return tmp_path


def code_of(card: str) -> str:
    (code,) = re.findall(r"```python\n(.*?)\n```", card, re.S)
    return code


@pytest.mark.parametrize("to", ["hf", "llava"])
@pytest.mark.parametrize(
    ("projector", "template"),
    [("mlp", "chatml"), ("mlp", "vicuna_v1"), *(("delta", template) for template in TEMPLATES)],
)
def test_the_code_of_a_card_runs_and_answers_as_we_do(projector, template, to, workdir, here):
    source = workdir(projector, template)
    convert(source, here / f"{projector}_{template}_{to}", "--to", to)
    card = (here / f"{projector}_{template}_{to}" / "README.md").read_text()
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code_of(card), "card", "exec"), {})
    count = 32 if to == "hf" else 128
    ours = deltallava_jax.load(source).generate("picture.png", "What is this?", max_new_tokens=count)
    assert printed.getvalue().strip() == ours
    assert f"template {template} " in card and TEMPLATES[template].system_text in card


def test_results_are_on_the_card_once_and_those_of_a_part_are_not(workdir, here):
    source = workdir("mlp", "chatml")
    report = dict(task="easy_vqa", budget=16, accuracy=0.5, n=128, blind=False, limit=None)
    home = Workdir(source)
    home.write_report(report)
    home.write_report(report | {"accuracy": 0.25, "blind": True}, "noise")
    home.write_report(report | {"accuracy": 0.75, "n": 16, "limit": 16})
    convert(source, here / "out", "--to", "hf")
    rows = [line for line in (here / "out" / "README.md").read_text().splitlines() if line.startswith("| easy_vqa")]
    assert [row.split(" | ")[3] for row in rows] == ["0.5000", "0.2500"]


def test_cards_of_parts_describe_them(saved, here):
    for name, task in (("llama", "text-generation"), ("clip", "image-feature-extraction")):
        convert(saved(name), here / name, "--to", "hf")
        card = (here / name / "README.md").read_text()
        assert f"pipeline_tag: {task}" in card and "```python" not in card

"""Workdirs that version 0.1.0 made (tests/testdata/v1) load, answer, and resume as in that version."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

import deltallava_jax
import train as training
from deltallava_jax.parallel import mesh
from deltallava_jax.workdir import Workdir

DATA = Path(__file__).parent / "testdata" / "v1"
EXPECTED = json.loads((DATA / "expected.json").read_text())
STAGE = {"first": (), "second": ("--config.init_from=first", "--config.optimizer.frozen=('^vision/',)")}


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A copy of the folder, in which its relative paths hold."""
    home = shutil.copytree(DATA, tmp_path / "home")
    monkeypatch.chdir(home)
    return home


@pytest.mark.parametrize("name", EXPECTED)
def test_it_answers_as_it_did(name, home, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # what the second stage began with is named by a relative path
    model = deltallava_jax.load(home / name)
    for asked, ids in EXPECTED[name]["answers"].items():
        picture, budget = asked.split()
        answer = model.stream(
            home / "pictures" / f"{picture}.png", "what color is the shape?", budget=int(budget), max_new_tokens=6
        )
        list(answer)
        assert [int(token) for token in answer.ids] == ids
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", EXPECTED)
def test_it_resumes_as_it_would_have(name, home, monkeypatch, capsys):
    make_mesh = mesh.make_mesh
    monkeypatch.setattr(mesh, "make_mesh", lambda cfg: make_mesh(cfg, jax.devices()[:1]))
    training.main(
        *training.parse(
            [
                "--config",
                "config.py",
                "--workdir",
                name,
                "--config.training.steps=6",
                "--config.data.aspect=square",
                *STAGE[name],
            ]
        )
    )
    told = capsys.readouterr().err
    assert "note: training.steps is 6; the run was started with 4" in told
    assert "resuming from step 4 of 6" in told and "init_from" not in told
    lines = [json.loads(line) for line in Workdir(name).metrics.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    np.testing.assert_allclose([line["loss"] for line in lines[4:]], EXPECTED[name]["losses"], rtol=1e-5)

"""python -m deltallava_jax data check and data build, as a user calls them."""

import json
import shutil

import golden
import pytest

from benchmarks.make_llava import FAULTS, make
from deltallava_jax.__main__ import parse
from deltallava_jax.data.array_record import ArrayRecords
from deltallava_jax.errors import ConfigError

LLAMA = golden.DATA / "llama_tokenizer"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llava")
    make(folder, 30, each=1)
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DELTALLAVA_CACHE", str(tmp_path / "cache"))


def data(action, folder, *arguments):
    files = ["--json", folder / "data.json", "--images", folder, "--workers", 1]
    options = parse(["data", action, *map(str, [*files, *arguments])])
    options.main(options)


def test_check_prints_and_writes_a_report_and_says_if_the_data_are_fit(folder, tmp_path, capsys):
    arguments = ["--tokenizer", LLAMA, "--report", tmp_path / "report.json"]
    with pytest.raises(SystemExit, match="not fit to train on: 26.7% of the records cannot be used, more than 1.0%"):
        data("check", folder, *arguments)
    data("check", folder, *arguments, "--max-bad-fraction", 0.3)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["records"] == 30 and report["usable"] == 30 - len(FAULTS)
    printed = capsys.readouterr().out
    assert "30 records, 22 usable" in printed and "images that are missing" in printed
    data("check", folder, *arguments, "--max-bad-fraction", 0.3, "--no-decode")
    assert json.loads((tmp_path / "report.json").read_text())["faults"]["unreadable"] == 0


def test_duplicate_ids_are_counted(folder, tmp_path):
    entries = json.loads((folder / "data.json").read_text())
    entries[1]["id"] = entries[0]["id"]
    (folder / "twice.json").write_text(json.dumps(entries))
    report = tmp_path / "report.json"
    arguments = ["--json", folder / "twice.json", "--tokenizer", LLAMA, "--report", report, "--max-bad-fraction", 1]
    data("check", folder, *arguments)
    found = json.loads(report.read_text())
    assert found["duplicate_ids"] == 1 and found["duplicate_examples"] == [entries[0]["id"]]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--template", "llama"], "--template is 'llama'"),
        (["--tokens", 2048], "has no room for an image of 2048 tokens"),
    ],
)
def test_check_refuses_what_cannot_be(folder, arguments, words):
    with pytest.raises(ConfigError, match=words):
        data("check", folder, "--tokenizer", LLAMA, *arguments)


def test_build_takes_several_files_and_lists_what_it_left_out(folder, tmp_path, capsys):
    shutil.copy(folder / "data.json", folder / "again.json")
    out = tmp_path / "records"
    data("build", folder, "--json", folder / "data.json", folder / "again.json", "--out", out)
    assert len(ArrayRecords(out)) == 2 * 28  # without the missing image and the one outside the folder
    assert len((out / "faults.txt").read_text().splitlines()) == 4
    assert "4 records were left out; they are listed in" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="was begun from other records"):
        data("build", folder, "--out", out)

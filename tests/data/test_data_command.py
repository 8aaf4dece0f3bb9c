"""python -m deltallava_jax data check and data build, as a user calls them."""

import json
import shutil

import pytest
from PIL import Image

from benchmarks.recipes.make_llava import FAULTS, make
from deltallava_jax.__main__ import parse
from deltallava_jax.config import DataConfig, VisionConfig
from deltallava_jax.data import tokens
from deltallava_jax.data.array_record import ArrayRecords
from deltallava_jax.data.llava_json import LlavaJson
from deltallava_jax.data.pipeline import Rows
from deltallava_jax.errors import ConfigError, TokenizerError
from tests import golden

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


def test_check_prints_and_writes_a_report_and_exits_with_1_for_unfit_data(folder, tmp_path, capsys):
    arguments = ["--tokenizer", LLAMA, "--report", tmp_path / "report.json"]
    with pytest.raises(SystemExit, match="not fit to train on: 26.7% of the records are unusable, more than 1.0%"):
        data("check", folder, *arguments)
    data("check", folder, *arguments, "--max-bad-fraction", 0.3)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["records"] == 30 and report["usable"] == 30 - len(FAULTS)
    printed = capsys.readouterr().out
    assert "30 records, 22 usable" in printed and "missing images" in printed
    data("check", folder, *arguments, "--max-bad-fraction", 0.3, "--no-decode")
    assert json.loads((tmp_path / "report.json").read_text())["faults"]["unreadable"] == 0


def test_duplicate_ids_are_counted(folder, tmp_path):
    entries = json.loads((folder / "data.json").read_text())
    turns = [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "this"}]
    entries += [{"id": "twice", "conversations": turns}] * 2
    (folder / "twice.json").write_text(json.dumps(entries))
    report = tmp_path / "report.json"
    arguments = ["--json", folder / "twice.json", "--tokenizer", LLAMA, "--report", report, "--max-bad-fraction", 1]
    data("check", folder, *arguments)
    found = json.loads(report.read_text())
    assert found["duplicate_ids"] == 1 and found["duplicate_examples"] == ["twice"]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--template", "llama"], "--template is 'llama'"),
        (["--tokens", 2048], "row_length=2048 cannot hold 1 images of 2048 tokens"),
        (["--images", "nowhere"], "data.images='nowhere' is not a folder"),
        (["--array-record", "too"], "expected --json FILE ... and --images FOLDER, or --array-record DIR"),
        (["--json", golden.DATA], "data.json: .* is a folder; expected a file .data.array_record takes a folder."),
    ],
)
def test_check_refuses_what_cannot_be(folder, arguments, words):
    with pytest.raises(ConfigError, match=words):
        data("check", folder, "--tokenizer", LLAMA, *arguments)


def test_a_wrong_tokenizer_is_named_with_what_was_expected(folder, tmp_path):
    with pytest.raises(TokenizerError, match="nothing.* is missing; expected a tokenizer.json, or a Hugging Face"):
        data("check", folder, "--tokenizer", tmp_path / "nothing")


def test_without_a_tokenizer_the_check_counts_with_the_one_that_training_makes(folder, tmp_path, capsys):
    report = tmp_path / "report.json"
    data("check", folder, "--no-decode", "--max-bad-fraction", 1, "--report", report)
    assert "counted with a tokenizer of 384 tokens trained on these records" in capsys.readouterr().err
    source = LlavaJson(folder / "data.json", folder)
    own = tokens.train(source.texts(), 384)
    rows = Rows(source, own, DataConfig(row_length=2048), VisionConfig())
    plan = rows.plan((144,), 0)
    missing = json.loads(report.read_text())["faults"]["missing"]
    gone = [index for index in plan.records if not all(path.exists() for path in source[index].images)]
    assert len(gone) == missing == 1
    expected = plan.lengths[plan.records].sum() - plan.lengths[gone].sum()
    assert json.loads(report.read_text())["text_tokens"] == expected


def test_pictures_that_a_square_crop_cuts_are_counted(folder, tmp_path, capsys):
    sizes = [(64, 64), (64, 50), (100, 50), (40, 100), (200, 30)]
    entries = []
    for number, size in enumerate(sizes):
        Image.new("RGB", size).save(tmp_path / f"{number}.png")
        turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "a square"}]
        entries.append({"id": str(number), "image": f"{number}.png", "conversations": turns})
    (tmp_path / "data.json").write_text(json.dumps(entries))
    data("check", tmp_path, "--tokenizer", LLAMA)
    out = capsys.readouterr().out
    assert "of 5 images, data.aspect=square crops this share of the area" in out
    assert "3 more than 25%, 2 more than 50%, 1 more than 75%" in out
    assert "--config.data.aspect=pad keeps them whole" in out


def test_build_takes_several_files_and_lists_what_it_left_out(folder, tmp_path, capsys):
    shutil.copy(folder / "data.json", folder / "again.json")
    out = tmp_path / "records"
    data("build", folder, "--json", folder / "data.json", folder / "again.json", "--out", out)
    assert len(ArrayRecords(out)) == 2 * (30 - len(FAULTS))
    assert len((out / "faults.txt").read_text().splitlines()) == 2 * len(FAULTS)
    printed = capsys.readouterr().err
    assert "16 records were left out, listed in" in printed and "8 images that cannot be read" in printed
    options = parse(["data", "check", "--array-record", str(out), "--tokenizer", str(LLAMA), "--workers", "1"])
    options.main(options)  # what build made is fit to train on
    assert f"{2 * 22} records, {2 * 22} usable" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="was built from other records"):
        data("build", folder, "--out", out)
    about = out / "source.json"
    about.write_text(about.read_text()[:-3])  # truncated
    with pytest.raises(ConfigError, match="use a new folder, or remove it"):
        data("build", folder, "--json", folder / "data.json", folder / "again.json", "--out", out)

"""A whole data set with planted faults (benchmarks/make_llava.py): each is found, and nothing else is lost."""

import collections
import json

import numpy as np
import pytest

from benchmarks.make_llava import FAULTS, make
from deltallava_jax.config import DataConfig, VisionConfig
from deltallava_jax.data import array_record, tokens
from deltallava_jax.data.array_record import ArrayRecords, build
from deltallava_jax.data.check import check, format_report
from deltallava_jax.data.llava_json import LlavaJson
from deltallava_jax.data.pipeline import Rows, elements
from tests import golden

RECORDS, EACH = 80, 2
VISION = VisionConfig(image_size=32, patch_size=8)
# What of a record is wrong by the name of the fault that the check gives it.
FOUND_AS = {
    "malformed": ("empty_turn",),
    "outside": ("outside",),
    "markers": ("extra_marker",),
    "missing": ("missing",),
    "unreadable": ("truncated", "empty_file", "bomb", "not_an_image"),
}
READ_AS_TEXT = ("empty_turn", "outside", "extra_marker")  # what shows before an image is read


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DELTALLAVA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llava")
    planted = make(folder, RECORDS, each=EACH)
    assert all(planted[fault] == EACH for fault in FAULTS) and sum(planted.values()) == RECORDS
    return folder


@pytest.fixture(scope="module")
def source(folder):
    return LlavaJson(folder / "data.json", folder)


@pytest.fixture(scope="module")
def llama():
    return tokens.load(golden.DATA / "llama_tokenizer")


def epoch(source, llama, workers):
    """All elements of one epoch of packed rows."""
    cfg = DataConfig(dataset="llava", json=("x",), images="x", rows=4, row_length=2048, aspect="pad")
    rows = Rows(source, llama, cfg, VISION)
    plan = rows.plan((16,), 0)
    return plan, list(elements(rows, plan, 0, plan.steps_for(1), workers=workers))


def test_the_check_counts_what_was_planted(source, llama):
    rows = Rows(source, llama, DataConfig(), VISION)
    report = check(source, rows.plan((16,), 0), workers=2)
    expected = {kind: EACH * len(FOUND_AS.get(kind, ())) for kind in report["faults"]}
    assert report["faults"] == expected
    assert report["usable"] == RECORDS - EACH * len(FAULTS) and report["cut"] == EACH
    assert sum(report["histogram"].values()) == report["usable"]
    text = format_report(report)
    assert "images that are missing" in text and "nothing is left out" not in text


def test_an_epoch_on_two_workers_loses_just_the_planted_records(folder, source, llama):
    plan, stream = epoch(source, llama, workers=2)
    faults = [*map(str, plan.faults.values()), *(fault for element in stream for fault in element.faults)]
    assert len(faults) == EACH * len(FAULTS) and len(plan.faults) == EACH * len(READ_AS_TEXT)
    seen = sum(int(element.batch.segments.max(axis=1).sum()) for element in stream)
    assert seen == RECORDS - len(faults)
    entries = json.loads((folder / "data.json").read_text())
    images = sum(len([e["image"]] if isinstance(e.get("image"), str) else e.get("image", [])) for e in entries)
    placed = sum(int((e.batch.image_positions < e.batch.tokens.shape[1]).sum()) for e in stream)
    assert placed == images - EACH * len(FAULTS)  # each faulty record has one image


def test_array_records_give_the_same_rows(source, llama, tmp_path, monkeypatch):
    monkeypatch.setattr(array_record, "SHARD", 30)
    made = build(source, tmp_path / "built", workers=2)
    assert made["records"] == RECORDS - EACH * len(FAULTS)
    found = collections.Counter(kind for kind, _ in made["faults"])
    assert found == {kind: EACH * len(planted) for kind, planted in FOUND_AS.items()}
    shards = sorted((tmp_path / "built").glob("*.array_record-*"))
    times = [shard.stat().st_mtime_ns for shard in shards]
    assert len(shards) == 3
    assert build(source, tmp_path / "built", workers=2) == made  # nothing is written twice
    assert [shard.stat().st_mtime_ns for shard in shards] == times
    stored = ArrayRecords(tmp_path / "built")
    from_json = {source[i].id: source[i] for i in range(RECORDS) if _readable(source, i)}
    assert len(stored) == made["records"]
    counts = collections.Counter()
    for index in range(len(stored)):
        record = stored[index]
        original = from_json[record.id]
        assert record.conversation == original.conversation
        assert [bytes(image) for image in record.images] == [path.read_bytes() for path in original.images]
        counts[record.id] += 1
    assert set(counts.values()) == {1}
    plan, stream = epoch(stored, llama, workers=2)
    assert not plan.faults and not any(element.faults for element in stream)
    assert sum(int(element.batch.segments.max(axis=1).sum()) for element in stream) == made["records"]
    rows = Rows(stored, llama, DataConfig(aspect="pad"), VISION)
    same = Rows(source, llama, DataConfig(aspect="pad"), VISION)
    first = next(i for i in range(RECORDS) if source[i].id == stored[0].id)
    (a, _), (b, _) = rows.build([[0]], 2048, 2), same.build([[first]], 2048, 2)
    np.testing.assert_array_equal(a.images, b.images)
    np.testing.assert_array_equal(a.tokens, b.tokens)


def _readable(source, index):
    try:
        source[index]
    except ValueError:
        return False
    return True

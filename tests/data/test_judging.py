"""Records whose text is unusable are left out before step 1, the same in training and in data check."""

import dataclasses
import hashlib
import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from deltallava_jax.config import DataConfig, VisionConfig
from deltallava_jax.data import cache as kept
from deltallava_jax.data import lengths
from deltallava_jax.data.check import check
from deltallava_jax.data.conversation import IMAGE
from deltallava_jax.data.llava_json import LlavaJson
from deltallava_jax.data.packing import GroupedPlan, PackPlan
from deltallava_jax.data.pipeline import Rows, elements
from deltallava_jax.errors import BadSample, ConfigError, TooManyFaults
from deltallava_jax.training import faults

TOWER = VisionConfig(image_size=32, patch_size=8)
CFG = DataConfig(template="brief", rows=4, row_length=512, workers=0)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DELTALLAVA_CACHE", str(tmp_path / "cache"))
    Image.new("RGB", (32, 32), "red").save(tmp_path / "red.png")
    return tmp_path / "cache"


def record(number: int, images: int = 1, question: str = "which number?", answer: str | None = "seven") -> dict:
    turns = [{"from": "human", "value": f"{IMAGE}\n" * images + question}]
    turns += [{"from": "gpt", "value": answer}] if answer else []
    return {"id": str(number), "image": ["red.png"] * images, "conversations": turns}


def rows_of(folder, records: list, tokenizer, **changes) -> Rows:
    (folder / "data.json").write_text(json.dumps(records))
    cfg = dataclasses.replace(CFG, **changes)
    return Rows(LlavaJson(folder / "data.json", folder), tokenizer, cfg, TOWER)


def counts(plan, epochs: int = 1) -> Counter:
    steps = (plan.step(number) for number in range(plan.steps_for(epochs)))
    return Counter(record for step in steps for row in step.rows for record in row)


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("packed", [True, False])
def test_few_broken_records_of_many_end_nothing(tmp_path, tokenizer, seed, packed):
    records = [record(number, images=number % 2) for number in range(1208)]
    broken = (3, 400, 401, 1000, 1207)
    for index in broken:
        records[index]["conversations"] = "?"
    plan = rows_of(tmp_path, records, tokenizer, packed=packed).plan((16,), seed)
    assert sorted(plan.faults) == list(broken) and not set(plan.records) & set(broken)
    assert counts(plan) == Counter(set(range(1208)) - set(broken))  # the numbers stay those of the source
    (line,) = faults.validate_plan(plan, 0.01, tmp_path)
    listed = tmp_path / "faults.txt"
    assert line.startswith("5 of 1,208 records cannot be used and are left out: 5 malformed records or turns")
    assert [f"data.json#{index} " in text for index, text in zip(broken, listed.read_text().splitlines(), strict=True)]
    counted = {}
    for step in range(1, plan.steps_for(2) + 1):  # as the loop counts
        faults.count_step(
            0.01, tmp_path, counted, plan, step, {"conversations": sum(map(len, plan.step(step - 1).rows))}
        )
    assert counted == {"epoch": 1, "records": 1203, "faults": 0}
    with pytest.raises(TooManyFaults, match="5 of 1,208 .* in .*faults.txt. More than data.max_bad_fraction=0.004"):
        faults.validate_plan(plan, 0.004, tmp_path)


@pytest.mark.parametrize("packed", [True, False])
def test_a_record_with_more_images_than_a_row_holds_is_left_out_alone(tmp_path, tokenizer, packed):
    records = [record(number) for number in range(301)]
    records[7] = record(7, images=40)
    rows = rows_of(tmp_path, records, tokenizer, packed=packed)
    plan = rows.plan((16,), 0)
    assert list(plan.faults) == [7] and plan.faults[7].kind == "beyond"
    assert str(plan.faults[7]) == "data.json#7 (id '7'): 40 images, more than the 34 of 16 tokens that a row holds"
    stream = elements(rows, plan, 0, plan.steps_for(1), workers=0)
    assert sum(int(element.batch.segments.max(axis=1).sum()) for element in stream) == 300
    report = check(rows.source, plan, 1)
    assert report["usable"] == 300 and report["faults"]["beyond"] == 1
    assert report["examples"]["beyond"] == [str(plan.faults[7])]


def test_what_a_row_is_too_short_for_is_the_same_fault_before_training_and_in_a_row(tmp_path, tokenizer):
    long = "which number is it? " * 30
    records = [record(number) for number in range(300)]
    records[0] = record(0, question=long)  # the answer is truncated
    records[1]["conversations"][0]["value"] = f"{long}{IMAGE}{IMAGE}"  # an image is truncated
    records[1]["image"] *= 2
    records[2] = record(2, images=0, question=long)
    records[3] = record(3, answer=None)
    records[4] = record(4, answer="seven " * 400)  # cut, but of use
    rows = rows_of(tmp_path, records, tokenizer, row_length=128, images_per_row=2)
    plan = rows.plan((16,), 0)
    text = plan.text_capacity.min()
    assert text == 128 - 2 * 15 and plan.text_capacity[2] == 128
    kinds = {index: error.kind for index, error in plan.faults.items()}
    assert kinds == {0: "unsupervised", 1: "beyond", 2: "unsupervised", 3: "unsupervised"} and plan.cut == 1
    for index in range(4):
        with pytest.raises(BadSample, match=f"data.json#{index} ") as caught:
            rows.read(index, plan.text_capacity[index])
        assert caught.value.kind == kinds[index]
        assert rows.build([[index]], int(plan.text_capacity[index]), 2)[1] == (str(caught.value),)
    stream = list(elements(rows, plan, 0, plan.steps_for(1), workers=0))
    assert not any(element.faults for element in stream)
    found = check(rows.source, plan, 1)["faults"]
    assert {kind: count for kind, count in found.items() if count} == Counter(kinds.values())


def test_a_data_set_of_nothing_but_broken_records_is_refused(tmp_path, tokenizer):
    records = [record(number, answer=None) for number in range(3)]
    with pytest.raises(TooManyFaults, match="none of the 3 records is usable: 3 .*; the first: data.json#0 "):
        rows_of(tmp_path, records, tokenizer).plan((16,), 0)
    with pytest.raises(ConfigError, match="the data set has no records"):
        rows_of(tmp_path, [], tokenizer).plan((16,), 0)
    with pytest.raises(ConfigError, match="data.row_length=512 cannot hold 1 images of 576 tokens"):
        rows_of(tmp_path, [record(0)], tokenizer).plan((576,), 0)


@pytest.mark.parametrize(("kind", "digest"), [(PackPlan, "9a036306e8d04592"), (GroupedPlan, "061c4d0d24231ae7")])
def test_plans_of_sound_data_stay_what_they_were(kind, digest):
    """Runs that were started with an earlier version resume to the bit."""
    rng = np.random.default_rng(0)
    tokens, images = rng.integers(8, 160, 400), rng.integers(0, 4, 400)
    plan = kind(tokens, images, budgets=(64, 16), rows=3, row_length=700, seed=5)
    steps = [plan.step(number) for number in range(plan.steps_for(2))]
    about = [(step.budget, step.text, step.images, [list(map(int, row)) for row in step.rows]) for step in steps]
    assert hashlib.sha256(repr(about).encode()).hexdigest()[:16] == digest


def test_what_other_code_has_counted_is_counted_again(tmp_path, tokenizer, cache, monkeypatch):
    rows = rows_of(tmp_path, [record(0), record(1)], tokenizer)
    expected = rows.lengths().tokens
    (file,) = cache.glob("lengths/*.npz")
    (index,) = cache.glob("records/*.npz")
    spans = np.load(index)["spans"]
    np.savez(file, tokens=[5, 5], images=[1, 1], notes=[0] * len(lengths.NOTES))
    np.savez(index, spans=spans[:1], fingerprint="x")
    assert rows.lengths().tokens.tolist() == [5, 5] and len(LlavaJson(tmp_path / "data.json", tmp_path)) == 1
    monkeypatch.setattr(kept, "version", lambda: "of another version")
    assert rows.lengths().tokens.tolist() == expected.tolist()
    assert len(LlavaJson(tmp_path / "data.json", tmp_path)) == 2


def test_processes_that_write_one_file_at_the_same_time_leave_it_whole(cache):
    """Those of several hosts may have the same number."""
    file = cache / "lengths" / "x.npz"
    with kept.writing(file) as one, kept.writing(file) as other:
        one.write_text("of one")
        other.write_text("of other")
    assert file.read_text() == "of one" and list(file.parent.iterdir()) == [file]
    with pytest.raises(KeyError), kept.writing(file) as cut:
        cut.write_text("of o")
        raise KeyError
    assert file.read_text() == "of one" and list(file.parent.iterdir()) == [file]


def test_the_version_is_of_the_code_itself(tmp_path):
    for name, code in (("one", "count = len"), ("other", "count = len  # ids")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "counting.py").write_text(code)
    assert kept.version(tmp_path / "one") != kept.version(tmp_path / "other")


def test_repairs_of_records_are_reported(tmp_path, tokenizer):
    records = [record(number) for number in range(10)]
    records[2]["conversations"][0]["value"] = "which number?"
    rows = rows_of(tmp_path, records, tokenizer)
    for _ in range(2):  # measured, then from the cache
        plan = rows.plan((16,), 0)
        (line,) = faults.validate_plan(plan, 0.01, tmp_path)
        assert line == "1 records without image markers; their images go before the first question"
    assert check(rows.source, plan, 1)["notes"]["unmarked"] == 1 and not (tmp_path / "faults.txt").exists()

"""LLaVA's files: random access whatever the text; cached indices; broken files are refused, broken records reported."""

import json
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from deltallava_jax.config import DataConfig
from deltallava_jax.data import array_record, lengths, llava_json, tokens
from deltallava_jax.data.conversation import IMAGE, TEMPLATES, read_turns, tokenize
from deltallava_jax.data.llava_json import LlavaJson, record_spans
from deltallava_jax.data.records import Mixture
from deltallava_jax.data.sources import training_source
from deltallava_jax.errors import BadSample, ConfigError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DELTALLAVA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def record(number: int, **changes) -> dict:
    turns = [("human", f'{IMAGE}\nwhat "is" {{{number}}}?'), ("gpt", f"a\\b {number} ]}}")]
    conversation = [{"from": speaker, "value": value} for speaker, value in turns]
    return {"id": str(number), "image": f"coco/{number}.jpg", "conversations": conversation} | changes


def write(folder, records, name="data.json", **options):
    (folder / name).write_text(json.dumps(records, **options))
    return folder / name


TEXT = st.text(st.sampled_from('"\\{}[]:, \nu00e9é🟦a'), max_size=12)
VALUES = st.recursive(TEXT | st.integers(), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner))


@settings(max_examples=150, deadline=None)
@given(
    records=st.lists(st.dictionaries(TEXT, VALUES, max_size=3), max_size=5),
    indent=st.sampled_from([None, 1]),
    ascii=st.booleans(),
    lines=st.booleans(),
    chunk=st.integers(1, 40),
)
def test_every_record_is_at_its_span(records, indent, ascii, lines, chunk):
    if lines:
        text = "".join(json.dumps(one, ensure_ascii=ascii) + "\n" for one in records)
    else:
        text = json.dumps(records, indent=indent, ensure_ascii=ascii)
    data = np.frombuffer(text.encode(), np.uint8)
    before, llava_json.CHUNK = llava_json.CHUNK, chunk
    try:
        spans = record_spans(data)
    finally:
        llava_json.CHUNK = before
    assert [json.loads(data[a:b].tobytes()) for a, b in spans] == records


@pytest.mark.parametrize("lines", [False, True])
def test_records_and_their_images(tmp_path, lines):
    records = [record(0), record(1, image=["gqa/a.jpg", "gqa/b.jpg"]), record(2)]
    del records[2]["image"]
    file = write(tmp_path, records, indent=2)
    if lines:
        file.write_text("\n".join(map(json.dumps, records)))
    source = LlavaJson(file, tmp_path / "images")
    assert len(source) == 3
    for again in (source, pickle.loads(pickle.dumps(source))):  # as the workers get it
        assert [again[i].conversation for i in range(3)] == [one["conversations"] for one in records]
        assert [str(path) for path in again[0].images] == [str(tmp_path / "images/coco/0.jpg")]
        assert len(again[1].images) == 2 and again[2].images == ()
        assert again[0].id == "data.json#0 (id '0')"
    assert list(source.texts())[:2] == ['<image>\nwhat "is" {0}?', "a\\b 0 ]}"]
    assert len(pickle.dumps(source)) < 1000


def test_a_changed_file_is_indexed_again(tmp_path, cache):
    file = write(tmp_path, [record(0)])
    first = LlavaJson(file, tmp_path)
    (kept,) = cache.glob("records/*")
    before = kept.stat().st_mtime_ns
    assert len(LlavaJson(file, tmp_path)) == 1 and kept.stat().st_mtime_ns == before
    write(tmp_path, [record(0), record(1)])
    second = LlavaJson(file, tmp_path)
    assert len(second) == 2 and second.fingerprint != first.fingerprint


@pytest.mark.parametrize(
    "text, words",
    [
        ('[{"id": 1}, {"id"', "is truncated"),
        ('[{"id": 1}, {"id": 2', "is truncated"),
        ('{"id": 1}\n{"id": "}', "is truncated: the last record is incomplete"),
        ("", r"begins with neither \[ nor {"),
        ("id,image\n1,2", r"begins with neither \[ nor {"),
    ],
)
def test_a_file_that_is_no_list_of_records_is_refused(tmp_path, text, words):
    (tmp_path / "data.json").write_text(text)
    with pytest.raises(ConfigError, match=words):
        LlavaJson(tmp_path / "data.json", tmp_path)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match="nothing.json does not exist"):
        LlavaJson(tmp_path / "nothing.json", tmp_path)
    with pytest.raises(ConfigError, match="needs data.json"):
        DataConfig(dataset="llava")


@pytest.mark.parametrize("image", ["../a.jpg", "a/../../b.jpg", "/etc/passwd", "..\\a.jpg", "a\0.jpg"])
def test_an_image_outside_the_root_is_refused(tmp_path, image):
    source = LlavaJson(write(tmp_path, [record(0, image=image)]), tmp_path)
    with pytest.raises(BadSample, match="lies outside the image root"):
        source[0]


@pytest.mark.parametrize(
    "changes, words",
    [(dict(image=3), '"image" is'), (dict(image=[1]), '"image" is'), (dict(conversations="no"), "no list")],
)
def test_a_malformed_record_is_refused_by_name(tmp_path, changes, words):
    source = LlavaJson(write(tmp_path, [record(0, **changes), record(1)]), tmp_path)
    with pytest.raises(BadSample, match=f"data.json#0 .*{words}"):
        source[0]
    assert source[1].images


def test_lengths_are_those_of_the_tokens_and_are_kept(tmp_path, cache, tokenizer, monkeypatch):
    records = [record(number, conversations=record(number)["conversations"] * (number % 3)) for number in range(30)]
    records[4]["image"] = "../out.jpg"
    records[5]["conversations"][0]["value"] = f"{IMAGE} or {IMAGE}?"  # two markers, one image
    source = LlavaJson(write(tmp_path, records), tmp_path)
    monkeypatch.setattr(lengths, "BATCH", 7)
    for template in TEMPLATES.values():
        measured = lengths.measure(source, template, tokenizer)
        tokens, images = measured.tokens, measured.images
        for index in range(30):
            try:
                expected = tokenize(read_turns(source[index].conversation, 1), template, tokenizer)
                whole = True
            except BadSample:
                whole = False
            assert (tokens[index], images[index]) == ((len(expected.ids), 1) if whole else (0, 0))
        assert (tokens > 0).sum() == 9
    assert len(list(cache.glob("lengths/*.npz"))) == len(TEMPLATES)
    monkeypatch.setattr(lengths, "_measure", None)
    np.testing.assert_array_equal(lengths.measure(source, template, tokenizer).tokens, tokens)


def test_a_mixture_repeats_each_file_by_its_weight(tmp_path):
    a = write(tmp_path, [record(number) for number in range(10)], "a.json")
    b = write(tmp_path, [record(number) for number in range(100, 140)], "b.json")
    cfg = DataConfig(dataset="llava", json=(str(a), str(b)), images=str(tmp_path), weights=(2.0, 0.5))
    source = pickle.loads(pickle.dumps(training_source(cfg)))
    assert isinstance(source, Mixture) and len(source) == 20 + 20
    ids = [source[index].id for index in range(40)]
    assert sorted(ids.count(name) for name in set(ids)) == [1] * 20 + [2] * 10
    assert [source[i].id for i in range(40)] == [training_source(cfg)[i].id for i in range(40)]
    plain = training_source(DataConfig(dataset="llava", json=(str(a),), images=str(tmp_path)))
    assert isinstance(plain, LlavaJson) and source.fingerprint.startswith(plain.fingerprint)


# ------------------------------------------------------------------ what a record may be


def test_an_image_below_the_root_is_read_however_its_path_is_written(tmp_path, monkeypatch):
    root, elsewhere = tmp_path / "images", tmp_path / "elsewhere"
    for folder in (root / "coco", root / "..foo", elsewhere):
        folder.mkdir(parents=True)
        (folder / "a.jpg").write_bytes(b"")
    (root / "gqa").symlink_to(elsewhere)  # e.g. another disk
    (tmp_path / "link").symlink_to(root)
    paths = ["coco/a.jpg", "..foo/a.jpg", "coco/../..foo/a.jpg", "gqa/a.jpg", f"{root}/coco/a.jpg", f"{root}/gqa/a.jpg"]
    paths += [f"{root}/../images/coco/a.jpg", f"{tmp_path}/link/coco/a.jpg"]
    file = write(tmp_path, [record(number, image=image) for number, image in enumerate(paths)])
    monkeypatch.chdir(tmp_path)
    for written in (root, tmp_path / "link", "images", "link"):
        source = LlavaJson(file, written)
        assert [source[index].images[0].is_file() for index in range(len(paths))] == [True] * len(paths)


@pytest.mark.parametrize(
    "image", ["/{}s/a.jpg", "/{}/../a.jpg", "..", "gs://bucket/a.jpg", "/{}/../elsewhere/a.jpg", "/\ud83d.jpg"]
)
def test_an_image_outside_the_root_stays_a_fault(tmp_path, image):
    source = LlavaJson(
        write(tmp_path, [record(0, image=image.format(str(tmp_path / "images").lstrip("/")))]), tmp_path / "images"
    )
    with pytest.raises(BadSample, match="lies outside the image root") as caught:
        source[0]
    assert caught.value.kind == "outside"


def test_paths_below_a_root_elsewhere(tmp_path, monkeypatch):
    source = LlavaJson(write(tmp_path, [record(0)]), "gs://bucket/data")
    within = lambda image: str(source._below(image, "record"))
    assert within("coco/a.jpg") == within("gs://bucket/data/coco/a.jpg") == "gs://bucket/data/coco/a.jpg"
    for image in ("gs://bucket/a.jpg", "gs://bucket/data/../a.jpg", "gs://bucket/data2/a.jpg", "/bucket/data/a.jpg"):
        with pytest.raises(BadSample, match="lies outside"):
            within(image)


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        (dict(image=None, video="a.mp4"), "video", "has a video; videos are not supported"),
        (dict(videos=["a.mp4"]), "video", "has a video; videos are not supported"),
        (dict(image=None, images=["a.jpg"]), "malformed", 'has "images"; expected "image"'),
    ],
)
def test_what_a_record_shows_beside_images_is_refused_by_name(tmp_path, changes, kind, words):
    source = LlavaJson(write(tmp_path, [record(0, **changes), record(1, video=None)]), tmp_path)
    with pytest.raises(BadSample, match=words) as caught:
        source[0]
    assert caught.value.kind == kind and source[1].images


def test_a_record_without_end_of_depth_is_a_fault(tmp_path):
    (tmp_path / "data.json").write_text('[{"id": ' + "[" * 100_000 + "]" * 100_000 + "}]")
    with pytest.raises(BadSample, match="data.json#0"):
        LlavaJson(tmp_path / "data.json", tmp_path)[0]


ODD = [["hi"], [3, None], [{"from": "human"}], [{"from": "human", "value": 7}, {"from": "gpt", "value": "seven"}]]


def test_turns_of_any_form_are_the_same_faults_in_both_formats(tmp_path, monkeypatch):
    pytest.importorskip("tensorflow_datasets")
    image = tmp_path / "0.png"
    Image.new("RGB", (4, 4)).save(image)
    records = [record(number, image="0.png", conversations=turns) for number, turns in enumerate(ODD)]
    source = LlavaJson(write(tmp_path, [*records, record(9, image="0.png")]), tmp_path)
    built = tmp_path / "built"
    built.mkdir()
    monkeypatch.setattr(array_record, "examine", lambda source, index: (source[index],))  # an older folder holds them
    array_record._write_shard((source, built, 0, 1))
    array_record._write_metadata(built, [json.loads(array_record._report(built, 0, 1).read_text())])
    (built / "source.json").write_text("{}")
    for each in (source, array_record.ArrayRecords(built)):
        assert list(each.texts()) == ["seven", '<image>\nwhat "is" {9}?', "a\\b 9 ]}"]
        for index in range(len(ODD)):
            with pytest.raises(BadSample, match="turn 0 .*type"):
                read_turns(each[index].conversation, 1)
        tokens.train(each.texts(), 300)

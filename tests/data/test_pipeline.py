"""easy-VQA as records, rows of them as batches, the element stream, and records that cannot be used."""

import dataclasses
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from deltallava_jax.config import ASPECTS, DataConfig, VisionConfig
from deltallava_jax.data import easy_vqa
from deltallava_jax.data.conversation import IMAGE
from deltallava_jax.data.easy_vqa import EasyVqa
from deltallava_jax.data.images import load_image
from deltallava_jax.data.packing import PackPlan
from deltallava_jax.data.pipeline import Element, Rows, elements
from deltallava_jax.data.records import Record
from deltallava_jax.data.sources import training_source
from deltallava_jax.errors import BadSample, ConfigError

BRIEF = DataConfig(template="brief", independent_rounds=True)
SIZE = 64
TOWER = VisionConfig(image_size=SIZE)


@dataclass
class Records:
    """A source of given records."""

    records: list[Record]

    def __len__(self):
        return len(self.records)

    def __getitem__(self, index):
        return self.records[index]

    def texts(self):
        return [turn["value"] for record in self.records for turn in record.conversation]


def pixels_of(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def pairs_of(record: Record) -> list[tuple[str, str]]:
    """(question, answer) of a record, markers left out."""
    values = [turn["value"].replace(IMAGE, "").strip() for turn in record.conversation]
    return list(zip(values[::2], values[1::2], strict=True))


def read_back(ids, loss_mask, tokenizer) -> list[tuple[str, str]]:
    """(question, answer) pairs of one conversation's tokens in the brief template."""
    edges = np.flatnonzero(np.diff(loss_mask.astype(int), prepend=0, append=0))
    starts = [0, *edges[1::2]][: len(edges) // 2]
    return [
        (tokenizer.decode(ids[start:begin]), tokenizer.decode(ids[begin:end]))
        for start, begin, end in zip(starts, edges[::2], edges[1::2], strict=False)
    ]


# ------------------------------------------------------------------ easy-VQA


@pytest.mark.parametrize(("split", "images", "count"), [("train", 4000, 38575), ("test", 1000, 9673)])
def test_easy_vqa_is_whole(split, images, count):
    questions = easy_vqa.questions(split)
    assert len(questions) == count
    assert {question.image for question in questions} == set(range(images))
    assert all(easy_vqa.image_path(split, image).is_file() for image in (0, images - 1))
    kinds = {question.answer: question.type for question in questions}
    assert len(kinds) == 13
    assert {answer for answer, kind in kinds.items() if kind == "shape"} == {"circle", "rectangle", "triangle"}
    assert {answer for answer, kind in kinds.items() if kind == "yes/no"} == {"yes", "no"}
    assert Counter(kinds.values())["color"] == 8


@pytest.mark.parametrize("turns", [0, 3])
def test_every_question_is_in_one_record(turns):
    source = EasyVqa("test", turns)
    records = [source[index] for index in range(len(source))]
    assert len({record.id for record in records}) == len(records)
    asked = Counter()
    for record in records:
        pairs = pairs_of(record)
        assert turns == 0 or len(pairs) <= turns
        (image,) = record.images
        asked.update((question, answer, int(image.stem)) for question, answer in pairs)
        assert [IMAGE in turn["value"] for turn in record.conversation] == [True] + [False] * (2 * len(pairs) - 1)
    assert asked == Counter((q.question, q.answer, q.image) for q in easy_vqa.questions("test"))
    assert len(records) == 1000 if turns == 0 else len(records) > 1000


def test_training_source_by_name():
    assert len(training_source(DataConfig(turns=1))) == 38575
    assert len(training_source(DataConfig())) == 4000
    with pytest.raises(ConfigError, match="data.dataset is 'coco'; known: easy_vqa"):
        training_source(DataConfig(dataset="coco"))


# ------------------------------------------------------------------ rows


@pytest.fixture(scope="module")
def few() -> EasyVqa:
    source = EasyVqa("train")
    source.records = source.records[:60]
    return source


@pytest.fixture(scope="module")
def rows(few, tokenizer) -> Rows:
    return Rows(few, tokenizer, BRIEF, TOWER)


def make_plan(rows: Rows, budgets=(16,), count=4, row_length=512) -> PackPlan:
    lengths = rows.lengths()
    return PackPlan(lengths.tokens, lengths.images, budgets=budgets, rows=count, row_length=row_length)


def test_lengths_are_those_of_the_tokens(rows, few):
    lengths = rows.lengths()
    assert lengths.tokens.shape == lengths.images.shape == (60,) and (lengths.images == 1).all()
    assert [len(rows.read(i, 512)[1].ids) for i in (0, 31, 59)] == lengths.tokens[[0, 31, 59]].tolist()


def test_a_batch_holds_its_records_one_after_the_other(rows, few, tokenizer):
    chosen = [[3, 1, 7], [5], []]
    text, capacity = 600, 4
    batch, faults = rows.build(chosen, text, capacity)
    assert faults == ()
    assert batch.tokens.shape == batch.loss_mask.shape == batch.segments.shape == (3, text)
    assert batch.images.shape == (3, capacity, SIZE, SIZE, 3) and batch.images.dtype == np.uint8
    for row, records in enumerate(chosen):
        segments, positions = batch.segments[row], batch.image_positions[row]
        live = int((segments > 0).sum())
        assert (segments[:live] > 0).all() and not segments[live:].any()
        assert set(np.diff(segments[:live])) <= {0, 1} and set(segments[:live]) == set(range(1, len(records) + 1))
        assert not batch.tokens[row, live:].any() and not batch.loss_mask[row, live:].any()
        assert (np.diff(positions[: len(records)]) > 0).all() and (positions[len(records) :] == text).all()
        np.testing.assert_array_equal(np.flatnonzero(batch.tokens[row, :live] == 0), positions[: len(records)])
        assert not batch.images[row, len(records) :].any()
        for number, index in enumerate(records, start=1):
            inside = segments == number
            ids, mask = batch.tokens[row, inside], batch.loss_mask[row, inside]
            assert ids[0] == tokenizer.bos and segments[positions[number - 1]] == number
            assert read_back(ids, mask, tokenizer) == pairs_of(few[index])
            np.testing.assert_array_equal(batch.images[row, number - 1], pixels_of(few[index].images[0]))
            np.testing.assert_array_equal(batch.branches[row, inside], rows.read(index, text)[1].rounds)
        assert not batch.branches[row, live:].any()


def test_rounds_that_see_each_other_have_no_branches(few, tokenizer, rows):
    batch, _ = Rows(few, tokenizer, dataclasses.replace(BRIEF, independent_rounds=False), TOWER).build([[3, 1]], 400, 2)
    branched, _ = rows.build([[3, 1]], 400, 2)
    assert batch.branches is None and branched.branches.max() > 1
    np.testing.assert_array_equal(batch.tokens, branched.tokens)
    np.testing.assert_array_equal(batch.loss_mask, branched.loss_mask)


def test_a_conversation_longer_than_the_row_is_cut(rows, few):
    _, whole = rows.read(0, 20)
    batch, faults = rows.build([[0]], 20, 1)
    assert faults == () and len(whole.ids) > 20
    np.testing.assert_array_equal(batch.tokens[0], whole.ids[:20])
    np.testing.assert_array_equal(batch.loss_mask[0], whole.loss_mask[:20])
    np.testing.assert_array_equal(batch.branches[0], whole.rounds[:20])
    assert (batch.segments == 1).all()


def test_an_unknown_template_names_the_known_ones(few, tokenizer):
    with pytest.raises(ConfigError, match="data.template is 'alpaca'; known: vicuna_v1, plain, chatml, llama_3, brief"):
        Rows(few, tokenizer, DataConfig(template="alpaca"), TOWER)


def test_independent_rounds_need_a_template_without_a_prefix(few, tokenizer):
    with pytest.raises(ConfigError, match="independent_rounds needs a template without a question prefix"):
        Rows(few, tokenizer, DataConfig(template="vicuna_v1", independent_rounds=True), TOWER)


# ------------------------------------------------------------------ the element stream


def assert_equal(found: list[Element], expected: list[Element]):
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert (a.budget, a.faults) == (b.budget, b.faults)
        for field in dataclasses.fields(a.batch):
            np.testing.assert_array_equal(getattr(a.batch, field.name), getattr(b.batch, field.name), field.name)


@pytest.fixture(scope="module")
def plan(rows) -> PackPlan:
    return make_plan(rows, budgets=(16, 4))


@pytest.fixture(scope="module")
def stream(rows, plan) -> list[Element]:
    """Two epochs, made in this process."""
    return list(elements(rows, plan, 0, plan.steps_for(2), workers=0))


def test_elements_are_the_plans_steps(rows, plan, stream):
    assert len(stream) == plan.steps_for(2) >= 4
    assert {element.budget for element in stream} == {16, 4}
    for number, element in enumerate(stream):
        step = plan.step(number)
        text, images = plan.capacities[step.budget]
        assert element.budget == step.budget
        assert element.batch.tokens.shape == (4, text) and element.batch.image_positions.shape == (4, images)
        assert element.batch.segments.max(axis=1).tolist() == [len(row) for row in step.rows]


def test_steps_are_fractions_of_their_epochs(plan):
    assert [plan.epochs_at(plan.steps_for(epochs)) for epochs in (1, 2, 3)] == [1, 2, 3]
    assert plan.epochs_at(1) == 1 / plan.steps_for(1)
    assert plan.epochs_at(plan.steps_for(1) + 1) == 1 + 1 / (plan.steps_for(2) - plan.steps_for(1))


def test_an_epoch_asks_every_question_once(few, plan, stream, tokenizer):
    asked = Counter()
    for element in stream[: plan.steps_for(1)]:
        for ids, mask in zip(element.batch.tokens, element.batch.loss_mask, strict=True):
            asked.update(read_back(ids, mask, tokenizer))
    assert asked == Counter(pair for index in range(len(few)) for pair in pairs_of(few[index]))


def test_starting_at_a_step_equals_skipping_to_it(rows, plan, stream):
    for start in (1, plan.steps_for(1), len(stream) - 1):
        assert_equal(list(elements(rows, plan, start, len(stream), workers=0)), stream[start:])


def test_a_worker_process_makes_the_same_elements(rows, plan, stream):
    assert_equal(list(elements(rows, plan, 1, 4, workers=1)), stream[1:4])


def test_each_process_builds_its_rows_and_reports_the_faults_of_those_it_holds_first(folder, tokenizer):
    folder[5].images[0].unlink()
    rows = Rows(folder, tokenizer, BRIEF, TOWER)
    plan = make_plan(rows, row_length=128)
    (whole,) = elements(rows, plan, 0, 1, workers=0)
    first, second = (
        next(elements(rows, plan, 0, 1, workers=0, held=held))
        for held in ({0: True, 2: True, 3: True}, {1: True, 2: False, 3: False})
    )
    for part, held in ((first, [0, 2, 3]), (second, [1, 2, 3])):
        assert_equal([Element(part.batch, 1, ())], [Element(jax.tree.map(lambda x: x[held], whole.batch), 1, ())])  # noqa: B023
    assert len(whole.faults) == 1 and sorted(first.faults + second.faults) == sorted(whole.faults)


@pytest.mark.parametrize("aspect", ASPECTS)
def test_images_become_square_by_data_aspect_in_the_towers_colour(folder, tokenizer, aspect):
    wide = folder[0].images[0]
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (40, 100, 3), dtype=np.uint8)).save(wide)
    spoil(folder, 1, images=(wide.read_bytes(),))
    tower = VisionConfig(image_size=SIZE, image_mean=(0.9, 0.5, 0.1))
    batch, faults = Rows(folder, tokenizer, dataclasses.replace(BRIEF, aspect=aspect), tower).build([[0, 1]], 60, 2)
    assert faults == ()
    for image in batch.images[0]:
        np.testing.assert_array_equal(image, load_image(wide, SIZE, aspect, (229, 127, 25)))


# ------------------------------------------------------------------ holes


def as_turns(*values: str) -> list[dict]:
    return [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]


@pytest.fixture()
def folder(tmp_path) -> Records:
    """Eight records as LLaVA's JSON has them, each with a different image."""
    rng = np.random.default_rng(0)
    entries = []
    for number in range(8):
        Image.fromarray(rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)).save(tmp_path / f"{number}.png")
        conversation = as_turns(f"{IMAGE}\nwhich number is it?", f"number {number}", "sure?", "yes")
        entries.append({"id": f"r{number}", "image": f"{number}.png", "conversations": conversation})
    (tmp_path / "data.json").write_text(json.dumps(entries))
    entries = json.loads((tmp_path / "data.json").read_text())
    return Records([Record(e["id"], (tmp_path / e["image"],), e["conversations"]) for e in entries])


def spoil(folder: Records, index: int, **changes):
    folder.records[index] = dataclasses.replace(folder.records[index], **changes)


def test_a_bad_record_is_a_hole_with_its_reason_and_its_neighbours_stay(folder, tokenizer):
    damaged = folder[2].images[0]
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 0xFF
    damaged.write_bytes(content)
    folder[5].images[0].unlink()
    spoil(folder, 3, conversation=as_turns(f"{IMAGE}{IMAGE} which?", "one"))
    spoil(folder, 6, conversation=as_turns("a", "b")[:1] * 2)
    rows = Rows(folder, tokenizer, BRIEF, TOWER)

    batch, faults = rows.build([[0, 2, 1], [3, 4], [5, 6], [7]], 60, 3)
    reasons = dict(fault.split(": ", 1) for fault in faults)
    assert list(reasons) == ["r2", "r3", "r5", "r6"]
    assert str(damaged) in reasons["r2"] and str(folder[5].images[0]) in reasons["r5"]
    assert reasons["r3"] == "2 <image> markers, but 1 images"
    assert "turn 1 is from 'human'" in reasons["r6"]
    expected, none = rows.build([[0, 1], [4], [], [7]], 60, 3)
    assert none == ()
    assert_equal([Element(batch, 1, ())], [Element(expected, 1, ())])
    np.testing.assert_array_equal(batch.images[0, 1], pixels_of(folder[1].images[0]))

    plan = make_plan(rows, count=2, row_length=128)
    stream = list(elements(rows, plan, 0, plan.steps_for(1), workers=0))
    assert sorted(fault for element in stream for fault in element.faults) == sorted(faults)
    assert sum(element.batch.segments.max(axis=1).sum() for element in stream) == 4


@pytest.mark.parametrize(("markers", "images"), [(2, 1), (1, 2), (3, 2)])
def test_markers_and_images_must_agree(folder, tokenizer, markers, images):
    spoil(folder, 0, images=folder[0].images * images, conversation=as_turns(f"{IMAGE * markers} which?", "one"))
    rows = Rows(folder, tokenizer, BRIEF, TOWER)
    with pytest.raises(BadSample, match=f"{markers} <image> markers, but {images} images"):
        rows.read(0, 60)
    found = rows.lengths()
    assert (found.tokens[0], found.images[0]) == (0, 0)
    assert (found.tokens[1:] > 0).all() and (found.images[1:] == 1).all()


def test_an_image_beyond_the_cut_is_a_hole(folder, tokenizer):
    question = f"{IMAGE} {'which number is it? ' * 9} {IMAGE}"
    spoil(folder, 0, images=folder[0].images * 2, conversation=as_turns(question, "one"))
    rows = Rows(folder, tokenizer, BRIEF, TOWER)
    batch, faults = rows.build([[0, 1]], 40, 2)
    assert faults == ("r0: an image lies beyond the row's 40 text tokens",)
    assert batch.segments.max() == 1 and batch.image_positions[0].tolist() == [1, 40]


def test_a_record_whose_answers_all_lie_beyond_the_cut_is_a_hole(folder, tokenizer):
    spoil(folder, 0, conversation=as_turns(f"{IMAGE}{'which number is it? ' * 9}", "one"))
    batch, faults = Rows(folder, tokenizer, BRIEF, TOWER).build([[0], [1]], 40, 1)
    assert faults == ("r0: no supervised token in its first 40 tokens",)
    assert batch.segments.max(axis=1).tolist() == [0, 1]

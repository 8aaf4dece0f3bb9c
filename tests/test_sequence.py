"""layout() against rows written out by hand and against a slow reference; the budget draw."""

import functools
from collections import Counter

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltallava_jax.sequence import Batch, budget_at, layout

ANY = -1  # where the contract only promises an index in range


def make_batch(tokens, loss_mask, segments, image_positions) -> Batch:
    tokens = np.array(tokens, np.int32)
    positions = np.array(image_positions, np.int32).reshape(len(tokens), -1)
    return Batch(
        tokens=tokens,
        loss_mask=np.array(loss_mask, bool),
        segments=np.array(segments, np.int32),
        image_positions=positions,
        images=np.zeros((*positions.shape, 1, 1, 3), np.uint8),
    )


@functools.partial(jax.jit, static_argnames="V")
def compiled_layout(batch, valid, V):
    return layout(batch, valid, V)


def check(batch: Batch, valid, V: int, **expected):
    """Compares every field of the layout with rows of plain lists; ANY stands for any index in range."""
    valid = None if valid is None else np.array(valid, bool)
    found = jax.tree.map(np.asarray, compiled_layout(batch, valid, V))
    limits = {"text_index": batch.tokens.shape[1], "visual_index": max(batch.image_positions.shape[1] * V, 1)}
    for name, rows in expected.items():
        rows, values = np.array(rows), getattr(found, name)
        assert values.shape == rows.shape, name
        np.testing.assert_array_equal(np.where(rows == ANY, ANY, values), rows, err_msg=name)
        if name in limits:
            assert 0 <= values.min() and values.max() < limits[name], name


def test_two_images_in_a_row_an_unused_place_two_conversations_and_padding():
    batch = make_batch(
        tokens=[[0, 0, 11, 12, 21, 22, 0]],
        loss_mask=[[0, 0, 1, 1, 1, 1, 0]],
        segments=[[1, 1, 1, 1, 2, 2, 0]],
        image_positions=[[0, 1, 7]],
    )
    check(
        batch,
        None,
        V=3,
        #              image 0  image 1  11 12 21  22 padding
        is_visual=[[1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0]],
        visual_index=[[0, 1, 2, 3, 4, 5, ANY, ANY, ANY, ANY, ANY, ANY, ANY]],
        text_index=[[0, 0, 0, 1, 1, 1, 2, 3, 4, 5, 6, ANY, ANY]],
        segments=[[1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 0, 0, 0]],
        positions=[[0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 0, 0, 0]],
        # 12 is the last of its conversation: it does not predict 21, although 21 is supervised.
        targets=[[0, 0, 0, 0, 0, 11, 12, 0, 22, 0, 0, 0, 0]],
        loss_mask=[[0, 0, 0, 0, 0, 1, 1, 0, 1, 0, 0, 0, 0]],
    )


def test_dead_slots_have_no_position_and_no_target():
    batch = make_batch(
        tokens=[[11, 0, 12, 0, 13], [11, 0, 21, 0, 22]],
        loss_mask=[[1, 0, 1, 0, 1], [1, 0, 1, 0, 1]],
        segments=[[1, 1, 1, 1, 1], [1, 2, 2, 2, 2]],
        image_positions=[[1, 3], [1, 3]],
    )
    check(
        batch,
        # Row 0: tokens missing inside the first image, and all of the second. Row 1: at the ends of an image.
        [[[1, 0, 1], [0, 0, 0]], [[0, 0, 1], [1, 1, 0]]],
        V=3,
        is_visual=[[0, 1, 1, 1, 0, 1, 1, 1, 0], [0, 1, 1, 1, 0, 1, 1, 1, 0]],
        visual_index=[[ANY, 0, 1, 2, ANY, 3, 4, 5, ANY], [ANY, 0, 1, 2, ANY, 3, 4, 5, ANY]],
        text_index=[[0, 1, 1, 1, 2, 3, 3, 3, 4], [0, 1, 1, 1, 2, 3, 3, 3, 4]],
        segments=[[1, 1, 0, 1, 1, 0, 0, 0, 1], [1, 0, 0, 2, 2, 2, 2, 0, 2]],
        positions=[[0, 1, 0, 2, 3, 0, 0, 0, 4], [0, 0, 0, 0, 1, 2, 3, 0, 4]],
        targets=[[0, 0, 0, 12, 13, 0, 0, 0, 0], [0, 0, 0, 21, 0, 0, 22, 0, 0]],
        loss_mask=[[0, 0, 0, 1, 1, 0, 0, 0, 0], [0, 0, 0, 1, 0, 0, 1, 0, 0]],
    )


def test_one_visual_token_an_image_and_an_image_that_ends_its_conversation():
    batch = make_batch(
        tokens=[[11, 0, 12, 0, 21, 0]],
        loss_mask=[[1, 0, 1, 0, 1, 0]],
        segments=[[1, 1, 1, 1, 2, 2]],
        image_positions=[[1, 3, 5]],
    )
    expected = dict(
        is_visual=[[0, 1, 0, 1, 0, 1]],
        visual_index=[[ANY, 0, ANY, 1, ANY, 2]],
        text_index=[[0, 1, 2, 3, 4, 5]],
        segments=[[1, 1, 1, 1, 2, 2]],
        positions=[[0, 1, 2, 3, 0, 1]],
        targets=[[0, 12, 0, 0, 0, 0]],
        loss_mask=[[0, 1, 0, 0, 0, 0]],
    )
    check(batch, None, V=1, **expected)
    check(batch, [[[1], [1], [1]]], V=1, **expected)
    without_first = dict(segments=[[1, 0, 1, 1, 2, 2]], positions=[[0, 0, 1, 2, 0, 1]], targets=[[12, 0, 0, 0, 0, 0]])
    check(batch, [[[0], [1], [1]]], V=1, **{**expected, **without_first, "loss_mask": [[1, 0, 0, 0, 0, 0]]})


def test_no_image_at_all():
    batch = make_batch(
        tokens=[[11, 12, 13, 21, 22, 31], [11, 12, 13, 14, 0, 0]],
        loss_mask=[[0, 0, 1, 1, 1, 1], [0, 1, 0, 1, 0, 0]],
        segments=[[1, 1, 1, 2, 2, 3], [1, 1, 1, 1, 0, 0]],
        image_positions=[[], []],
    )
    check(
        batch,
        None,
        V=4,
        is_visual=[[0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]],
        visual_index=[[0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]],
        text_index=[[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5]],
        segments=[[1, 1, 1, 2, 2, 3], [1, 1, 1, 1, 0, 0]],
        positions=[[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 0, 0]],
        targets=[[0, 13, 0, 22, 0, 0], [12, 0, 14, 0, 0, 0]],
        loss_mask=[[0, 1, 0, 1, 0, 0], [1, 0, 1, 0, 0, 0]],
    )


def test_every_image_place_unused():
    batch = make_batch(tokens=[[11, 12, 13]], loss_mask=[[1, 1, 1]], segments=[[1, 1, 1]], image_positions=[[3, 3]])
    check(
        batch,
        None,
        V=2,
        is_visual=[[0, 0, 0, 0, 0]],
        text_index=[[0, 1, 2, ANY, ANY]],
        segments=[[1, 1, 1, 0, 0]],
        positions=[[0, 1, 2, 0, 0]],
        targets=[[12, 13, 0, 0, 0]],
        loss_mask=[[1, 1, 0, 0, 0]],
    )


# ------------------------------------------------------------------ any row

SHAPES = [(10, 3, 3), (8, 2, 1), (5, 0, 3)]  # T, I, V


@st.composite
def rows(draw, T: int, I: int, V: int):
    """(tokens, loss_mask, segments, image_positions, valid) of a row: conversations, then padding."""
    tokens, loss_mask, segments, positions = [], [], [], []
    for segment, items in enumerate(draw(st.lists(st.text("tsi", min_size=1), max_size=4)), start=1):
        for item in items:  # t: text, s: supervised text, i: image
            if len(tokens) == T or (item == "i" and len(positions) == I):
                continue
            if item == "i":
                positions.append(len(tokens))
            tokens.append(0 if item == "i" else 100 + len(tokens))
            loss_mask.append(item == "s")
            segments.append(segment)
    missing = T - len(tokens)
    valid = draw(st.lists(st.lists(st.booleans(), min_size=V, max_size=V), min_size=I, max_size=I))
    return (
        tokens + [0] * missing,
        loss_mask + [False] * missing,
        segments + [0] * missing,
        positions + [T] * (I - len(positions)),
        valid,
    )


def slow_layout(tokens, loss_mask, segments, image_positions, valid, V):
    """One row of the layout, position by position: a dict of lists, ANY where the contract leaves the value open."""
    opened = []  # (text index, visual index, segment, live)
    for t, segment in enumerate(segments):
        if t in image_positions:
            i = image_positions.index(t)
            opened += [(t, i * V + v, segment, valid[i][v]) for v in range(V)]
        else:
            opened.append((t, ANY, segment, segment > 0))
    opened += [(ANY, ANY, 0, False)] * (len(tokens) + len(image_positions) * (V - 1) - len(opened))

    seen = Counter()
    fields = {key: [] for key in ("positions", "segments", "is_visual", "text_index", "visual_index")}
    targets = []
    for s, (text, visual, segment, live) in enumerate(opened):
        fields["text_index"].append(text)
        fields["visual_index"].append(visual)
        fields["is_visual"].append(int(visual != ANY))
        fields["segments"].append(segment if live else 0)
        fields["positions"].append(seen[segment] if live else 0)
        seen[segment] += live
        next_text, next_visual, next_segment, _ = next((x for x in opened[s + 1 :] if x[3]), (ANY, ANY, ANY, True))
        counts = live and next_visual == ANY and next_segment == segment and loss_mask[next_text]
        targets.append(tokens[next_text] if counts else 0)
    return {**fields, "targets": targets, "loss_mask": [int(target > 0) for target in targets]}


@pytest.mark.parametrize("shape", SHAPES)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_rows_equal_the_slow_reference(shape, data):
    T, I, V = shape
    batch_rows = data.draw(st.lists(rows(T, I, V), min_size=2, max_size=2))
    *columns, valid = zip(*batch_rows, strict=True)
    expected = [slow_layout(*row, V) for row in batch_rows]
    valid = np.array(valid, bool).reshape(2, I, V)
    check(make_batch(*columns), valid, V, **{key: [row[key] for row in expected] for key in expected[0]})


# ------------------------------------------------------------------ budgets


def test_budget_at_is_a_function_of_seed_and_step_alone():
    budgets = (576, 144, 36)
    drawn = [budget_at(0, step, budgets) for step in range(12)]
    np.random.seed(1)  # a host's global state plays no part
    assert [budget_at(0, step, budgets) for step in reversed(range(12))] == drawn[::-1]
    assert drawn == [36, 144, 36, 144, 144, 36, 144, 36, 576, 576, 576, 576]  # on every host
    assert [budget_at(1, step, budgets) for step in range(12)] != drawn


def test_every_budget_occurs_about_equally_often():
    budgets = (576, 144, 36)
    counts = Counter(budget_at(7, step, budgets) for step in range(900))
    assert set(counts) == set(budgets) and min(counts.values()) > 250
    assert {budget_at(7, step, (64,)) for step in range(5)} == {64}


def test_branches_go_on_from_the_shared_part():
    """An image of two tokens and a text token are shared; two branches; then a conversation that is all branches."""
    batch = Batch(
        tokens=np.array([[1, 0, 5, 6, 7, 8, 9, 3, 4]], np.int32),
        loss_mask=np.array([[0, 0, 0, 0, 1, 1, 1, 0, 1]], bool),
        segments=np.array([[1, 1, 1, 1, 1, 1, 1, 2, 2]], np.int32),
        image_positions=np.array([[1]], np.int32),
        images=np.zeros((1, 1, 2, 2, 3), np.uint8),
        branches=np.array([[0, 0, 0, 1, 1, 2, 2, 1, 1]], np.int32),
    )
    row = layout(batch, None, 2)
    np.testing.assert_array_equal(row.branches, [[0, 0, 0, 0, 1, 1, 2, 2, 1, 1]])
    np.testing.assert_array_equal(row.positions, [[0, 1, 2, 3, 4, 5, 4, 5, 0, 1]])
    # 8 opens branch 2 and is supervised, but the token before it belongs to branch 1: nothing predicts it.
    np.testing.assert_array_equal(row.loss_mask, [[0, 0, 0, 0, 1, 0, 1, 0, 1, 0]])
    np.testing.assert_array_equal(row.targets, [[0, 0, 0, 0, 7, 0, 9, 0, 4, 0]])


@pytest.mark.parametrize("branches", [False, True])
def test_an_empty_batch_is_padding_and_its_shapes_are_those_of_shapes(branches):
    batch = Batch.empty(3, 7, 2, 4, branches=branches)
    filled = [name for name, values in vars(batch).items() if values is not None and values.any()]
    assert filled == ["image_positions"]
    assert (batch.image_positions == 7).all()  # no place is used
    assert not layout(batch, None, 5).segments.any()
    about = lambda made: [(leaf.shape, str(leaf.dtype)) for leaf in jax.tree.leaves(made)]
    assert about(Batch.shapes(3, 7, 2, 4, branches=branches)) == about(batch)
    assert batch.images.shape == (3, 2, 4, 4, 3) and (batch.branches is not None) == branches
    assert Batch.shapes(3, 7, 0).images.shape == (3, 0, 0, 0, 3)
    assert batch.questions is None and (Batch.empty(3, 7, 2, question=5).questions == np.full((3, 2, 5), -1)).all()

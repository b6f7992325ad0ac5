"""Objects, held-out blocks and zoom from labels."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dendsam_deploy.errors import InvalidArgumentError
from dendsam_deploy.training.boxes import (
    TYPICAL_OBJECT_PX,
    boxes_from_labels,
    label_components,
    plan_zoom,
    slice_blocks,
    slices_text,
    split_blocks,
)


def flood_components(labels: np.ndarray) -> list[tuple[int, frozenset[tuple[int, int]]]]:
    """Brute-force oracle: flood fill over the eight neighbours, as (label, pixels)."""
    seen: set[tuple[int, int]] = set()
    found = []
    for start in zip(*np.nonzero(labels), strict=True):
        if start in seen:
            continue
        stack, pixels = [start], set()
        while stack:
            y, x = stack.pop()
            inside = 0 <= y < labels.shape[0] and 0 <= x < labels.shape[1]
            if (y, x) in pixels or not inside or labels[y, x] != labels[start]:
                continue
            pixels.add((y, x))
            stack += [(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
        seen |= pixels
        found.append((int(labels[start]), frozenset((int(y), int(x)) for y, x in pixels)))
    return found


@settings(deadline=None, max_examples=60)
@given(
    hnp.arrays(
        np.uint32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=7), elements=st.sampled_from([0, 1, 7, 2**32 - 1])
    )
)
def test_components_and_boxes_equal_a_flood_fill(labels):
    components, ids = label_components(labels)
    boxes = boxes_from_labels(labels)
    expected = flood_components(labels)
    pieces = [
        (int(ids[i]), frozenset((int(y), int(x)) for y, x in zip(*np.nonzero(components == i + 1), strict=True)))
        for i in range(len(ids))
    ]
    # As sets: how a frozenset is written down depends on how it came about.
    assert len(pieces) == len(expected)
    assert set(pieces) == set(expected)
    assert (components == 0).sum() == (labels == 0).sum()
    for (label, pixels), box, name, area in zip(pieces, boxes.boxes_xyxy, boxes.ids, boxes.areas_px, strict=True):
        ys, xs = zip(*pixels, strict=True)
        assert box.tolist() == [min(xs), min(ys), max(xs) + 1, max(ys) + 1]
        assert (int(name), int(area)) == (label, len(pixels))


def test_small_pieces_are_left_out_of_boxes():
    labels = np.zeros((6, 6), np.uint32)
    labels[0:2, 0:3] = 4
    labels[5, 5] = 4
    assert boxes_from_labels(labels, min_area_px=2).boxes_xyxy.tolist() == [[0, 0, 3, 2]]


def test_an_empty_slice_has_no_boxes():
    assert boxes_from_labels(np.zeros((3, 4), np.uint32)).boxes_xyxy.shape == (0, 4)


def test_split_holds_out_the_last_block_behind_a_gap():
    assert split_blocks(20, 0.2, 1) == (range(15), range(16, 20))
    assert split_blocks(167, 0.2, 1, (0, 137)) == (range(109), range(110, 137))


def test_split_of_few_slices_keeps_one_to_train_on():
    assert split_blocks(2, 0.5, 0) == (range(1), range(1, 2))
    assert split_blocks(5, 0.9, 3) == (range(1), range(4, 5))
    assert split_blocks(5, 0.0, 3) == (range(5), range(5, 5))


def test_split_never_gives_up_the_gap():
    with pytest.raises(InvalidArgumentError, match=r"at least 5 slices.* gap of 3, but slices 0:4 are 4"):
        split_blocks(4, 0.2, 3)
    with pytest.raises(InvalidArgumentError, match="at least 2 slices"):
        split_blocks(1, 0.2, 0)


@settings(deadline=None)
@given(st.integers(1, 60), st.floats(0, 0.99), st.integers(0, 9), st.data())
def test_no_held_out_slice_lies_within_the_gap_of_a_training_slice(depth, fraction, gap, data):
    first = data.draw(st.integers(0, depth - 1))
    allowed = (first, data.draw(st.integers(first + 1, depth)))
    named = data.draw(st.lists(st.tuples(st.integers(*allowed), st.integers(*allowed)), max_size=3))
    held_out = tuple(sorted(pair) for pair in named if pair[0] != pair[1])
    try:
        train, judge = split_blocks(depth, fraction, gap, allowed, held_out)
    except InvalidArgumentError:
        # Refused only where nothing is left: an oracle that looks at every slice agrees.
        wanted = {z for pair in held_out for z in range(*pair)} if held_out else {allowed[1] - 1}
        assert all(min(abs(z - other) for other in wanted) <= gap for z in range(*allowed))
        return
    assert train
    assert set(train) | set(judge) <= set(range(*allowed))
    assert list(train) == sorted(set(train))
    assert list(judge) == sorted(set(judge))
    assert all(abs(z - other) > gap for z in train for other in judge)
    if held_out:
        assert set(judge) == {z for pair in held_out for z in range(*pair)}
    elif fraction > 0:
        assert judge
        assert judge[-1] == allowed[1] - 1
        assert train[-1] + gap + 1 == judge[0]  # nothing more than the gap is wasted


def test_named_slices_are_held_out_of_the_middle():
    train, judge = split_blocks(12, 0.15, 1, held_out=((4, 6), (9, 10)))
    assert (slice_blocks(train), slice_blocks(judge)) == (((0, 3), (7, 8), (11, 12)), ((4, 6), (9, 10)))
    assert slices_text(train) == "0:3+7:8+11:12"
    with pytest.raises(InvalidArgumentError, match="slices 4:13 cannot be held out, because slices 0:12 are used"):
        split_blocks(12, 0.15, 1, held_out=((4, 13),))
    with pytest.raises(InvalidArgumentError, match="leaves none to train on"):
        split_blocks(12, 0.15, 3, held_out=((3, 4), (8, 9)))


@pytest.mark.parametrize(
    "bad", [((5, 0.2, 1, (3, 3))), ((5, 0.2, 1, (0, 6))), ((5, 1.0, 1, None)), ((5, 0.2, -1, None))]
)
def test_split_refuses_impossible_wishes(bad):
    with pytest.raises(InvalidArgumentError):
        split_blocks(*bad)


@pytest.mark.parametrize("zoom", [0.5, 2**-0.5, 1.0, 2**0.5, 2.0, 4.0])
@pytest.mark.parametrize("error", [0.85, 1.0, 1.18])
def test_zoom_brings_the_median_object_near_its_typical_size(zoom, error):
    side_px = TYPICAL_OBJECT_PX / zoom * error
    assert plan_zoom(np.array([1, round(side_px**2), 10**6])) == pytest.approx(zoom)


def test_no_object_no_zoom():
    with pytest.raises(InvalidArgumentError, match="no labelled object"):
        plan_zoom(np.zeros(0, np.int64))

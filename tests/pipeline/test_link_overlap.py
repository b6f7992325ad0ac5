"""Overlaps from run-length codes against counting pixels; shifts between slices."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from link_oracle import features
from painted_slices import instances_from

from dendsam_deploy.errors import InvalidArgumentError
from dendsam_deploy.geometry import Window
from dendsam_deploy.instances import Instances, RunLengths
from dendsam_deploy.pipeline.link_align import find_shift
from dendsam_deploy.pipeline.link_overlap import SliceRuns, measure_overlaps


@st.composite
def label_images(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    blocks = rng.integers(0, draw(st.integers(1, 6)), (6, 7)) * (rng.random((6, 7)) < draw(st.floats(0, 1)))
    return np.kron(blocks, np.ones((2, 3), np.int64))


def runs_of(labels):
    return SliceRuns.from_instances(instances_from(labels))


@settings(deadline=None, max_examples=150)
@given(label_images(), label_images())
def test_features_equal_those_of_pixels(lower, upper):
    overlaps = measure_overlaps(runs_of(lower), runs_of(upper))
    expected = []
    for i, a in enumerate(np.unique(lower[lower > 0])):
        for j, b in enumerate(np.unique(upper[upper > 0])):
            if pair := features(lower == a, upper == b):
                expected.append((i, j, *pair))
    found = np.stack(
        [overlaps.lower, overlaps.upper, overlaps.iou, overlaps.containment, overlaps.area_ratio, overlaps.shift], 1
    )
    np.testing.assert_allclose(found, np.array(expected).reshape(-1, 6), atol=1e-12)


@settings(deadline=None, max_examples=50)
@given(label_images(), st.integers(-9, 9), st.integers(-9, 9))
def test_moving_equals_moving_the_pixels(labels, dy, dx):
    canvas = np.zeros((40, 50), np.int64)
    canvas[12:24, 12:33] = labels
    moved, painted = runs_of(canvas).moved((dy, dx)), runs_of(np.roll(canvas, (dy, dx), (0, 1)))
    np.testing.assert_array_equal(moved.starts, painted.starts)
    np.testing.assert_array_equal(moved.ends, painted.ends)
    np.testing.assert_allclose(moved.centroids_yx, painted.centroids_yx)


def test_runs_moved_over_the_left_border_do_not_meet_the_row_above():
    edge, far = np.zeros((4, 8), np.int64), np.zeros((4, 8), np.int64)
    edge[2, 0:2], far[1, 6:8] = 1, 1
    assert len(measure_overlaps(runs_of(edge).moved((0, -2)), runs_of(far))) == 0


def test_some_of_the_objects():
    labels = np.zeros((6, 20), np.int64)
    labels[1:3, 1:4], labels[1:5, 6:9], labels[2:4, 12:18] = 1, 2, 3
    part = runs_of(labels).take(np.array([0, 2]))
    assert part.areas_px.tolist() == [6, 12]
    overlaps = measure_overlaps(part, runs_of(labels))
    assert (overlaps.lower.tolist(), overlaps.upper.tolist()) == ([0, 1], [0, 2])


def test_columns_beyond_16_bits_keep_their_row():
    code = RunLengths(Window(70_000, 90_000, 1, 2), np.array([[0, 0, 2]], np.int32))
    one = Instances(
        np.array([1], np.uint32),
        np.zeros((1, 4), np.float32),
        np.ones(1, np.float32),
        np.ones(1, np.float32),
        np.array([2], np.int64),
        (code,),
    )
    overlaps = measure_overlaps(SliceRuns.from_instances(one), SliceRuns.from_instances(one))
    assert overlaps.iou.tolist() == [1.0]


def test_objects_that_share_pixels_are_refused():
    first, second = (np.zeros((5, 5), np.int64) for _ in range(2))
    first[1:4, 1:4], second[3:5, 3:5] = 1, 1
    a, b = instances_from(first), instances_from(second)
    both = Instances(
        np.array([1, 2], np.uint32),
        np.concatenate([a.boxes_xyxy, b.boxes_xyxy]),
        np.ones(2, np.float32),
        np.ones(2, np.float32),
        np.concatenate([a.areas_px, b.areas_px]),
        a.run_lengths + b.run_lengths,
    )
    with pytest.raises(InvalidArgumentError, match="objects 1 and 2 of a slice share pixels"):
        SliceRuns.from_instances(both)


def scattered(seed, count=30):
    """Paint rectangles of different size on a grid with jitter."""
    rng = np.random.default_rng(seed)
    labels = np.zeros((200, 200), np.int64)
    for label in range(1, count + 1):
        row, column = divmod(label - 1, 6)
        y, x = 12 + 30 * row + rng.integers(0, 8), 12 + 30 * column + rng.integers(0, 8)
        labels[y : y + rng.integers(8, 20), x : x + rng.integers(8, 20)] = label
    return labels


@pytest.mark.parametrize("shift", [(7, -5), (-11, 3), (0, 9)])
def test_a_shift_of_the_whole_slice_is_found(shift):
    labels = scattered(1)
    back = find_shift(runs_of(labels), runs_of(np.roll(labels, shift, (0, 1))))
    assert back == (-shift[0], -shift[1])


def test_unrelated_slices_are_not_moved_and_aligned_ones_neither():
    assert find_shift(runs_of(scattered(1)), runs_of(scattered(1))) == (0, 0)
    assert find_shift(runs_of(np.zeros((9, 9), np.int64)), runs_of(scattered(1))) == (0, 0)


def test_a_few_moving_dendrites_do_not_move_the_slice():
    labels = scattered(1, count=5)
    assert find_shift(runs_of(labels), runs_of(np.roll(labels, (6, 0), (0, 1)))) == (0, 0)

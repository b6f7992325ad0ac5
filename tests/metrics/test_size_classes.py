"""Scores by size: which class an object counts in, and that all classes together are the whole."""

import numpy as np
import pytest

from dendsam_deploy.metrics.bootstrap import bootstrap_weights
from dendsam_deploy.metrics.contingency import ContingencyTable
from dendsam_deploy.metrics.overlaps import ObjectOverlaps
from dendsam_deploy.metrics.size_classes import ObjectMatches, score_size_classes, tercile_limits
from dendsam_deploy.metrics.summary import score_objects

TRUTH = np.array([[1, 1, 0, 2, 2, 2, 2, 2, 2, 2, 2, 0, 3, 3, 3, 0]])
FOUND = np.array([[5, 5, 0, 6, 6, 6, 6, 6, 6, 0, 0, 0, 7, 0, 0, 8]])
"""Object 1 (2 px) exact, 2 (8 px) at IoU .75, 3 (3 px) at IoU 1/3; segment 8 (1 px) is extra."""


def matches(truth, found) -> ObjectMatches:
    return ObjectMatches.from_overlaps(ObjectOverlaps.from_table(ContingencyTable.from_labels(truth, found)))


def test_objects_count_in_the_class_of_their_size():
    small, large = score_size_classes(matches(TRUTH, FOUND), (4,))
    assert (small.low_px, small.high_px, large.low_px, large.high_px) == (None, 4, 4, None)
    assert (small.truth_objects, small.found, small.extra_segments) == (2, 1, 2)  # 7 and 8 match nothing at .5
    assert (small.sq, small.dq) == (1, pytest.approx(1 / (1 + 3 / 2)))
    assert small.mean_best_iou == pytest.approx((1 + 1 / 3) / 2)
    assert (large.truth_objects, large.found, large.extra_segments) == (1, 1, 0)
    assert (large.sq, large.dq, large.pq) == (0.75, 1, 0.75)
    assert (large.sa50, large.sa75) == (1, 1)
    assert large.s_inst == pytest.approx(14 / 17)  # found from .10 to .75, lost at .80, .85 and .90


def test_a_limit_belongs_to_the_upper_class():
    small, large = score_size_classes(matches(TRUTH, FOUND), (3,))
    assert (small.truth_objects, large.truth_objects) == (1, 2)


def test_a_matched_segment_counts_with_its_object_and_not_by_its_own_size():
    truth, found = np.array([[1] * 10]), np.array([[1] * 7 + [0] * 3])
    small, large = score_size_classes(matches(truth, found), (8,))
    assert (small.truth_objects, small.extra_segments, small.pq) == (0, 0, 1)
    assert (large.found, large.extra_segments, large.pq) == (1, 0, 0.7)


def is_all_of_it(truth, found):
    (everything,) = score_size_classes(matches(truth, found), ())
    expected = score_objects(ContingencyTable.from_labels(truth, found))
    for name in ("pq", "sq", "dq", "s_inst", "msa", "sa50", "sa75"):
        assert getattr(everything, name) == pytest.approx(getattr(expected, name)), name
    if truth.any() and found.any():
        for name in ("e_gs", "e_sg", "oce"):
            assert getattr(everything, name) == pytest.approx(getattr(expected, name)), name


def test_one_class_is_the_score_of_all_objects():
    rng = np.random.default_rng(0)
    truth = np.kron(rng.integers(0, 9, (6, 8)), np.ones((4, 4), int))
    found = np.kron(rng.integers(0, 5, (6, 8)), np.ones((4, 4), int))
    is_all_of_it(truth, np.where(rng.random(found.shape) < 0.7, truth, found))
    for _ in range(200):  # so small that an IoU of exactly one half is frequent
        is_all_of_it(*rng.integers(0, 4, (2, 3, 4)))


def test_half_an_overlap_counts_for_accuracy_and_not_for_panoptic_quality():
    truth, found = np.array([[1] * 8]), np.array([[1] * 4 + [0] * 4])
    (only,) = score_size_classes(matches(truth, found), ())
    assert (only.found, only.extra_segments, only.pq, only.dq, only.sa50) == (0, 1, 0, 0, 1)


def test_intervals_are_those_of_slices_drawn_and_scored_anew():
    rng = np.random.default_rng(3)
    slices = []
    for _ in range(5):
        truth = np.kron(rng.integers(0, 12, (6, 8)), np.ones((3, 3), int))
        slices.append(matches(truth, np.where(rng.random(truth.shape) < 0.75, truth, rng.integers(0, 20, truth.shape))))
    pooled, limits = ObjectMatches.pooled(slices), (20,)
    found = score_size_classes(pooled, limits, slices, resamples=40, seed=9)
    drawn = []
    for weights in bootstrap_weights(5, 40, 9):
        several = [one for one, weight in zip(slices, weights, strict=True) for _ in range(weight)]
        drawn.append(score_size_classes(ObjectMatches.pooled(several), limits))
    for number, row in enumerate(found):
        assert row.intervals.keys() >= {"pq", "s_inst", "e_gs", "e_sg", "oce", "mean_best_iou"}
        for name, ends in row.intervals.items():
            values = np.array([getattr(each[number], name) for each in drawn], float)
            assert ends == pytest.approx(tuple(np.quantile(values, (0.025, 0.975)))), name
    assert score_size_classes(pooled, limits)[0].intervals == {}


def test_errors_of_a_class_are_those_of_its_objects_and_of_its_segments():
    """The small object is missed; the large one is cut in two halves of eight."""
    truth = np.array([[1] * 16 + [0] + [2] * 2])
    found = np.array([[3] * 8 + [4] * 8 + [0] * 3])
    small, large = score_size_classes(matches(truth, found), (10,))
    assert (small.e_gs, small.e_sg) == (1, pytest.approx(0.5))  # both halves are small
    assert small.oce == pytest.approx(0.5)
    assert (large.e_gs, large.e_sg, large.oce) == (pytest.approx(0.5), None, pytest.approx(0.5))


def test_slices_are_pooled():
    both = ObjectMatches.pooled([matches(TRUTH, FOUND), matches(TRUTH, TRUTH)])
    (everything,) = score_size_classes(both, ())
    assert (everything.truth_objects, everything.found) == (6, 5)
    assert ObjectMatches.pooled([]).truth_sizes.shape == (0,)


def test_terciles_make_classes_of_equal_number():
    sizes = np.arange(1, 10)
    assert tercile_limits(sizes) == (4, 7)
    assert tercile_limits(np.full(5, 3)) == ()
    assert tercile_limits(np.zeros(0, np.int64)) == ()


def test_a_class_that_nobody_has_is_perfect():
    *_, empty = score_size_classes(matches(TRUTH, FOUND), (4, 100))
    assert (empty.truth_objects, empty.pq, empty.s_inst, empty.mean_best_iou) == (0, 1, 1, None)

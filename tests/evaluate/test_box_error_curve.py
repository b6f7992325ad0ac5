"""Quality against box error: how boxes are moved, how a detector's are measured, and what is concluded."""

from __future__ import annotations

import dataclasses
from types import MappingProxyType

import numpy as np
import pytest

from dendsam_deploy.evaluate.box_error_curve import (
    JITTERS,
    BoxErrorCurve,
    BoxErrors,
    CurvePoint,
    DetectorError,
    curve_points,
    detector_error,
    jittered_boxes,
    measure_boxes,
)
from dendsam_deploy.evaluate.prompt_sources import TrueSlice, read_true_slice
from dendsam_deploy.instances import Detections
from dendsam_deploy.metrics.summary import ObjectScores

BOXES = {1: (10, 20, 50, 40), 2: (60, 60, 70, 100)}


def true_slice(z=0, boxes=BOXES, void=()) -> TrueSlice:
    components = np.zeros((120, 120), np.int32)
    for number, (x0, y0, x1, y1) in boxes.items():
        components[y0:y1, x0:x1] = number
    judged = {number: box for number, box in boxes.items() if number not in void}
    return TrueSlice(z, np.zeros((120, 120), np.uint8), components, MappingProxyType(judged), frozenset(void))


def detections(*boxes) -> Detections:
    return Detections(np.array(boxes, np.float32).reshape(-1, 4), np.ones(len(boxes), np.float32))


def scores(value: float) -> ObjectScores:
    return ObjectScores(**{field.name: value for field in dataclasses.fields(ObjectScores)})


def curve(detector: DetectorError | None, detector_score: float | None) -> BoxErrorCurve:
    points = tuple(CurvePoint(jitter, scores(0.8 - jitter), {}) for jitter in JITTERS)
    return BoxErrorCurve("ca1", 2, points, detector, detector_score)


def test_boxes_are_moved_by_at_most_their_level_and_by_half_of_it_on_average():
    offsets = {level: [] for level in range(len(JITTERS))}
    exact = true_slice().boxes
    side = np.tile(exact[:, 2:] - exact[:, :2], 2)
    for level, moved in jittered_boxes(true_slice(), seed=1, repeats=300):
        offsets[level].append(np.abs(moved.boxes_xyxy - exact) / side)
    assert len(offsets[0]) == 1
    for level, jitter in enumerate(JITTERS):
        assert np.max(offsets[level]) <= jitter + 1e-6
        assert np.mean(offsets[level]) == pytest.approx(jitter / 2, rel=0.08)


def test_draws_depend_on_the_seed_and_the_slice_alone():
    def draw(seed, z):
        return [moved.boxes_xyxy for _, moved in jittered_boxes(true_slice(z), seed, 2)]

    np.testing.assert_array_equal(draw(3, 5), draw(3, 5))
    for other in (draw(4, 5), draw(3, 6)):
        assert not np.array_equal(draw(3, 5)[1:], other[1:])


def test_a_detectors_boxes_are_measured_by_their_edges():
    """The first box is 40 x 20 px: edges off by 4, 0, 0 and 2 px are .1, 0, 0, .1 of their sides."""
    found = measure_boxes(detections((14, 20, 50, 38), (100, 0, 110, 10)), true_slice(), sparse_truth=False)
    assert found.edge_errors == pytest.approx((0.05,))
    assert found.box_iou == pytest.approx((36 * 18 / 800,))
    assert (found.missed, found.extra) == (1, 1)
    assert measure_boxes(detections((100, 0, 110, 10)), true_slice(), sparse_truth=True).extra == 0
    error = detector_error([found, measure_boxes(detections(*BOXES.values()), true_slice(), sparse_truth=False)])
    assert (error.matched, error.missed, error.extra) == (3, 1, 1)
    assert error.edge_error == pytest.approx(0.05 / 3)
    assert error.equivalent_jitter == pytest.approx(0.1 / 3)


def test_jittered_boxes_are_measured_as_what_they_are():
    """The two definitions of box error agree: a detector that jitters by 20 % lies at 20 % of the curve."""
    many = {
        n: (x, y, x + 12, y + 9)
        for n, (x, y) in enumerate([(x, y) for x in range(0, 96, 24) for y in range(0, 96, 24)], 1)
    }
    truth = true_slice(boxes=many)
    level = JITTERS.index(0.2)
    found = [
        measure_boxes(moved, truth, sparse_truth=False)
        for at, moved in jittered_boxes(truth, seed=0, repeats=40)
        if at == level
    ]
    error = detector_error(found)
    assert error.missed < 0.02 * error.matched
    assert error.equivalent_jitter == pytest.approx(0.2, rel=0.05)


def test_pairs_are_one_to_one():
    twice = measure_boxes(detections((10, 20, 50, 40), (11, 20, 50, 40)), true_slice(), sparse_truth=False)
    assert len(twice.edge_errors) == 1
    assert twice.edge_errors == (0,)
    assert (twice.missed, twice.extra) == (1, 1)


def test_boxes_on_what_is_not_judged_are_not_too_many():
    found = measure_boxes(detections(*BOXES.values()), true_slice(void=(2,)), sparse_truth=False)
    assert (len(found.edge_errors), found.missed, found.extra) == (1, 0, 0)


def test_a_detector_that_finds_nothing():
    nothing = measure_boxes(detections(), true_slice(), sparse_truth=False)
    assert nothing == BoxErrors((), (), 2, 0)
    error = detector_error([nothing])
    assert error.edge_error is error.equivalent_jitter is error.box_iou is None
    assert curve(error, 0.0).verdict == "Not good enough: the detector finds none of the objects."


def test_the_curve_is_the_mean_over_repetitions_then_over_slices():
    levels = range(len(JITTERS))
    first = [[scores(0.9)] if level == 0 else [scores(0.6), scores(0.8)] for level in levels]
    second = [[scores(0.7)] if level == 0 else [scores(0.5), scores(0.5)] for level in levels]
    points = curve_points([first, second], resamples=200, seed=0)
    assert [point.jitter for point in points] == list(JITTERS)
    assert points[0].scores.pq == pytest.approx(0.8)
    assert points[3].scores.pq == pytest.approx((0.7 + 0.5) / 2)
    assert points[3].intervals["pq"] == pytest.approx((0.5, 0.7))
    assert curve_points([first], 200, 0)[0].intervals == {}


def test_a_good_detector_is_called_good():
    error = DetectorError(95, 5, 2, edge_error=0.02, box_iou=0.9)
    good = curve(error, 0.75)
    assert good.at(0.04) == pytest.approx(0.76)
    assert good.is_good_enough is True
    assert good.verdict.startswith("Good enough: its boxes' edges are off by 2.0% of the side on average, ")
    assert "jittered by up to 4%; that costs 0.040 of S_inst 0.800" in good.verdict
    assert "5 of 100 objects missed and 2 boxes too many among them, cost 0.050 (6%)" in good.verdict
    assert good.to_document()["detector"]["equivalent_jitter"] == 0.04
    assert good.to_document()["good_enough"] is True


def test_the_limit_is_a_tenth():
    error = DetectorError(95, 5, 2, 0.02, 0.9)
    assert curve(error, 0.7201).is_good_enough
    assert not curve(error, 0.7199).is_good_enough


def test_what_would_help_is_said():
    misses = curve(DetectorError(60, 40, 0, 0.02, 0.9), 0.5)
    assert misses.verdict.endswith("what would help is finding the right objects, not tighter boxes.")
    loose = curve(DetectorError(100, 0, 0, 0.1, 0.7), 0.58)
    assert loose.verdict.endswith("what would help is tighter boxes.")
    far = curve(DetectorError(100, 0, 0, 0.2, 0.6), 0.5)
    assert "up to 40%, which is beyond the curve" in far.verdict
    assert far.at(0.4) == far.at(0.3)


def test_without_a_detector_there_is_a_curve_all_the_same():
    alone = curve(None, None)
    assert alone.is_good_enough is None
    assert alone.verdict.startswith("The bundle has no detector")
    assert alone.to_document()["detector"] is None


def test_real_slices_have_boxes_to_move():
    labels = np.zeros((30, 30), np.uint32)
    labels[3:9, 4:20] = 7
    truth = read_true_slice(2, np.zeros((30, 30), np.uint8), labels, (), 1)
    level, exact = next(jittered_boxes(truth, 0, 1))
    assert level == 0
    assert exact.boxes_xyxy.tolist() == [[4, 3, 20, 9]]

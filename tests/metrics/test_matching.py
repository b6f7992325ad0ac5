"""One-to-one matching: worked examples, and all possible assignments of small images tried one by one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.optimize import linear_sum_assignment

from dendsam_deploy.metrics.contingency import ContingencyTable
from dendsam_deploy.metrics.matching import (
    MSA_THRESHOLDS,
    S_INST_THRESHOLDS,
    match_objects,
    segmentation_accuracy,
)
from dendsam_deploy.metrics.overlaps import ObjectOverlaps


def overlaps_of(truth: np.ndarray, segmentation: np.ndarray) -> ObjectOverlaps:
    return ObjectOverlaps.from_table(ContingencyTable.from_labels(truth, segmentation))


def line(*runs: tuple[int, int]) -> np.ndarray:
    """Labels in a row, as (label, length) runs."""
    return np.repeat([label for label, _ in runs], [length for _, length in runs])


def accuracy(truth: np.ndarray, segmentation: np.ndarray, threshold: float) -> float:
    return float(segmentation_accuracy(overlaps_of(truth, segmentation), [threshold])[0])


def test_thresholds_are_those_of_the_definitions():
    assert list(S_INST_THRESHOLDS) == pytest.approx(np.arange(0.10, 0.901, 0.05))
    assert list(MSA_THRESHOLDS) == pytest.approx(np.arange(0.50, 0.951, 0.05))


@pytest.mark.parametrize("step", range(1, 20))
def test_an_iou_that_equals_the_threshold_counts(step):
    truth = line((1, 20))
    segmentation = line((1, step), (0, 20 - step))
    assert accuracy(truth, segmentation, step / 20) == 1
    assert accuracy(truth, segmentation, (step + 0.001) / 20) == 0


def test_missing_extra_and_found_objects_are_counted():
    truth = line((1, 5), (2, 5), (3, 5), (0, 5))
    segmentation = line((7, 5), (8, 5), (0, 5), (9, 5))
    assert accuracy(truth, segmentation, 0.9) == 2 / 4  # two found, one missing, one extra


def test_two_halves_are_one_match_and_one_extra():
    assert accuracy(line((1, 8)), line((1, 4), (2, 4)), 0.5) == 1 / 2


def test_below_one_half_one_segment_serves_one_object_only():
    merged = line((1, 20))
    truth = line((1, 10), (2, 10))
    assert match_objects(overlaps_of(truth, merged), 0.3).sum() == 1
    assert match_objects(overlaps_of(merged, truth), 0.3).sum() == 1


def test_the_largest_total_iou_decides():
    # IoU of (1, 1) is 10/22; (1, 2) 4/14 and (2, 1) 8/22 add up to more although neither is the best pair.
    truth = line((1, 10), (1, 4), (2, 8))
    segmentation = line((1, 10), (2, 4), (1, 8))
    overlaps = overlaps_of(truth, segmentation)
    chosen = match_objects(overlaps, 0.1)
    pairs = set(zip(overlaps.pair_truth[chosen].tolist(), overlaps.pair_segment[chosen].tolist(), strict=True))
    assert pairs == {(0, 1), (1, 0)}
    # Where only the best pair reaches the threshold, it is taken.
    chosen = match_objects(overlaps, 0.4)
    assert overlaps.iou[chosen].tolist() == [10 / 22]


def test_no_object_on_either_side_is_perfect_and_on_one_side_is_zero():
    nothing, something = line((0, 4)), line((1, 4))
    assert accuracy(nothing, nothing, 0.5) == 1
    assert accuracy(nothing, something, 0.5) == 0
    assert accuracy(something, nothing, 0.5) == 0


def best_assignment(weights: np.ndarray) -> tuple[float, int]:
    """Try every one-to-one assignment of rows to columns or to nothing; zero weights are no pairs."""
    best = (0.0, 0)

    def extend(row: int, free: frozenset[int], total: float, pairs: int) -> None:
        nonlocal best
        if row == len(weights):
            best = max(best, (round(total, 9), pairs))
            return
        extend(row + 1, free, total, pairs)
        for column in free:
            if weights[row, column] > 0:
                extend(row + 1, free - {column}, total + weights[row, column], pairs + 1)

    extend(0, frozenset(range(weights.shape[1])), 0.0, 0)
    return best


def iou_matrix(truth: np.ndarray, segmentation: np.ndarray) -> np.ndarray:
    """IoU of every pair of objects, from boolean masks."""
    return np.array(
        [
            [((truth == t) & (segmentation == s)).sum() / ((truth == t) | (segmentation == s)).sum()]
            for t in np.unique(truth[truth > 0])
            for s in np.unique(segmentation[segmentation > 0])
        ]
    ).reshape(len(np.unique(truth[truth > 0])), -1)


ROWS = hnp.arrays(np.uint8, 14, elements=st.integers(0, 4)).map(np.sort)
SHIFTED = st.tuples(ROWS, ROWS, st.integers(0, 13)).map(lambda parts: (parts[0], np.roll(parts[1], parts[2])))


@settings(deadline=None)
@given(SHIFTED, st.sampled_from(S_INST_THRESHOLDS))
def test_equals_the_best_of_all_assignments(pair, threshold):
    overlaps = overlaps_of(*pair)
    chosen = match_objects(overlaps, threshold)
    assert len(set(overlaps.pair_truth[chosen])) == len(set(overlaps.pair_segment[chosen])) == chosen.sum()
    assert (overlaps.iou[chosen] >= threshold).all()
    if len(overlaps.truth_ids) and len(overlaps.segment_ids):
        iou = iou_matrix(*pair)
        total, pairs = best_assignment(np.where(iou >= threshold, iou, 0.0))
        assert overlaps.iou[chosen].sum() == pytest.approx(total, abs=1e-8)
        assert chosen.sum() == pairs


def test_equals_a_dense_assignment_on_a_crowded_image():
    rng = np.random.default_rng(7)
    truth = np.kron(rng.integers(0, 60, (20, 20)), np.ones((3, 3), int))
    segmentation = np.roll(truth, 1, axis=0) * 3 % 61
    overlaps = overlaps_of(truth, segmentation)
    iou = iou_matrix(truth, segmentation)
    for threshold in (0.1, 0.2, 0.3):
        worth = np.where(iou >= threshold, iou, 0.0)
        expected = worth[linear_sum_assignment(worth, maximize=True)].sum()
        assert overlaps.iou[match_objects(overlaps, threshold)].sum() == pytest.approx(expected, abs=1e-6)

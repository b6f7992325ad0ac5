"""Objects, their sizes, and the best segment of each."""

from __future__ import annotations

import numpy as np

from dendsam_deploy.metrics.contingency import ContingencyTable
from dendsam_deploy.metrics.overlaps import ObjectOverlaps


def overlaps_of(truth: list[int], segmentation: list[int]) -> ObjectOverlaps:
    return ObjectOverlaps.from_table(ContingencyTable.from_labels(np.array(truth), np.array(segmentation)))


def test_sizes_include_what_lies_on_background():
    overlaps = overlaps_of([4, 4, 4, 9, 0], [0, 2, 2, 0, 2])
    assert overlaps.truth_ids.tolist() == [4, 9]
    assert overlaps.truth_voxels.tolist() == [3, 1]
    assert overlaps.segment_ids.tolist() == [2]
    assert overlaps.segment_voxels.tolist() == [3]
    assert overlaps.pair_voxels.tolist() == [2]
    assert overlaps.iou.tolist() == [2 / 4]


def test_best_segment_of_each_object():
    overlaps = overlaps_of([4, 4, 4, 4, 4, 9], [2, 3, 3, 3, 0, 0])
    ids, iou = overlaps.best_segments()
    assert ids.tolist() == [3, 0]
    assert iou.tolist() == [3 / 5, 0]


def test_the_smaller_label_of_two_equal_segments_is_best():
    ids, _ = overlaps_of([1, 1], [8, 7]).best_segments()
    assert ids.tolist() == [7]


def test_best_segments_without_any_object():
    ids, iou = overlaps_of([0], [1]).best_segments()
    assert len(ids) == len(iou) == 0

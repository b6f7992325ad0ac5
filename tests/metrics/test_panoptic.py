"""Panoptic quality, worked by hand."""

from __future__ import annotations

import numpy as np
import pytest

from dendsam_deploy.errors import InvalidArgumentError
from dendsam_deploy.metrics.contingency import ContingencyTable
from dendsam_deploy.metrics.overlaps import ObjectOverlaps
from dendsam_deploy.metrics.panoptic import PanopticQuality, panoptic_quality


def quality(truth: list[int], segmentation: list[int], iou_threshold: float = 0.5) -> PanopticQuality:
    table = ContingencyTable.from_labels(np.array(truth), np.array(segmentation))
    return panoptic_quality(ObjectOverlaps.from_table(table), iou_threshold)


def test_found_missing_and_extra_objects():
    # Object 1 is found with IoU 3/4, object 2 is missing, segments 8 and 9 are extra: TP 1, FN 1, FP 2.
    found = quality([1, 1, 1, 1, 2, 2, 0, 0], [7, 7, 7, 0, 0, 0, 8, 9])
    assert found.sq == 3 / 4
    assert found.dq == 1 / (1 + 1 / 2 + 2 / 2)
    assert found.pq == found.sq * found.dq


def test_an_iou_of_exactly_one_half_does_not_match():
    assert quality([1, 1], [1, 0]) == PanopticQuality(sq=0.0, dq=0.0)
    assert quality([1, 1, 1], [1, 1, 0]) == PanopticQuality(sq=2 / 3, dq=1.0)


def test_a_stricter_threshold_drops_pairs():
    truth, segmentation = [1, 1, 1, 1, 2], [1, 1, 1, 0, 2]
    assert quality(truth, segmentation).dq == 1
    assert quality(truth, segmentation, 0.9) == PanopticQuality(sq=1.0, dq=1 / 2)


def test_no_object_on_either_side_is_perfect_and_on_one_side_is_zero():
    assert quality([0], [0]) == PanopticQuality(1.0, 1.0)
    assert quality([0], [1]).pq == quality([1], [0]).pq == 0


def test_thresholds_at_which_pairs_are_not_unique_are_refused():
    with pytest.raises(InvalidArgumentError, match=r"from 0\.5 on, not 0\.4"):
        quality([1], [1], 0.4)

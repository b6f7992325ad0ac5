"""Dice of the foreground and IoU of masks."""

from __future__ import annotations

import numpy as np
import pytest

from dendsam_deploy.errors import InvalidArgumentError
from dendsam_deploy.metrics.contingency import ContingencyTable
from dendsam_deploy.metrics.foreground import foreground_dice, mask_iou


@pytest.mark.parametrize(
    ("truth", "segmentation", "dice"),
    [
        ([1, 1, 2, 0], [3, 0, 4, 4], 2 * 2 / (3 + 3)),
        ([1, 2], [7, 7], 1.0),  # which object a voxel belongs to does not matter
        ([1, 0], [0, 1], 0.0),
        ([0, 0], [0, 0], 1.0),
        ([0, 0], [1, 0], 0.0),
    ],
)
def test_dice(truth, segmentation, dice):
    assert foreground_dice(ContingencyTable.from_labels(np.array(truth), np.array(segmentation))) == dice


def test_mask_iou():
    mask = np.array([[True, True], [False, False]])
    assert mask_iou(mask, mask) == 1
    assert mask_iou(mask, mask.T) == 1 / 3
    assert mask_iou(mask, ~mask) == 0
    assert mask_iou(mask & False, mask & False) == 1


def test_masks_that_are_not_comparable_are_refused():
    with pytest.raises(InvalidArgumentError, match=r"bool\(2,\) and bool\(1,\)"):
        mask_iou(np.ones(2, bool), np.ones(1, bool))
    with pytest.raises(InvalidArgumentError, match="expected bool"):
        mask_iou(np.ones(2, bool), np.ones(2))

"""Dice of the foreground."""

from __future__ import annotations

import numpy as np
import pytest

from dendsam_deploy.metrics.contingency import ContingencyTable
from dendsam_deploy.metrics.foreground import foreground_dice


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

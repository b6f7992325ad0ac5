"""What training takes from a label volume: objects and their boxes, the held-out block of slices, the zoom.

Shared by the detector's and SAM's training, so that both learn from the same objects of the same slices at one scale.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from dendsam_deploy.errors import InvalidArgumentError
from dendsam_deploy.volume.label_objects import ObjectBoxes, boxes_from_labels, label_components

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["ObjectBoxes", "boxes_from_labels", "label_components", "plan_zoom", "split_blocks"]

TYPICAL_OBJECT_PX = 45.0
"""Side to which the median object is brought, model px: 3 cells of the embedding, 11 of a mask, 6 of the detector."""


def split_blocks(
    depth: int, holdout_fraction: float, gap: int, allowed: tuple[int, int] | None = None
) -> tuple[range, range]:
    """Divide the slices of a volume into a block to train on and a block to judge by.

    Neighbouring sections show nearly the same picture, so a random choice of slices would test on what was trained.
    The held-out block is the last one; `gap` slices before it serve neither purpose.

    Parameters
    ----------
    depth : int
        Number of slices of the volume.
    holdout_fraction : float
        Part of the allowed slices to hold out, 0 to below 1. Unless it is 0, at least one slice is held out where there
        are two or more.
    gap : int
        Unused slices between the blocks; fewer where nothing would be left to train on.
    allowed : (int, int), optional
        Half-open range of slices that may be used at all. The default is every slice.

    Returns
    -------
    (range, range)
        Slices for training and held-out slices.

    Raises
    ------
    InvalidArgumentError
        If the range is empty or leaves the volume, or a number is out of range.
    """
    first, end = (0, depth) if allowed is None else allowed
    if not 0 <= first < end <= depth:
        raise InvalidArgumentError(
            f"slices {first}:{end} do not lie in a volume of {depth} slices; give 0:{depth} or a part of it"
        )
    if not 0 <= holdout_fraction < 1 or gap < 0:
        raise InvalidArgumentError(
            f"cannot hold out {holdout_fraction:g} of the slices behind a gap of {gap}; "
            "give a fraction of 0 to below 1 and a gap of 0 or more"
        )
    count = end - first
    held_out = min(max(1, round(count * holdout_fraction)), count - 1) if holdout_fraction > 0 else 0
    gap = min(gap, count - held_out - 1) if held_out else 0
    return range(first, end - held_out - gap), range(end - held_out, end)


def plan_zoom(areas_px: NDArray[np.int64]) -> float:
    """Choose the zoom at which a typical object has the size that the models are good at.

    Parameters
    ----------
    areas_px : ndarray, shape (N,)
        Areas of the objects in single slices, slice px.

    Returns
    -------
    float
        Model px per slice px: the power of the square root of 2 that brings the median of ``sqrt(area)`` closest to
        `TYPICAL_OBJECT_PX`.

    Raises
    ------
    InvalidArgumentError
        If there are no objects.
    """
    if len(areas_px) == 0:
        raise InvalidArgumentError(
            "no labelled object in the chosen slices, so no zoom can be planned; choose other slices"
        )
    typical_px = float(np.median(np.sqrt(areas_px)))
    return float(2.0 ** (round(2 * math.log2(TYPICAL_OBJECT_PX / typical_px)) / 2))

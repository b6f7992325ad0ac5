"""What training takes from a label volume: objects and their boxes, the held-out block of slices, the zoom.

Shared by the detector's and SAM's training, so that both learn from the same objects of the same slices at one scale.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from scipy import ndimage

from dendsam_deploy.errors import InvalidArgumentError

if TYPE_CHECKING:
    from numpy.typing import NDArray

TYPICAL_OBJECT_PX = 48.0
"""Side to which the median object is brought, model px: three embedding cells, six of the detector's finest cells."""

_EIGHT_CONNECTED = np.ones((3, 3), bool)


class ObjectBoxes(NamedTuple):
    """The objects of one slice; row ``i`` of each array describes object ``i``.

    Parameters
    ----------
    boxes_xyxy : ndarray, shape (N, 4), float32
        Pixel edges in slice px: ``x1`` and ``y1`` lie behind the last pixel.
    ids : ndarray, shape (N,), uint32
        The label that each object belongs to; a label in several pieces appears several times.
    areas_px : ndarray, shape (N,), int64
        Labelled pixels.
    """

    boxes_xyxy: NDArray[np.float32]
    ids: NDArray[np.uint32]
    areas_px: NDArray[np.int64]


def label_components(labels: NDArray[np.uint32]) -> tuple[NDArray[np.int32], NDArray[np.uint32]]:
    """Find the 8-connected pieces of each label of a slice.

    A process that bends through the section plane shows as several profiles of one label; to a detector and to a box
    prompt these are separate objects.

    Parameters
    ----------
    labels : ndarray, shape (Y, X), uint32
        Instance labels, 0 is background.

    Returns
    -------
    components : ndarray, shape (Y, X), int32
        Pieces numbered 1 to N in the order of their labels, 0 is background.
    ids : ndarray, shape (N,), uint32
        The label of piece ``i + 1``.
    """
    present = np.unique(labels)
    present = present[present > 0]
    # Labels may be huge numbers, but find_objects makes a table as long as the largest one.
    compact = np.searchsorted(present, labels).astype(np.int32) + 1
    compact[labels == 0] = 0
    components = np.zeros(labels.shape, np.int32)
    ids: list[np.ndarray] = []
    count = 0
    for index, window in enumerate(ndimage.find_objects(compact, len(present))):
        pieces, found = ndimage.label(compact[window] == index + 1, structure=_EIGHT_CONNECTED)
        components[window] += np.where(pieces > 0, pieces + count, 0)
        ids.append(np.full(found, present[index], np.uint32))
        count += found
    return components, np.concatenate([np.zeros(0, np.uint32), *ids])


def boxes_from_labels(labels: NDArray[np.uint32], min_area_px: int = 1) -> ObjectBoxes:
    """Return the tight box of each 8-connected piece of each label of a slice.

    Parameters
    ----------
    labels : ndarray, shape (Y, X), uint32
        Instance labels, 0 is background.
    min_area_px : int
        Pieces with fewer pixels are left out.
    """
    components, ids = label_components(labels)
    areas = np.bincount(components.ravel(), minlength=len(ids) + 1)[1:].astype(np.int64)
    windows = ndimage.find_objects(components, len(ids))
    boxes = np.array([(x.start, y.start, x.stop, y.stop) for y, x in windows], np.float32).reshape(-1, 4)
    large = areas >= min_area_px
    return ObjectBoxes(boxes[large], ids[large], areas[large])


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

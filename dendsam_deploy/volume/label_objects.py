"""Objects of a label slice: connected pieces of labels, and their tight boxes."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from scipy import ndimage

if TYPE_CHECKING:
    from numpy.typing import NDArray

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

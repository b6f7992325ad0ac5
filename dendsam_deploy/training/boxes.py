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
    from collections.abc import Sequence

    from numpy.typing import NDArray

__all__ = [
    "ObjectBoxes",
    "boxes_from_labels",
    "label_components",
    "plan_zoom",
    "slice_blocks",
    "slices_text",
    "split_blocks",
]

TYPICAL_OBJECT_PX = 45.0
"""Side to which the median object is brought, model px: 3 cells of the embedding, 11 of a mask, 6 of the detector."""


def split_blocks(
    depth: int,
    holdout_fraction: float,
    gap: int,
    allowed: tuple[int, int] | None = None,
    held_out: Sequence[tuple[int, int]] = (),
) -> tuple[Sequence[int], Sequence[int]]:
    """Divide the slices of a volume into those to train on and those to judge by.

    Neighbouring sections show nearly the same picture, so a random choice of slices would test on what was trained.
    The held-out slices are the last block, or the ranges that are named; slices of which one of them is at most `gap`
    away serve neither purpose.

    Parameters
    ----------
    depth : int
        Number of slices of the volume.
    holdout_fraction : float
        Part of the allowed slices to hold out, 0 to below 1. Unless it is 0, at least one slice is held out where there
        are two or more, and at least one is left to train on.
    gap : int
        Unused slices between both kinds.
    allowed : (int, int), optional
        Half-open range of slices that may be used at all. The default is every slice.
    held_out : sequence of (int, int)
        Half-open ranges to hold out in place of a fraction.

    Returns
    -------
    (sequence of int, sequence of int)
        Slices for training and held-out slices, ascending; a `range` where they are contiguous.

    Raises
    ------
    InvalidArgumentError
        If a range is empty or leaves the volume, a number is out of range, or nothing would be left to train on.
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
    if held_out:
        return _around(range(first, end), held_out, gap)
    count = end - first
    judged = min(max(1, round(count * holdout_fraction)), count - 1 - gap) if holdout_fraction > 0 else 0
    if judged < 1 and holdout_fraction > 0:
        raise InvalidArgumentError(
            f"training needs at least {gap + 2} slices, one of them held out behind a gap of {gap}, but slices "
            f"{first}:{end} are {count}; give more slices or a smaller gap"
        )
    return range(first, end - judged - gap if judged else end), range(end - judged, end)


def _around(allowed: range, held_out: Sequence[tuple[int, int]], gap: int) -> tuple[Sequence[int], Sequence[int]]:
    """Return the slices that named ranges leave to train on, and those of the ranges."""
    for first, end in held_out:
        if not allowed.start <= first < end <= allowed.stop:
            raise InvalidArgumentError(
                f"slices {first}:{end} cannot be held out, because slices {allowed.start}:{allowed.stop} are used; "
                "hold out some of these"
            )
    judge = sorted({z for pair in held_out for z in range(*pair)})
    near = {z + step for z in judge for step in range(-gap, gap + 1)}
    train = [z for z in allowed if z not in near]
    if not train:
        raise InvalidArgumentError(
            f"holding out {len(judge)} of {len(allowed)} slices with a gap of {gap} leaves none to train on; "
            "hold out fewer or use more slices"
        )
    return _contiguous(train), _contiguous(judge)


def slice_blocks(slices: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Return ascending slices as half-open ranges.

    Examples
    --------
    >>> slice_blocks([0, 1, 2, 5, 6])
    ((0, 3), (5, 7))
    """
    starts = [z for index, z in enumerate(slices) if index == 0 or slices[index - 1] != z - 1]
    stops = [z + 1 for index, z in enumerate(slices) if index == len(slices) - 1 or slices[index + 1] != z + 1]
    return tuple(zip(starts, stops, strict=True))


def slices_text(slices: Sequence[int]) -> str:
    """Return slices as one would type them, such as ``0:40`` or ``0:40+50:60``."""
    return "+".join(f"{first}:{stop}" for first, stop in slice_blocks(slices))


def _contiguous(slices: Sequence[int]) -> Sequence[int]:
    """Return ascending slices as a range where they are one, for that is quick to search, and else as a tuple."""
    whole = range(slices[0], slices[-1] + 1)
    return whole if len(whole) == len(slices) else tuple(slices)


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

"""Masks of a volume on their way to other programs.

All formats follow one convention for places: pixel ``(row, column)`` is the square from ``(column, row)`` to
``(column + 1, row + 1)``. Coordinates name corners of pixels and not their centres, the box of a single pixel in the
upper left corner is 0, 0 to 1, 1, and the widths of boxes are counts of pixels. Slices count from 0 in the input
volume.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dendsam_deploy.errors import InvalidArgumentError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from dendsam_deploy.instances import RunLengths


@dataclass(frozen=True, slots=True)
class SliceMasks:
    """The masks of one slice.

    Parameters
    ----------
    z : int
        Slice of the input volume, from 0.
    slice_hw : (int, int)
        Its shape.
    masks : tuple of RunLengths
        N masks; they may overlap. One without pixels has no place in a table of objects and is refused.
    ids : ndarray, shape (N,), int64
        Object that each mask belongs to; two masks of a slice may belong to one.
    scores : ndarray, shape (N,), float64
        Confidence, 0 to 1.
    """

    z: int
    slice_hw: tuple[int, int]
    masks: tuple[RunLengths, ...]
    ids: NDArray[np.int64]
    scores: NDArray[np.float64]

    def __post_init__(self) -> None:
        if len(self.ids) != len(self.masks) or len(self.scores) != len(self.masks):
            raise InvalidArgumentError(
                f"slice {self.z} has {len(self.masks)} masks, {len(self.ids)} ids and {len(self.scores)} scores; "
                "expected as many of each"
            )
        for mask, number in zip(self.masks, self.ids.tolist(), strict=True):
            window = mask.window
            inside = window.y1 <= self.slice_hw[0] and window.x1 <= self.slice_hw[1] and min(window.y0, window.x0) >= 0
            if not mask.area_px or not inside:
                raise InvalidArgumentError(
                    f"slice {self.z}: the mask of object {number} is empty or leaves the slice of {self.slice_hw} px"
                )


def tight_box_xyxy(mask: RunLengths) -> tuple[int, int, int, int]:
    """Return the smallest box ``(x0, y0, x1, y1)`` around the pixels of a mask, pixel edges, slice px."""
    rows, first, length = mask.runs.T
    y0, x0 = mask.window.y0, mask.window.x0
    return (
        x0 + int(first.min()),
        y0 + int(rows.min()),
        x0 + int((first + length).max()),
        y0 + int(rows.max()) + 1,
    )

"""Agreement of the masks of a slice with those of the slices below and above."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dendsam_deploy.pipeline.link_align import find_shift
from dendsam_deploy.pipeline.link_overlap import SliceRuns, measure_overlaps

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from numpy.typing import NDArray

    from dendsam_deploy.instances import Instances


@dataclass(frozen=True, slots=True)
class Agreement:
    """Agreement of the N masks of a slice.

    Parameters
    ----------
    below, above : ndarray, shape (N,), float32
        Largest IoU with a mask of slice z - 1 and of slice z + 1. NaN where that slice is not known, as at the ends of
        a stack; 0 where it is known and shows nothing there.
    """

    below: NDArray[np.float32]
    above: NDArray[np.float32]

    @property
    def best(self) -> NDArray[np.float32]:
        """The larger of the two, since a dendrite may begin or end here; NaN where neither slice is known."""
        best: NDArray[np.float32] = np.fmax(self.below, self.above)
        return best


def agreements(slices: Iterable[tuple[int, Instances]]) -> Iterator[tuple[int, Agreement]]:
    """Measure how well the masks of consecutive slices agree.

    A shift of the whole section that its objects make evident is undone first (`link_align.find_shift`), as in linking.

    Parameters
    ----------
    slices : iterable of (int, Instances)
        Slices with ascending z; where a z is missing, both sides of the gap are ends.

    Yields
    ------
    (int, Agreement)
        One for each slice, in order; two slices are held at a time.
    """
    waiting: tuple[int, SliceRuns, NDArray[np.float32]] | None = None
    for z, instances in slices:
        runs = SliceRuns.from_instances(instances)
        below = np.full(len(runs), np.nan, np.float32)
        if waiting is not None:
            before_z, before, its_below = waiting
            above = np.full(len(before), np.nan, np.float32)
            if before_z == z - 1:
                above, below = _best_pairs(before, runs)
            yield before_z, Agreement(its_below, above)
        waiting = z, runs, below
    if waiting is not None:
        z, runs, below = waiting
        yield z, Agreement(below, np.full(len(runs), np.nan, np.float32))


def _best_pairs(lower: SliceRuns, upper: SliceRuns) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return for each mask of two neighbouring slices the largest IoU with one of the other slice."""
    of_lower, of_upper = np.zeros(len(lower), np.float32), np.zeros(len(upper), np.float32)
    if len(lower) and len(upper):
        overlaps = measure_overlaps(lower, upper.moved(find_shift(lower, upper)))
        np.maximum.at(of_lower, overlaps.lower, overlaps.iou.astype(np.float32))
        np.maximum.at(of_upper, overlaps.upper, overlaps.iou.astype(np.float32))
    return of_lower, of_upper

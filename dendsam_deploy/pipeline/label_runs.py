"""A label image as runs of equal pixels: pieces, holes and outlines cost as much as the objects are long, not large."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from dendsam_deploy.geometry import Window
from dendsam_deploy.instances import RunLengths

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class LabelRuns:
    """The longest runs of equal labels within the rows of an image, background included, in reading order.

    Parameters
    ----------
    shape_hw : (int, int)
        Shape of the image.
    starts : ndarray, shape (R,), int64
        First pixel of each run, counted row by row; the first is 0, and each run ends where the next one starts.
    labels : ndarray, shape (R,)
        Its label; 0 is background.
    """

    shape_hw: tuple[int, int]
    starts: NDArray[np.int64]
    labels: NDArray[np.int64]

    @classmethod
    def of(cls, image: NDArray[np.integer]) -> LabelRuns:
        """Find the runs of an image ``(Y, X)``."""
        pixels = image.reshape(-1)
        begins = np.empty(len(pixels), bool)
        np.not_equal(pixels[1:], pixels[:-1], out=begins[1:])
        begins[:: image.shape[1]] = True
        starts = np.flatnonzero(begins)
        return cls((image.shape[0], image.shape[1]), starts, pixels[starts].astype(np.int64))

    @property
    def stops(self) -> NDArray[np.int64]:
        """The pixel after each run."""
        return np.append(self.starts[1:], self.shape_hw[0] * self.shape_hw[1])

    @property
    def lengths_px(self) -> NDArray[np.int64]:
        """Number of pixels of each run."""
        return self.stops - self.starts

    def to_image(self) -> NDArray[np.uint32]:
        """Return the image."""
        return np.repeat(self.labels.astype(np.uint32), self.lengths_px).reshape(self.shape_hw)

    def pieces(self, chosen: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Tell the connected pieces of some labels apart; pixels that share a corner are connected.

        Parameters
        ----------
        chosen : ndarray, shape (R,), bool
            Runs of those labels.

        Returns
        -------
        ndarray, shape (R,), int64
            For each chosen run its piece, from 1; 0 for the others.
        """
        (members,) = np.nonzero(chosen)
        pairs, below = self._in_row(members, 1, reach=1)
        joined = self.labels[members[pairs]] == self.labels[below]
        piece = np.zeros(len(self.starts), np.int64)
        piece[members] = np.arange(1, len(members) + 1)
        piece[members] = 1 + _connected(len(members), pairs[joined], piece[below[joined]] - 1)
        return piece

    def without_holes(self, below_px: float) -> LabelRuns:
        """Fill holes of fewer pixels that one object alone encloses; the border of the image encloses nothing.

        Parameters
        ----------
        below_px : float
            Size from which a hole stays.
        """
        # Every run of such a hole has the object on its left and right, and over and under it nothing but the object
        # and further runs of the hole. Each run that could be one takes the label beside it, until a stranger is met.
        holes = self._between_one_label()
        filled = self.labels.copy()
        filled[holes] = self.labels[holes - 1]
        number = np.full(len(self.labels), -1)
        number[holes] = np.arange(len(holes))
        sides = [self._in_row(holes, offset, reach=0) for offset in (-1, 1)]
        pairs, beside = (np.concatenate(found) for found in zip(*sides, strict=True))
        linked = number[beside] >= 0
        hole = _connected(len(holes), pairs[linked], number[beside[linked]])
        strangers = np.bincount(hole[pairs], filled[beside] != filled[holes[pairs]], len(holes))
        is_small = np.bincount(hole, self.lengths_px[holes], len(holes)) < below_px
        stays = ~is_small | (strangers > 0)
        filled[holes[stays[hole]]] = 0
        return replace(self, labels=filled)._merged()

    def outlines(self, count: int) -> tuple[RunLengths, ...]:
        """Return the objects ``1 ... count``, each of which has pixels, inside their bounding windows."""
        order = np.argsort(self.labels, kind="stable")
        order = order[np.searchsorted(self.labels[order], 1) :]
        first = np.searchsorted(self.labels[order], np.arange(1, count + 1))
        width = self.shape_hw[1]
        rows, columns = np.divmod(self.starts[order], width)
        ends = columns + self.lengths_px[order]
        found = []
        if count:
            y0, y1 = (edge.reduceat(rows, first) for edge in (np.minimum, np.maximum))
            x0, x1 = np.minimum.reduceat(columns, first), np.maximum.reduceat(ends, first)
            own = self.labels[order] - 1
            runs = np.stack([rows - y0[own], columns - x0[own], ends - columns], axis=1).astype(np.int32)
            windows = zip(*(edge.tolist() for edge in (y0, x0, y1 + 1 - y0, x1 - x0)), strict=True)
            found = [
                RunLengths(Window(*window), part)
                for window, part in zip(windows, np.split(runs, first[1:]), strict=True)
            ]
        return tuple(found)

    def _in_row(
        self, members: NDArray[np.int64], offset: int, reach: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return which runs of a row nearby lie over or under some runs, or up to `reach` pixels beside that.

        Parameters
        ----------
        members : ndarray, shape (M,), int64
            Runs.
        offset : int
            1 for the next row, -1 for the one before.
        reach : int
            1 where pixels that share a corner meet, else 0.

        Returns
        -------
        pairs, met : ndarray, shape (P,), int64
            Run ``members[pairs[p]]`` meets run ``met[p]``; none where there is no such row.
        """
        height, width = self.shape_hw
        row = self.starts[members] // width + offset
        shift = offset * width
        begin = np.maximum(self.starts[members] + shift - reach, row * width)
        end = np.minimum(self.stops[members] + shift + reach, (row + 1) * width)
        # Runs cover the image without gaps, so those that an interval meets follow each other.
        low = np.searchsorted(self.starts, begin, side="right") - 1
        counts = np.where((row >= 0) & (row < height), np.searchsorted(self.starts, end, side="left") - low, 0)
        skipped = np.cumsum(counts) - counts
        met = np.arange(counts.sum()) + np.repeat(low - skipped, counts)
        return np.repeat(np.arange(len(members)), counts), met

    def _between_one_label(self) -> NDArray[np.int64]:
        """Return the runs of background with the same object on either side, which the border of the image is not."""
        height, width = self.shape_hw
        found = np.flatnonzero(self.labels[1:-1] == 0) + 1
        row, column = np.divmod(self.starts[found], width)
        inside = (row > 0) & (row < height - 1) & (column > 0) & (self.stops[found] % width > 0)
        alike: NDArray[np.bool_] = self.labels[found - 1] == self.labels[found + 1]
        return found[inside & alike]

    def _merged(self) -> LabelRuns:
        """Join neighbours of one label."""
        begins = np.append(True, self.labels[1:] != self.labels[:-1]) | (self.starts % self.shape_hw[1] == 0)
        return LabelRuns(self.shape_hw, self.starts[begins], self.labels[begins])


def _connected(count: int, first: NDArray[np.int64], second: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return for each of `count` nodes the number, from 0, of the component that edges put it into."""
    edges = coo_array((np.ones(len(first), bool), (first, second)), shape=(count, count))
    component: NDArray[np.int64] = connected_components(edges, directed=False)[1].astype(np.int64)
    return component

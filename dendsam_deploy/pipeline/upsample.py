"""Mask logits from the network's S/4 grid to the pixels of the slice, each inside its own small window."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from dendsam_deploy.geometry import LOGIT_STRIDE_PX, Window, bilinear_matrix

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from dendsam_deploy.instances import Masks
    from dendsam_deploy.pipeline.prepare import TilePlan


@dataclass(frozen=True, slots=True)
class LogitWindow:
    """The logits of one mask at full resolution.

    Parameters
    ----------
    window : Window
        Where they lie, slice px.
    logits : ndarray, shape (window.height, window.width), float32
        Interpolated logits. Outside the window the mask has no foreground.
    """

    window: Window
    logits: NDArray[np.float32]


def upsample_mask(masks: Masks, index: int, plan: TilePlan, mask_logit: float) -> LogitWindow:
    """Interpolate one mask's logits; see `upsample_masks`."""
    return next(islice(upsample_masks(masks, plan, mask_logit), index, None))


def upsample_masks(masks: Masks, plan: TilePlan, mask_logit: float) -> Iterator[LogitWindow]:
    """Interpolate the logits of masks wherever they can exceed a threshold.

    Interpolation is bilinear between cell centres, without antialiasing; at zoom 1 it equals
    ``torch.nn.functional.interpolate(mode="bilinear", align_corners=False)`` of the whole S/4 grid, cut to the window.
    Beyond the outermost cell centres of a region its neighbours are unknown, so nothing is said there, unless the tile
    ends.

    Parameters
    ----------
    masks : Masks
        Decoded masks of a slice.
    plan : TilePlan
        How the slice was cut.
    mask_logit : float
        The threshold.

    Yields
    ------
    LogitWindow
        One for each mask.
    """
    if not len(masks):
        return
    extents = _extents(masks.logits, mask_logit)
    corners = np.array([(tile.read.y0, tile.read.x0) for tile in plan.tiles])[masks.tile_index]
    axes = [_Axis(plan, axis, corners[:, axis], masks.origins_yx[:, axis], extents[:, axis]) for axis in (0, 1)]
    for index, logits in enumerate(masks.logits):
        if extents[index, 0, 1] == 0:
            yield LogitWindow(Window(0, 0, 0, 0), np.zeros((0, 0), np.float32))
            continue
        (rows, y0, vertical), (columns, x0, horizontal) = axes[0].cut(index), axes[1].cut(index)
        fine = vertical @ logits[rows, columns] @ horizontal.T
        yield LogitWindow(Window(y0, x0, len(vertical), len(horizontal)), fine.astype(np.float32, copy=False))


def _extents(logits: Sequence[NDArray[np.float32]], mask_logit: float) -> NDArray[np.int64]:
    """Return which cells of each region are interpolated between: those above the threshold and one more on each side.

    Parameters
    ----------
    logits : sequence of ndarray, each of shape (side, side), float32
        Regions.
    mask_logit : float
        The threshold.

    Returns
    -------
    ndarray, shape (N, 2, 2), int64
        ``[i, axis]`` is the first cell and the one after the last; 0 and 0 where nothing exceeds the threshold.
    """
    extents = np.zeros((len(logits), 2, 2), np.int64)
    sides = np.array([len(region) for region in logits])
    for side in np.unique(sides):
        (alike,) = np.nonzero(sides == side)
        above = np.stack([logits[index] for index in alike.tolist()]) > np.float32(mask_logit)
        for axis in (0, 1):
            hits = np.any(above, axis=2 - axis)
            last = np.minimum(side - np.argmax(hits[:, ::-1], axis=1) + 1, side)
            extents[alike, axis, 0] = np.maximum(np.argmax(hits, axis=1) - 1, 0)
            extents[alike, axis, 1] = np.where(np.any(hits, axis=1), last, 0)
    return extents


class _Axis:
    """One axis of all masks of a slice; those of tiles that begin at one model px share a matrix.

    Parameters
    ----------
    plan : TilePlan
        How the slice was cut.
    axis : int
        0 for y, 1 for x.
    tile_starts : ndarray, shape (N,), int64
        First model px of each mask's tile.
    origins : ndarray, shape (N,), int64
        First cell of each mask's region in its tile.
    extents : ndarray, shape (N, 2), int64
        Cells of each region, see `_extents`.
    """

    def __init__(
        self,
        plan: TilePlan,
        axis: int,
        tile_starts: NDArray[np.int64],
        origins: NDArray[np.int64],
        extents: NDArray[np.int64],
    ) -> None:
        self._scale, self._limit = plan.frame.scale_yx[axis], plan.frame.slice_hw[axis]
        self._cells = plan.tile_size_px // LOGIT_STRIDE_PX
        cells = extents + origins[:, None]
        self._rows = np.stack([extents, cells, self._pixels(tile_starts, cells)], axis=1).reshape(-1, 6).tolist()
        self._starts = tile_starts.tolist()
        self._matrices = {start: self._matrix(start) for start in set(self._starts)}

    def cut(self, index: int) -> tuple[slice, int, NDArray[np.float32]]:
        """Return the cells of one mask's region, the first of the slice px there, and the matrix that samples them."""
        first, last, first_cell, last_cell, low, high = self._rows[index]
        begin, matrix = self._matrices[self._starts[index]]
        return slice(first, last), low, matrix[low - begin : high - begin, first_cell:last_cell]

    def _matrix(self, tile_start: int) -> tuple[int, NDArray[np.float32]]:
        """Return the first slice px of a tile, and the matrix that samples all its cells at the centres of its px."""
        ((first, last),) = self._pixels(np.array([tile_start]), np.array([[0, self._cells]])).tolist()
        centres = (np.arange(first, last, dtype=np.float64) + 0.5) * self._scale - tile_start
        return first, bilinear_matrix(self._cells, centres, 0, LOGIT_STRIDE_PX)

    def _pixels(self, tile_starts: NDArray[np.int64], cells: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the half-open ranges ``(N, 2)`` of slice px whose centres lie between the outermost cell centres."""
        half = LOGIT_STRIDE_PX / 2
        start = cells[:, 0] * LOGIT_STRIDE_PX + np.where(cells[:, 0] > 0, half, 0)
        stop = cells[:, 1] * LOGIT_STRIDE_PX - np.where(cells[:, 1] < self._cells, half, 0)
        low, high = (np.ceil((tile_starts + edge) / self._scale - 0.5).astype(np.int64) for edge in (start, stop))
        low, high = np.maximum(low, 0), np.maximum(np.maximum(high, low), 0)
        return np.minimum(np.stack([low, high], axis=1), self._limit)

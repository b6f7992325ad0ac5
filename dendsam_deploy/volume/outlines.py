"""Outlines of masks along the edges of their pixels: polygons that enclose exactly the area of the mask."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dendsam_deploy.instances import RunLengths

_STEPS_XY = np.array([(1, 0), (0, 1), (-1, 0), (0, -1)], np.int64)
"""Directions of edges in the order of right turns, y pointing down: right, down, left, up."""


def trace_outlines(mask: RunLengths) -> list[NDArray[np.int64]]:
    """Trace the borders of a mask.

    Pixel ``(row, column)`` is the square from ``(column, row)`` to ``(column + 1, row + 1)``, so corners are whole
    numbers. Pieces that share nothing but a corner get outlines of their own, and no outline crosses itself.

    Parameters
    ----------
    mask : RunLengths
        The mask; it may have several pieces and holes.

    Returns
    -------
    list of ndarray, shape (K, 2), int64
        Corners ``(x, y)``, slice px, of one closed polygon each, the first not repeated at the end. Pieces run
        clockwise on the screen and holes the other way round, so `signed_area_px` adds up to the area of the mask.
        They are ordered by their first corner in reading order.
    """
    starts_xy, direction = _edges(np.pad(mask.to_mask(), 1))
    if not len(starts_xy):
        return []
    following = _successors(starts_xy, direction)
    corner_xy = starts_xy + np.array([mask.window.x0 - 1, mask.window.y0 - 1])
    # A corner is where the outline turns; what lies between is left out.
    turns = np.zeros(len(direction), bool)
    turns[following] = direction != direction[following]
    seen = np.zeros(len(direction), bool)
    nexts, outlines = following.tolist(), []
    for first in range(len(direction)):
        if seen[first]:
            continue
        loop = [first]
        while (edge := nexts[loop[-1]]) != first:
            loop.append(edge)
        members = np.array(loop)
        seen[members] = True
        outlines.append(corner_xy[members[turns[members]]])
    return outlines


def signed_area_px(outline_xy: NDArray[np.integer] | NDArray[np.floating]) -> float:
    """Return the area inside a closed polygon ``(K, 2)`` by the shoelace formula; below 0 where it runs like a hole."""
    x, y = outline_xy.astype(np.float64).T
    return float((x * np.roll(y, -1) - np.roll(x, -1) * y).sum() / 2)


def _edges(padded: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return start ``(E, 2)`` and direction ``(E,)`` of the border edges, the mask on their right-hand side.

    They are in reading order of their starts.
    """
    down = np.diff(padded.astype(np.int8), axis=0)  # [r, c]: between the rows r and r + 1
    across = np.diff(padded.astype(np.int8), axis=1)
    parts = []
    for direction, change, sign, offset_yx in (
        (0, down, 1, (1, 0)),  # upper edge of a pixel, from its left corner
        (1, across, -1, (0, 1)),  # right edge, from its upper corner
        (2, down, -1, (1, 1)),  # lower edge, from its right corner
        (3, across, 1, (1, 1)),  # left edge, from its lower corner
    ):
        rows, columns = np.nonzero(change == sign)
        start = np.stack([columns + offset_yx[1], rows + offset_yx[0]], axis=1)
        parts.append(np.column_stack([start, np.full(len(start), direction)]))
    edges = np.concatenate(parts).astype(np.int64)
    edges = edges[np.lexsort((edges[:, 2], edges[:, 0], edges[:, 1]))]
    return edges[:, :2], edges[:, 2]


def _successors(starts_xy: NDArray[np.int64], direction: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return for each edge the one that follows it on the outline."""
    ends_xy = starts_xy + _STEPS_XY[direction]
    stride = int(starts_xy[:, 0].max()) + 2
    start_key = starts_xy[:, 1] * stride + starts_xy[:, 0]
    end_key = ends_xy[:, 1] * stride + ends_xy[:, 0]
    first = np.searchsorted(start_key, end_key, side="left")
    last = np.searchsorted(start_key, end_key, side="right") - 1
    # Where two pixels meet in a corner two edges leave it: the right turn stays with the pixel.
    turns_right = direction[last] == (direction + 1) % 4
    return np.where(turns_right, last, first)

"""Find the rigid shift between two slices from their objects, for sections that were cut or imaged out of place."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dendsam_deploy.pipeline.link_overlap import measure_overlaps

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dendsam_deploy.pipeline.link_overlap import SliceRuns

_REACH = 2.0
"""Farthest shift that is looked for, in diameters (square roots of the median area) of the objects."""

_CELLS = 32
"""Cells of the voting grid along one axis."""

_MOST_OBJECTS = 500
"""The largest objects of a slice vote; their number bounds the cost."""

_MOST_AREA_RATIO = 1.25
"""Only objects of nearly equal area vote for the shift between them."""

_LEAST_VOTES = 8
"""Fewer agreeing pairs could be chance, or a few dendrites that really move."""

_LEAST_GAIN = 0.02
"""A shift must raise the agreement of the slices by this much; well aligned stacks stay exactly as they are."""


def find_shift(lower: SliceRuns, upper: SliceRuns) -> tuple[int, int]:
    """Find by how much `upper` has to move so that its objects lie over those of `lower`.

    Every pair of objects of similar area votes for the difference of its centroids (a generalised Hough transform).
    The winning shift is taken only where it makes the objects overlap better than no shift does.

    Parameters
    ----------
    lower, upper : SliceRuns
        Two slices.

    Returns
    -------
    (int, int)
        Shift ``(dy, dx)`` in px; ``(0, 0)`` where none is evident.

    References
    ----------
    Ballard 1981, Pattern Recognition 13:111, doi:10.1016/0031-3203(81)90009-1 (voting).
    """
    shift_yx = _vote(lower, upper)
    if shift_yx == (0, 0):
        return shift_yx
    gain = _agreement(lower, upper.moved(shift_yx)) - _agreement(lower, upper)
    return shift_yx if gain > _LEAST_GAIN else (0, 0)


def _vote(lower: SliceRuns, upper: SliceRuns) -> tuple[int, int]:
    """Return the most popular displacement; see `find_shift`."""
    few_lower, few_upper = (np.argsort(-runs.areas_px, kind="stable")[:_MOST_OBJECTS] for runs in (lower, upper))
    areas_lower, areas_upper = lower.areas_px[few_lower], upper.areas_px[few_upper]
    if min(len(areas_lower), len(areas_upper)) < _LEAST_VOTES:
        return 0, 0
    reach_px = _REACH * float(np.sqrt(np.median(np.concatenate([areas_lower, areas_upper]))))

    displacements = lower.centroids_yx[few_lower][:, None] - upper.centroids_yx[few_upper][None]
    similar = np.abs(np.log(areas_lower[:, None] / areas_upper[None])) < np.log(_MOST_AREA_RATIO)
    chosen = similar & (np.abs(displacements) < reach_px).all(axis=2)
    votes_yx = displacements[chosen]
    weights = np.sqrt(np.broadcast_to(areas_lower[:, None], chosen.shape)[chosen])

    grid, edges_y, _ = np.histogram2d(
        votes_yx[:, 0], votes_yx[:, 1], bins=_CELLS, range=[[-reach_px, reach_px]] * 2, weights=weights
    )
    row, column = np.unravel_index(int(np.argmax(_smoothed(grid))), grid.shape)
    cell_px = float(edges_y[1] - edges_y[0])
    winner_yx = (np.array([row, column]) + 0.5) * cell_px - reach_px
    supporters_yx = votes_yx[(np.abs(votes_yx - winner_yx) <= 1.5 * cell_px).all(axis=1)]
    if len(supporters_yx) < _LEAST_VOTES:
        return 0, 0
    dy, dx = np.rint(np.median(supporters_yx, axis=0)).astype(int).tolist()
    return dy, dx


def _smoothed(grid: NDArray[np.float64]) -> NDArray[np.float64]:
    """Blur a grid with the binomial kernel 1-2-1 along both axes, so that votes on both sides of an edge add up."""
    padded = np.pad(grid, 1)
    blurred = padded[:-2] + 2 * padded[1:-1] + padded[2:]
    result: NDArray[np.float64] = blurred[:, :-2] + 2 * blurred[:, 1:-1] + blurred[:, 2:]
    return result


def _agreement(lower: SliceRuns, upper: SliceRuns) -> float:
    """Return the mean over `lower`, weighted by area, of the IoU of each object with its best partner."""
    overlaps = measure_overlaps(lower, upper)
    best = np.zeros(len(lower))
    np.maximum.at(best, overlaps.lower, overlaps.iou)
    return float((best * lower.areas_px).sum() / lower.areas_px.sum())

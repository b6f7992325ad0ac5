"""How good boxes are: precision, recall and average precision, also for small, medium and large objects alone.

The rules are those of COCO: detections are matched to true boxes in the order of their scores; where only some objects
count, the others are neither to be found nor wrong to find.

References
----------
Lin et al. 2014, Microsoft COCO (doi:10.1007/978-3-319-10602-1_48); github.com/cocodataset/cocoapi.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dendsam_deploy.instances import box_area, box_iou

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from dendsam_deploy.instances import Detections

IOU_LEVELS = tuple(round(0.5 + 0.05 * step, 2) for step in range(10))

SIZE_LIMITS_PX = (32.0, 96.0)
"""Sides of a square of the area of a box, tile px, between small, medium and large: those of COCO."""

_RECALL_LEVELS = np.linspace(0, 1, 101)
_NO_SCORE = 0.25
"""Score threshold of a detector that finds nothing."""


@dataclass(frozen=True, slots=True)
class HeldOutScores:
    """Scores of a detector on the held-out tiles.

    Parameters
    ----------
    precision, recall : float
        At `score_threshold`, counting a box as found from an IoU of .5 on; NaN where they have no value.
    map50, map50_95 : float
        Average precision at an IoU of .5, and its mean over .50:.05:.95; NaN where there is no object.
    score_threshold : float
        Least score at which precision and recall balance best (largest F1).
    """

    precision: float
    recall: float
    map50: float
    map50_95: float
    score_threshold: float


@dataclass(frozen=True, slots=True)
class SizeClassScores:
    """Scores of the objects of one class of sizes, at the same score threshold; NaN where a score has no value.

    Parameters
    ----------
    name : str
        ``small``, ``medium`` or ``large``.
    least_px, most_px : float
        Sides of squares of the area of their boxes: from the first to below the second, tile px.
    objects : int
        True boxes of that class.
    precision, recall, map50, map50_95 : float
        As in `HeldOutScores`.
    """

    name: str
    least_px: float
    most_px: float
    objects: int
    precision: float
    recall: float
    map50: float
    map50_95: float


class JudgedBoxes(NamedTuple):
    """True boxes (N, 4) and detections of one tile, both in tile px; detections without duplicates."""

    truth_xyxy: NDArray[np.float32]
    found: Detections


class _Matches(NamedTuple):
    """Detections of all tiles, best first: scores (D,), which are right and which count at each IoU level (L, D)."""

    scores: NDArray[np.float64]
    hits: NDArray[np.bool_]
    counted: NDArray[np.bool_]
    objects: int


def score_boxes(tiles: Sequence[JudgedBoxes]) -> tuple[HeldOutScores, tuple[SizeClassScores, ...]]:
    """Score detections on some tiles, for all objects and by size.

    Parameters
    ----------
    tiles : sequence of JudgedBoxes
        The tiles.

    Returns
    -------
    HeldOutScores
        Of all objects.
    tuple of SizeClassScores
        Small, medium and large objects.
    """
    every = _matched(tiles, 0, math.inf)
    threshold = _best_threshold(every)
    overall = HeldOutScores(*_rates(every, threshold), *_average_precisions(every), threshold)
    limits = (0.0, *SIZE_LIMITS_PX, math.inf)
    classes = []
    for name, least, most in zip(("small", "medium", "large"), limits[:-1], limits[1:], strict=True):
        some = _matched(tiles, least, most)
        values = (*_rates(some, threshold), *_average_precisions(some))
        classes.append(SizeClassScores(name, least, most, some.objects, *values))
    return overall, tuple(classes)


def tile_f1(tile: JudgedBoxes, threshold: float) -> float:
    """Return the F1 score of one tile at an IoU of .5; 1 where there is nothing and nothing is found."""
    matches = _matched([tile], 0, math.inf)
    sure = matches.scores >= threshold
    total = int(sure.sum()) + matches.objects
    return 2 * int(matches.hits[0, sure].sum()) / total if total else 1.0


def _matched(tiles: Sequence[JudgedBoxes], least_px: float, most_px: float) -> _Matches:
    """Match the detections of all tiles with the objects of some sizes; what belongs to other sizes does not count."""
    levels = len(IOU_LEVELS)
    scores, hits, counted, objects = [np.zeros(0)], [np.zeros((levels, 0), bool)], [np.zeros((levels, 0), bool)], 0
    for tile in tiles:
        wanted = _is_within(tile.truth_xyxy, least_px, most_px)
        order = np.argsort(-tile.found.scores, kind="stable")
        boxes = tile.found.boxes_xyxy[order]
        partner = _partners(tile.truth_xyxy, wanted, boxes)
        hit = np.append(wanted, False)[partner]  # no partner, -1, is the last entry
        scores.append(tile.found.scores[order].astype(np.float64))
        hits.append(hit)
        counted.append(hit | ((partner < 0) & _is_within(boxes, least_px, most_px)))
        objects += int(wanted.sum())
    every = np.concatenate(scores)
    best_first = np.argsort(-every, kind="stable")
    hit, counts = (np.concatenate(parts, axis=1)[:, best_first] for parts in (hits, counted))
    return _Matches(every[best_first], hit, counts, objects)


def _partners(
    truth_xyxy: NDArray[np.float32], wanted: NDArray[np.bool_], boxes_xyxy: NDArray[np.float32]
) -> NDArray[np.intp]:
    """Return the object that each detection, best first, is matched to at each IoU level, -1 for none: ``(L, D)``.

    Each takes the free object that it overlaps most; objects that do not count are taken only where no other fits.
    """
    partner = np.full((len(IOU_LEVELS), len(boxes_xyxy)), -1, np.intp)
    if not len(truth_xyxy):
        return partner
    overlap = box_iou(boxes_xyxy, truth_xyxy)
    for level, least in enumerate(IOU_LEVELS):
        free = np.ones(len(truth_xyxy), bool)
        for row in np.flatnonzero(overlap.max(axis=1, initial=0) >= least):
            for group in (wanted, ~wanted):
                fitting = np.where(free & group, overlap[row], -1.0)
                best = int(fitting.argmax())
                if fitting[best] >= least:
                    partner[level, row], free[best] = best, False
                    break
    return partner


def _is_within(boxes_xyxy: NDArray[np.float32], least_px: float, most_px: float) -> NDArray[np.bool_]:
    """Tell which boxes have a size of that class."""
    side = np.sqrt(box_area(boxes_xyxy))
    within: NDArray[np.bool_] = (side >= least_px) & (side < most_px)
    return within


def _average_precisions(matches: _Matches) -> tuple[float, float]:
    """Return the average precision at an IoU of .5 and its mean over all levels; NaN without objects."""
    if not matches.objects:
        return math.nan, math.nan
    values = [
        _average_precision(hit[counts], matches.objects)
        for hit, counts in zip(matches.hits, matches.counted, strict=True)
    ]
    return values[0], float(np.mean(values))


def _average_precision(hits: NDArray[np.bool_], objects: int) -> float:
    """Return the mean precision at 101 levels of recall, where a level has the best precision at it or beyond."""
    right = np.cumsum(hits)
    precision = right / np.arange(1, len(hits) + 1)
    best_beyond = np.maximum.accumulate(precision[::-1])[::-1]
    place = np.searchsorted(right / objects, _RECALL_LEVELS, side="left")
    reached = place < len(hits)
    return float(best_beyond[place[reached]].sum() / len(_RECALL_LEVELS))


def _rates(matches: _Matches, threshold: float) -> tuple[float, float]:
    """Return precision and recall at an IoU of .5 and a score threshold; NaN where one has no value."""
    counted = matches.counted[0] & (matches.scores >= threshold)
    right, found = int((matches.hits[0] & counted).sum()), int(counted.sum())
    return right / found if found else math.nan, right / matches.objects if matches.objects else math.nan


def _best_threshold(matches: _Matches) -> float:
    """Return the score threshold of the largest F1 at an IoU of .5, on a curve smoothed over a tenth of its length.

    The smoothing keeps one lucky detection from deciding.
    """
    if not matches.hits[0].any():
        return _NO_SCORE
    thresholds = np.linspace(0, 1, 1000)
    kept = np.searchsorted(-matches.scores, -thresholds, side="right")
    right = np.concatenate([[0], np.cumsum(matches.hits[0])])[kept]
    f1 = 2 * right / (kept + matches.objects)
    width = round(len(f1) * 0.2) // 2 + 1
    smooth = np.convolve(np.pad(f1, width // 2, mode="edge"), np.full(width, 1 / width), mode="valid")
    return float(thresholds[smooth.argmax()])

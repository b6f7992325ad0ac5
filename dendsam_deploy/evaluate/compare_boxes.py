"""Level 3 of parity: a detector's boxes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dendsam_deploy.bundle.reference import DetectorOutputs
from dendsam_deploy.evaluate.findings import Finding, count_true, run_graph
from dendsam_deploy.instances import Detections, box_iou

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from dendsam_deploy.bundle.manifest import Thresholds
    from dendsam_deploy.bundle.reference import ReferenceInputs
    from dendsam_deploy.runtimes.runner import Runner

_SAME_BOX_IOU = 0.5
_FEWEST_BOXES = 20  # compared in each tile, even if none of them is confident
_SURE_SHARE = 0.8  # a candidate of such a rank on one side is among those of the other side as well
_FEWEST_OBJECTS, _MOST_OBJECTS = 4, 16  # of a tile, looked at end to end


def detect(detector: Runner, inputs: ReferenceInputs, together: bool = False) -> DetectorOutputs:
    """Return a detector's candidates in every tile, one tile at a time or all in one call."""
    calls = [slice(0, len(inputs.tiles))] if together else [slice(i, i + 1) for i in range(len(inputs.tiles))]
    found = [run_graph(detector, {"tiles": inputs.tiles[tiles]}) for tiles in calls]
    boxes, scores = (np.concatenate([outputs[name] for outputs in found]) for name in ("boxes", "scores"))
    return DetectorOutputs(boxes.astype(np.float32), scores.astype(np.float32))


def compare_boxes(
    outputs: DetectorOutputs, expected: DetectorOutputs | None, size: int, confident: float, detail: str
) -> Iterator[Finding]:
    """Compare a detector's candidates (level 3); without a reference only their sanity is checked.

    Parameters
    ----------
    outputs, expected : DetectorOutputs
        Of the deployed graph and of the reference, which may list more candidates.
    size : int
        Side of the tiles.
    confident : float
        Score from which a candidate has to have a counterpart.
    detail : str
        What tells these findings apart from others of the same metrics.
    """
    boxes, scores = outputs.boxes, outputs.scores
    valid = np.isfinite(boxes).all(axis=2) & (boxes >= 0).all(axis=2) & (boxes <= size).all(axis=2)
    valid &= (boxes[..., :2] <= boxes[..., 2:]).all(axis=2) & (scores >= 0) & (scores <= 1)
    yield Finding(3, "detector", "boxes_invalid", count_true(~valid), detail)
    if expected is None:
        return
    if not valid.all():
        yield Finding(3, "detector", "boxes_unmatched", np.nan, detail)
        return
    tiles = range(len(scores))
    pairs = [_match(*sides, tile, confident) for sides in ((outputs, expected), (expected, outputs)) for tile in tiles]
    iou, score_difference = (np.concatenate(column) for column in zip(*pairs, strict=True))
    matched = iou >= _SAME_BOX_IOU
    yield Finding(3, "detector", "boxes_unmatched", 1 - float(matched.mean()), detail)
    yield Finding(3, "detector", "box_iou_min", float(iou[matched].min(initial=1)), detail)
    yield Finding(3, "detector", "box_score_max_difference", float(score_difference[matched].max(initial=0)), detail)


def candidates_missing(outputs: DetectorOutputs, stored: DetectorOutputs) -> Finding:
    """Count by how many candidates a tile gets fewer than when the bundle was exported."""
    missing = max(stored.scores.shape[1] - outputs.scores.shape[1], 0)
    return Finding(3, "detector", "candidates_missing", missing)


@dataclass(frozen=True, slots=True)
class Prompts:
    """Objects that a detector is sure of.

    Parameters
    ----------
    least_score : float
        What parts them from the other candidates.
    detections : Detections
        Boxes in the tile px of their tile.
    tile_index : ndarray, shape (N,), int64
        The tile of each.
    """

    least_score: float
    detections: Detections
    tile_index: NDArray[np.int64]


def sure_objects(outputs: DetectorOutputs, inputs: ReferenceInputs, thresholds: Thresholds) -> Prompts:
    """Choose the objects on which detector and SAM are looked at end to end.

    The least score is not below the bundle's own, and lies in the widest gap of scores that leaves a few to a dozen
    objects in a tile, so that rounding does not decide who is one of them. Cutting at the border of the tile,
    ownership and non-maximum suppression are written out here, apart from the pipeline's.
    """
    kept = [
        _suppressed(boxes, scores, size, thresholds)
        for boxes, scores, size in zip(outputs.boxes, outputs.scores, inputs.sizes.tolist(), strict=True)
    ]
    scores = np.sort(np.concatenate([found.scores for found in kept]))[::-1].astype(np.float64)
    few, many = (min(count * len(kept), len(scores)) for count in (_FEWEST_OBJECTS, _MOST_OBJECTS))
    below = np.append(scores, thresholds.detection_score)
    gaps = below[few - 1 : many] - below[few : many + 1] if few else np.zeros(1)
    last = max(few, 1) - 1 + int(np.argmax(gaps))
    least = float((below[last] + below[last + 1]) / 2) if len(scores) else thresholds.detection_score
    chosen = [found.take(found.scores >= least) for found in kept]
    return Prompts(
        least,
        Detections(np.concatenate([c.boxes_xyxy for c in chosen]), np.concatenate([c.scores for c in chosen])),
        np.repeat(np.arange(len(chosen)), [len(c) for c in chosen]).astype(np.int64),
    )


def _suppressed(
    boxes: NDArray[np.float32], scores: NDArray[np.float32], size_hw: list[int], thresholds: Thresholds
) -> Detections:
    """Return the candidates of one tile that are confident, visible, centred in its valid part and not duplicates."""
    height, width = size_hw
    inside = np.clip(boxes, 0, np.array([width, height, width, height], np.float32))
    centre = (inside[:, :2] + inside[:, 2:]) / 2
    usable = (scores >= thresholds.detection_score) & ((inside[:, 2:] - inside[:, :2]) >= 1).all(axis=1)
    usable &= (centre < np.array([width, height])).all(axis=1)
    inside, scores = inside[usable], scores[usable]
    kept: list[int] = []
    for index in np.argsort(-scores, kind="stable").tolist():
        if not kept or box_iou(inside[index][None], inside[kept]).max() <= thresholds.nms_iou:
            kept.append(index)
    return Detections(inside[kept], scores[kept])


def _match(
    one: DetectorOutputs, other: DetectorOutputs, tile: int, confident: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return IoU and score difference of each confident candidate of one side with the best one of the other.

    The other side's candidates need not be confident themselves, so that a score on the threshold does not count as a
    missing box; nor does one that the other side may have cut off, because it stops at so many candidates.
    """
    scores = one.scores[tile]
    count = max(count_true(scores >= confident), _FEWEST_BOXES)
    count = min(count, len(scores), math.ceil(_SURE_SHARE * other.scores.shape[1]))
    chosen = np.argsort(-scores, kind="stable")[:count]
    overlap = box_iou(one.boxes[tile][chosen], other.boxes[tile]).astype(np.float64)
    difference = np.abs(scores[chosen][:, None].astype(np.float64) - other.scores[tile][None])
    # Of equally good counterparts (candidates may coincide) the one of the nearest score.
    partner = np.argmax(overlap - 1e-3 * difference, axis=1)
    rows = np.arange(count)
    return overlap[rows, partner], difference[rows, partner]

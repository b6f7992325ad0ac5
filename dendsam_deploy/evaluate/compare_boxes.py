"""Level 3 of parity: a detector's boxes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from dendsam_deploy.bundle.reference import DetectorOutputs
from dendsam_deploy.evaluate.findings import Finding, count_true, run_graph
from dendsam_deploy.instances import box_iou

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from dendsam_deploy.bundle.reference import ReferenceInputs
    from dendsam_deploy.runtimes.runner import Runner

_SAME_BOX_IOU = 0.5
_FEWEST_BOXES = 20  # compared in each tile, even if none of them is confident
_SURE_SHARE = 0.8  # a candidate of such a rank on one side is among those of the other side as well


def compare_boxes(
    outputs: DetectorOutputs, expected: DetectorOutputs | None, inputs: ReferenceInputs, confident: float
) -> Iterator[Finding]:
    """Compare a detector's candidates (level 3); without a reference only their sanity is checked.

    Parameters
    ----------
    outputs, expected : DetectorOutputs
        Of the deployed graph and of the reference.
    inputs : ReferenceInputs
        The tiles.
    confident : float
        Score from which a candidate has to have a counterpart.
    """
    size = inputs.tiles.shape[1]
    boxes, scores = outputs.boxes, outputs.scores
    valid = np.isfinite(boxes).all(axis=2) & (boxes >= 0).all(axis=2) & (boxes <= size).all(axis=2)
    valid &= (boxes[..., :2] <= boxes[..., 2:]).all(axis=2) & (scores >= 0) & (scores <= 1)
    yield Finding(3, "detector", "boxes_invalid", count_true(~valid))
    if expected is None:
        return
    if not valid.all():
        yield Finding(3, "detector", "boxes_unmatched", np.nan)
        return
    pairs = [_match(outputs, expected, tile, confident) for tile in range(len(inputs.tiles))]
    pairs += [_match(expected, outputs, tile, confident) for tile in range(len(inputs.tiles))]
    iou, score_difference = (np.concatenate(column) for column in zip(*pairs, strict=True))
    matched = iou >= _SAME_BOX_IOU
    yield Finding(3, "detector", "boxes_unmatched", 1 - float(matched.mean()))
    yield Finding(3, "detector", "box_iou_min", float(iou[matched].min(initial=1)))
    yield Finding(3, "detector", "box_score_max_difference", float(score_difference[matched].max(initial=0)))


def detect(detector: Runner, inputs: ReferenceInputs) -> DetectorOutputs:
    """Return a detector's candidates in every tile, one tile at a time as in the pipeline."""
    found = [run_graph(detector, {"tiles": inputs.tiles[i : i + 1]}) for i in range(len(inputs.tiles))]
    boxes, scores = (np.concatenate([outputs[name] for outputs in found]) for name in ("boxes", "scores"))
    return DetectorOutputs(boxes.astype(np.float32), scores.astype(np.float32))


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

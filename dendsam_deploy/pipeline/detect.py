"""Boxes of a slice: the detector on every tile, then one suppression for the whole slice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dendsam_deploy.instances import Detections, suppress_duplicates
from dendsam_deploy.pipeline.infer import infer, tile_batches

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dendsam_deploy.pipeline.prepare import PreparedSlice, TilePlan
    from dendsam_deploy.runtimes.runner import Runner


@dataclass(frozen=True, slots=True)
class DetectOptions:
    """Which boxes of a detector are kept.

    Parameters
    ----------
    score : float
        Least detection score.
    nms_iou : float
        Largest IoU of two boxes of one slice.
    """

    score: float
    nms_iou: float


def detect_objects(prepared: PreparedSlice, detector: Runner, options: DetectOptions) -> Detections:
    """Find the objects of a slice.

    A tile answers only for boxes whose centre it owns. Of an object that a tile's border cuts and that is no larger
    than the overlap, the neighbour sees the whole, and even the centre of the piece lies in the neighbour's own window:
    the piece is dropped.

    Returns
    -------
    Detections
        Boxes in slice px, inside the slice, in canonical order.
    """
    found: list[Detections] = []
    for batch in tile_batches(np.arange(len(prepared.plan.tiles)), detector):
        outputs = infer(detector, prepared.tile_inputs(batch.start, batch.stop - batch.start))
        for index, boxes, scores in zip(
            range(*batch.indices(batch.stop)), outputs["boxes"], outputs["scores"], strict=True
        ):
            found.append(_owned(prepared.plan, index, boxes, scores, options.score))
    everything = Detections(
        np.concatenate([tile.boxes_xyxy for tile in found]), np.concatenate([tile.scores for tile in found])
    )
    return everything.take(suppress_duplicates(everything, options.nms_iou))


def _owned(
    plan: TilePlan, index: int, boxes_xyxy: NDArray[np.float32], scores: NDArray[np.float32], least_score: float
) -> Detections:
    """Return the boxes of one tile, in tile px, that it is sure of and owns, in slice px."""
    tile = plan.tiles[index]
    read = tile.read
    sure = scores >= least_score
    boxes = np.clip(boxes_xyxy[sure], 0, np.array([read.width, read.height, read.width, read.height], np.float32))
    boxes += np.array([read.x0, read.y0, read.x0, read.y0], np.float32)
    kept = _is_visible(boxes) & tile.owns(boxes)
    return Detections(plan.frame.boxes_to_slice(boxes[kept]), scores[sure][kept])


def clip_to_slice(detections: Detections, plan: TilePlan) -> Detections:
    """Cut boxes off at the border of the slice and drop those of which less than a model px is left."""
    height, width = plan.frame.slice_hw
    inside = np.clip(detections.boxes_xyxy, 0, np.array([width, height, width, height], np.float32))
    return Detections(inside, detections.scores).take(_is_visible(plan.frame.boxes_to_model(inside)))


def _is_visible(boxes_xyxy: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Tell which boxes ``(N, 4)`` in model px have sides of at least one pixel."""
    width, height = boxes_xyxy[:, 2] - boxes_xyxy[:, 0], boxes_xyxy[:, 3] - boxes_xyxy[:, 1]
    visible: NDArray[np.bool_] = (width >= 1) & (height >= 1)
    return visible

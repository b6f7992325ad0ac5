"""Boxes of a slice: the detector on every tile, then one suppression for the whole slice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dendsam_deploy.instances import Detections, suppress_duplicates
from dendsam_deploy.pipeline.infer import infer

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
    found = [_detect_in_tile(prepared, index, detector, options.score) for index in range(len(prepared.plan.tiles))]
    everything = Detections(
        np.concatenate([tile.boxes_xyxy for tile in found]), np.concatenate([tile.scores for tile in found])
    )
    return everything.take(suppress_duplicates(everything, options.nms_iou))


def _detect_in_tile(prepared: PreparedSlice, index: int, detector: Runner, least_score: float) -> Detections:
    """Run the detector on one tile and return the boxes that the tile owns, in slice px."""
    tile = prepared.plan.tiles[index]
    outputs = infer(detector, prepared.tile_inputs(index))
    boxes, scores = outputs["boxes"][0].astype(np.float32), outputs["scores"][0].astype(np.float32)
    read = tile.read
    boxes = np.clip(boxes, 0, np.array([read.width, read.height, read.width, read.height], np.float32))
    boxes += np.array([read.x0, read.y0, read.x0, read.y0], np.float32)
    kept = (scores >= least_score) & _is_visible(boxes) & tile.owns(boxes)
    return Detections(prepared.plan.frame.boxes_to_slice(boxes[kept]), scores[kept])


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

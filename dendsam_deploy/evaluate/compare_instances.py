"""Level 5 of parity: the labels that the pipeline paints from what the deployed graphs and the reference say."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy.optimize import linear_sum_assignment

from dendsam_deploy.evaluate.compare_masks import stacked_plan
from dendsam_deploy.evaluate.findings import Finding, count_true
from dendsam_deploy.geometry import cut_regions, region_cells, region_origins
from dendsam_deploy.instances import Detections, Masks, box_iou
from dendsam_deploy.metrics.contingency import ContingencyTable
from dendsam_deploy.metrics.overlaps import ObjectOverlaps
from dendsam_deploy.metrics.panoptic import panoptic_quality
from dendsam_deploy.metrics.partition import variation_of_information
from dendsam_deploy.pipeline.paint import PaintOptions, paint_masks

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from dendsam_deploy.bundle.manifest import Decoding, Thresholds
    from dendsam_deploy.bundle.reference import ReferenceInputs

_SAME_BOX_IOU = 0.5
_BEST_SCORE, _LEAST_SCORE = 0.95, 0.55


def in_the_stack(boxes_xyxy: NDArray[np.float32], tile_index: NDArray[np.int64], size: int) -> NDArray[np.float32]:
    """Convert boxes ``(N, 4)`` from the tile px of their tiles to the slice of `stacked_plan`."""
    down = np.zeros((len(boxes_xyxy), 4), np.float32)
    down[:, 1::2] = size * tile_index[:, None]
    return boxes_xyxy + down


def descending_scores(count: int) -> NDArray[np.float32]:
    """Return scores for boxes that nobody scored, all of them different: ties would be broken by rounding."""
    return np.linspace(_BEST_SCORE, _LEAST_SCORE, count, dtype=np.float32)


def masks_of_reference(
    boxes_xyxy: NDArray[np.float32],
    tile_index: NDArray[np.int64],
    logits: NDArray[np.float32],
    predicted_iou: NDArray[np.float32],
    decoding: Decoding,
) -> Masks:
    """Cut whole reference masks to the regions that the bundle promises to evaluate.

    Parameters
    ----------
    boxes_xyxy : ndarray, shape (N, 4), float32
        Boxes in the tile px of their tiles.
    tile_index : ndarray, shape (N,), int64
        The tile of each.
    logits : ndarray, shape (N, S/4, S/4), float32
        Their masks on the whole grid.
    predicted_iou : ndarray, shape (N,), float32
        Predicted IoU.
    decoding : Decoding
        The bundle's regions.
    """
    cells = decoding.region_sizes[-1]
    origins = np.zeros((len(boxes_xyxy), 2), np.int64)
    cut = []
    for index, box in enumerate(boxes_xyxy):
        longest_px = float((box[2:] - box[:2]).max())
        margin_px = decoding.margin_fraction * longest_px + decoding.margin_px
        region = region_cells(box.tolist(), margin_px, decoding.region_sizes)
        origins[index] = region_origins(box[None], region, cells)[0]
        cut.append(cut_regions(logits[index : index + 1], origins[index : index + 1], region)[0])
    return Masks(tuple(cut), origins, tile_index, predicted_iou, np.arange(len(cut), dtype=np.int64))


def paint_stack(
    detections: Detections, masks: Masks, inputs: ReferenceInputs, thresholds: Thresholds
) -> NDArray[np.uint32]:
    """Paint masks on the slice of `stacked_plan`; return its labels ``(T * S, S)``."""
    options = PaintOptions(mask_logit=thresholds.mask_logit, min_area_px=thresholds.min_area_px)
    labels, _ = paint_masks(detections, masks, stacked_plan(inputs), options)
    return labels


def compare_labels(
    deployed: NDArray[np.uint32], expected: NDArray[np.uint32], tiles: int, kind: str
) -> Iterator[Finding]:
    """Compare two label maps of the stack, tile by tile.

    Parameters
    ----------
    deployed, expected : ndarray, shape (T * S, S), uint32
        Labels from the deployed graphs and from the reference.
    tiles : int
        Number T of tiles.
    kind : str
        ``instances`` where the boxes were given, ``detected`` where they were found.
    """
    for tile, (found, truth) in enumerate(zip(np.split(deployed, tiles), np.split(expected, tiles), strict=True)):
        detail = f"tile={tile}"
        table = ContingencyTable.from_labels(truth, found)
        overlaps = ObjectOverlaps.from_table(table)
        information = variation_of_information(table)
        yield Finding(5, "chain", f"{kind}_compared", len(overlaps.truth_ids), detail)
        yield Finding(5, "chain", f"{kind}_pq50", panoptic_quality(overlaps, 0.5).pq, detail)
        yield Finding(5, "chain", f"{kind}_pq90", panoptic_quality(overlaps, 0.9).pq, detail)
        yield Finding(5, "chain", f"{kind}_vi_split", information.split, detail)
        yield Finding(5, "chain", f"{kind}_vi_merge", information.merge, detail)


def compare_detections(found: Detections, expected: Detections) -> Finding:
    """Compare what is left after the pipeline's non-maximum suppression, one to one (level 3)."""
    iou = box_iou(found.boxes_xyxy, expected.boxes_xyxy)
    rows, columns = linear_sum_assignment(iou, maximize=True)
    matched = count_true(iou[rows, columns] >= _SAME_BOX_IOU)
    total = len(found) + len(expected)
    return Finding(3, "detector", "detections_unmatched", 1 - 2 * matched / total if total else 0.0)

"""Level 1 of parity: does an object come out where it went in? Drawn objects through the whole way of a slice.

Coordinates are converted between the frames of the slice, the model, the tile and two grids; a mistake of half a pixel,
a forgotten corner of a tile or swapped axes leave every tensor as it is. So rectangles of known place are drawn on a
slice larger than a tile, and graphs that find exactly what is bright stand in for the bundle's. What the pipeline
paints is compared with what was drawn.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from scipy import ndimage

from dendsam_deploy.bundle.contract import EMBEDDING_CHANNELS, graph_inputs, graph_outputs
from dendsam_deploy.bundle.manifest import GraphSpec
from dendsam_deploy.evaluate.findings import Finding
from dendsam_deploy.geometry import EMBEDDING_STRIDE_PX, LOGIT_STRIDE_PX, region_origins
from dendsam_deploy.metrics.contingency import ContingencyTable
from dendsam_deploy.metrics.overlaps import ObjectOverlaps
from dendsam_deploy.pipeline.segment import SliceOptions, segment_slice
from dendsam_deploy.runtimes.runner import CallableRunner
from dendsam_deploy.runtimes.session import Session

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from numpy.typing import NDArray

    Tensors = Mapping[str, NDArray[np.generic]]

    from dendsam_deploy.bundle.manifest import Manifest, Role

_ZOOMS = (0.5, 1.0, 2.0)
_TILE_PX, _OVERLAP_PX = 128, 48  # what is small is quick, and frames know no size
_MODEL_HW = (176, 304)  # two tiles by three
_PITCH_PX, _MARGIN_PX = 44, 8  # model px, all of them even, so that edges lie between pixels at every zoom
_DARK, _BRIGHT = 40, 220
_FOUND_IOU = 0.5


def compare_frames(manifest: Manifest) -> Iterator[Finding]:
    """Compare what is painted with what was drawn, with the bundle's margins and at several zooms.

    Parameters
    ----------
    manifest : Manifest
        The bundle's manifest.
    """
    small = replace(
        manifest,
        preprocessing=replace(manifest.preprocessing, tile_size_px=_TILE_PX, overlap_px=_OVERLAP_PX),
        decoding=replace(manifest.decoding, region_sizes=(4, _TILE_PX // EMBEDDING_STRIDE_PX)),
        thresholds=replace(manifest.thresholds, mask_logit=0.0, min_area_px=1),
    )
    session = Session(
        small, _stand_in("encoder", _encode), _stand_in("decoder", _decode), _stand_in("detector", _detect)
    )
    for zoom in _ZOOMS:
        drawn = _drawn_labels(zoom)
        image = np.where(drawn > 0, _BRIGHT, _DARK).astype(np.uint8)
        painted, _ = segment_slice(image, session, None, SliceOptions(zoom=zoom, detection_score=0.5))
        overlaps = ObjectOverlaps.from_table(ContingencyTable.from_labels(drawn, painted))
        best, iou = overlaps.best_segments()
        lost = int((iou < _FOUND_IOU).sum()) + abs(len(overlaps.segment_ids) - len(overlaps.truth_ids))
        yield Finding(1, "preprocessing", "drawn_objects_lost", lost, f"zoom={zoom:g}")
        found = iou >= _FOUND_IOU
        shift = _centres(painted, best[found]) - _centres(drawn, overlaps.truth_ids[found])
        mean_px = float(np.hypot(*shift.mean(axis=0))) * zoom if found.any() else np.nan
        yield Finding(1, "preprocessing", "drawn_objects_shift_px", mean_px, f"zoom={zoom:g}")


def _drawn_labels(zoom: float) -> NDArray[np.uint32]:
    """Draw rectangles of different sides on a lattice; no two of them touch."""
    labels = np.zeros([round(side / zoom) for side in _MODEL_HW], np.uint32)
    for row in range(_MODEL_HW[0] // _PITCH_PX):
        for column in range(_MODEL_HW[1] // _PITCH_PX):
            y0, x0 = row * _PITCH_PX + _MARGIN_PX, column * _PITCH_PX + _MARGIN_PX
            y1, x1 = y0 + 16 + 2 * ((row + column) % 5), x0 + 18 + 2 * ((3 * row + column) % 4)
            edges = [round(edge / zoom) for edge in (y0, y1, x0, x1)]
            labels[edges[0] : edges[1], edges[2] : edges[3]] = labels.max() + 1
    return labels


def _centres(labels: NDArray[np.uint32], ids: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the centres of mass ``(N, 2)`` of labels, px."""
    return np.array(ndimage.center_of_mass(labels > 0, labels, ids)).reshape(-1, 2)


def _detect(inputs: Tensors) -> dict[str, NDArray[np.generic]]:
    """Return the tight box of everything bright in one tile; its score is its share of the lattice's largest."""
    pieces, count = ndimage.label(inputs["tiles"][0] > (_DARK + _BRIGHT) / 2)
    boxes = np.zeros((1, max(count, 1), 4), np.float32)
    for index, (rows, columns) in enumerate(ndimage.find_objects(pieces)):
        boxes[0, index] = columns.start, rows.start, columns.stop, rows.stop
    scores = np.full(boxes.shape[:2], 0.9 if count else 0.0, np.float32)
    return {"boxes": boxes, "scores": scores}


def _encode(inputs: Tensors) -> dict[str, NDArray[np.generic]]:
    """Return embeddings that say nothing: the boxes are all that the stand-in of the decoder looks at."""
    cells = _TILE_PX // EMBEDDING_STRIDE_PX
    return {"embeddings": np.zeros((len(inputs["tiles"]), EMBEDDING_CHANNELS, cells, cells), np.float32)}


def _decode(inputs: Tensors) -> dict[str, NDArray[np.generic]]:
    """Return the signed distance from the nearest side of each box, at the centres of the cells of its region."""
    region = int(inputs["region"][0])
    boxes = inputs["boxes"].astype(np.float32)
    origin = region_origins(boxes, region, _TILE_PX // EMBEDDING_STRIDE_PX)
    side = np.arange(region * EMBEDDING_STRIDE_PX // LOGIT_STRIDE_PX)
    y, x = ((origin[:, axis, None] + side + 0.5) * LOGIT_STRIDE_PX for axis in (0, 1))
    x0, y0, x1, y1 = boxes.T[..., None]
    inside_y, inside_x = np.minimum(y - y0, y1 - y), np.minimum(x - x0, x1 - x)
    logits = np.minimum(inside_y[:, :, None], inside_x[:, None, :]).astype(np.float32)
    return {"logits": logits, "origin": origin, "iou": np.full(len(boxes), 0.9, np.float32)}


def _stand_in(role: Role, function: Callable[[Tensors], dict[str, NDArray[np.generic]]]) -> CallableRunner:
    """Return a runner around a function that fulfils the contract of a role."""
    inputs, outputs = graph_inputs(role, _TILE_PX), graph_outputs(role, _TILE_PX)
    return CallableRunner(GraphSpec(role, "fp32", 0, (), inputs, outputs), function)

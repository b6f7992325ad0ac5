"""Level 4 of parity: masks as the pipeline makes them, on the pixels of the tile."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy import ndimage

from dendsam_deploy.errors import ParityError
from dendsam_deploy.evaluate.findings import Finding, count_true
from dendsam_deploy.geometry import LOGIT_STRIDE_PX, Frame, Tile, Window, bilinear_matrix
from dendsam_deploy.pipeline.decode import BoxDecoder, DecodeOptions, Embeddings, decode_masks
from dendsam_deploy.pipeline.prepare import TilePlan
from dendsam_deploy.pipeline.upsample import upsample_mask

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from dendsam_deploy.bundle.reference import ReferenceInputs, SamOutputs
    from dendsam_deploy.instances import Masks
    from dendsam_deploy.runtimes.session import Session

_DEEP_PX = 2.0
_NEAR_PX = 1.0
# In units of the logits' standard deviation. Rounding decides about pixels closer to the threshold; one of them would
# already take a mask of a few hundred pixels below the limit of its IoU.
_UNDECIDED_STD = 1e-4


def compare_masks(
    session: Session, embeddings: NDArray[np.float32], inputs: ReferenceInputs, expected: SamOutputs
) -> Iterator[Finding]:
    """Compare masks as the pipeline makes them, with its choice of regions, to whole reference masks (level 4)."""
    decoder = BoxDecoder(session.decoder, DecodeOptions(session.manifest.decoding))
    encoded = Embeddings(embeddings, np.arange(len(embeddings), dtype=np.int64))
    try:
        masks = decode_masks(inputs.boxes, np.arange(len(inputs.boxes)), inputs.tile_index, encoded, decoder)
    except ParityError:  # NaN, which level 2 has counted
        yield Finding(4, "chain", "mask_iou_mean", np.nan)
        return
    threshold = session.manifest.thresholds.mask_logit
    compared = [
        _compare_mask(known, mask, logits - threshold, _UNDECIDED_STD * float(expected.logits.std()))
        for known, mask, logits in _masks_at_full_size(masks, inputs, expected, threshold)
    ]
    iou = np.array([mask.iou for mask in compared])
    yield Finding(4, "chain", "mask_iou_mean", float(iou.mean()))
    yield Finding(4, "chain", "mask_iou_p1", float(np.percentile(iou, 1)))
    yield Finding(4, "chain", "mask_iou_min", float(iou.min()))
    compared_px = max(sum(mask.compared_px for mask in compared), 1)
    depth = np.concatenate([mask.flipped_depth_px for mask in compared])
    near, deep = count_true(depth <= _NEAR_PX), count_true(depth > _DEEP_PX)
    yield Finding(4, "chain", "flipped_px", near / compared_px, "distance<=1")
    yield Finding(4, "chain", "flipped_px", (len(depth) - near - deep) / compared_px, "distance<=2")
    yield Finding(4, "chain", "flipped_deep_px", deep / compared_px)
    reference_px = max(sum(mask.reference_px for mask in compared), 1)
    yield Finding(4, "chain", "outside_region_px", sum(mask.outside_px for mask in compared) / reference_px)


@dataclass(frozen=True, slots=True)
class _ComparedMask:
    """One mask beside its reference: how they agree inside the region, and how much of the reference lies outside."""

    iou: float
    compared_px: int
    flipped_depth_px: NDArray[np.float64]
    reference_px: int
    outside_px: int


def _masks_at_full_size(
    masks: Masks, inputs: ReferenceInputs, expected: SamOutputs, threshold: float
) -> Iterator[tuple[Window, NDArray[np.bool_], NDArray[np.float32]]]:
    """Yield for each box, cut to the valid part of its tile: what its region covers, its mask, the reference logits."""
    size = inputs.tiles.shape[1]
    whole = Window(0, 0, size, size)
    plan = TilePlan(Frame((size, size), (size, size)), (Tile(whole, whole),) * len(inputs.tiles), size)
    centres = np.arange(size, dtype=np.float64) + 0.5
    matrix = bilinear_matrix(expected.logits.shape[1], centres, 0, LOGIT_STRIDE_PX)
    for index, tile in enumerate(inputs.tile_index.tolist()):
        height, width = inputs.sizes[tile].tolist()
        patch = upsample_mask(masks, index, plan, threshold)
        mask = np.zeros((size, size), bool)
        mask[patch.window.slices] = patch.logits > threshold
        logits = matrix[:height] @ expected.logits[index] @ matrix[:width].T
        yield _known_window(masks, index, size).clipped((height, width)), mask[:height, :width], logits


def _compare_mask(
    known: Window, mask: NDArray[np.bool_], excess: NDArray[np.float32], undecided: float
) -> _ComparedMask:
    """Compare a mask with where reference logits exceed the threshold, on the pixels that its region covers."""
    reference = excess > 0
    mask, inside = mask[known.slices], reference[known.slices]
    decided = np.abs(excess[known.slices]) > undecided
    union, flipped = count_true((mask | inside) & decided), mask ^ inside
    return _ComparedMask(
        iou=1 - count_true(flipped & decided) / union if union else 1.0,
        compared_px=mask.size,
        flipped_depth_px=_depth(inside)[flipped] if flipped.any() else np.zeros(0),
        reference_px=count_true(reference),
        outside_px=count_true(reference) - count_true(inside),
    )


def _depth(mask: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return the distance of each pixel, in px, from the nearest pixel on the other side of a mask's border."""
    if mask.all() or not mask.any():
        return np.full(mask.shape, np.inf)
    depth: NDArray[np.float64] = np.where(
        mask, ndimage.distance_transform_edt(mask), ndimage.distance_transform_edt(~mask)
    )
    return depth


def _known_window(masks: Masks, index: int, size: int) -> Window:
    """Return the pixels between the outermost cell centres of a mask's region, or up to the border of the tile."""
    side = len(masks.logits[index])
    bounds = []
    for origin in masks.origins_yx[index].tolist():
        first, last = origin * LOGIT_STRIDE_PX, (origin + side) * LOGIT_STRIDE_PX
        half = LOGIT_STRIDE_PX // 2
        bounds.append((first + half if first > 0 else 0, last - half if last < size else size))
    (y0, y1), (x0, x1) = bounds
    return Window(y0, x0, y1 - y0, x1 - x0)

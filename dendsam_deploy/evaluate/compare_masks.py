"""Level 4 of parity: masks as the pipeline makes them, on the pixels of the tile."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy import ndimage

from dendsam_deploy.evaluate.findings import Finding, count_true
from dendsam_deploy.geometry import LOGIT_STRIDE_PX, Frame, Tile, Window
from dendsam_deploy.pipeline.claims import claim_from_logits
from dendsam_deploy.pipeline.prepare import TilePlan
from dendsam_deploy.pipeline.upsample import upsample_mask

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from dendsam_deploy.bundle.reference import ReferenceInputs, SamOutputs
    from dendsam_deploy.instances import Masks

_DEEP_PX = 2.0
_NEAR_PX = 1.0
# In units of the logits' standard deviation. Rounding decides about pixels closer to the threshold; one of them would
# already take a mask of a few hundred pixels below the limit of its IoU.
_UNDECIDED_STD = 1e-4
_SHAPED_SHARE = 0.8
"""A mask of which so much lies in its box shows the object in it. Those of random weights lie anywhere, and what a
region cuts off them says nothing about the region."""


def compare_masks(masks: Masks, inputs: ReferenceInputs, expected: SamOutputs, threshold: float) -> Iterator[Finding]:
    """Compare masks as the pipeline makes them, with its choice of regions, to whole reference masks (level 4).

    Parameters
    ----------
    masks : Masks
        What the deployed chain makes of the boxes of the inputs.
    inputs : ReferenceInputs
        Tiles and boxes.
    expected : SamOutputs
        What the reference makes of them.
    threshold : float
        Logit above which a pixel belongs to a mask.
    """
    undecided = _UNDECIDED_STD * float(expected.logits.std())
    compared = [
        _compare_mask(known, mask, logits - np.float32(threshold), undecided, box)
        for (known, mask, logits), box in zip(
            _masks_at_full_size(masks, inputs, expected, threshold), inputs.boxes, strict=True
        )
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
    cut = [m.outside_px / m.reference_px for m in compared if m.in_box_px > _SHAPED_SHARE * m.reference_px]
    yield Finding(4, "chain", "cut_by_region", max(cut, default=0.0))


@dataclass(frozen=True, slots=True)
class _ComparedMask:
    """One mask beside its reference: how they agree inside the region, and how much of the reference lies outside."""

    iou: float
    compared_px: int
    flipped_depth_px: NDArray[np.float64]
    reference_px: int
    outside_px: int
    in_box_px: int


def stacked_plan(inputs: ReferenceInputs) -> TilePlan:
    """Return the plan of the slice in which the tiles of the inputs lie below each other."""
    size = inputs.tiles.shape[1]
    tiles = tuple(
        Tile(read=Window(index * size, 0, height, width), own=Window(index * size, 0, size, size))
        for index, (height, width) in enumerate(inputs.sizes.tolist())
    )
    shape_hw = (len(tiles) * size, size)
    return TilePlan(Frame(shape_hw, shape_hw), tiles, size)


def _masks_at_full_size(
    masks: Masks, inputs: ReferenceInputs, expected: SamOutputs, threshold: float
) -> Iterator[tuple[Window, NDArray[np.bool_], NDArray[np.float32]]]:
    """Yield for each box, cut to the valid part of its tile: what its region covers, its mask, the reference logits."""
    plan = stacked_plan(inputs)
    size = plan.tile_size_px
    for index, tile in enumerate(inputs.tile_index.tolist()):
        height, width = inputs.sizes[tile].tolist()
        claim = claim_from_logits(upsample_mask(masks, index, plan, threshold), threshold)
        mask = np.zeros(plan.frame.slice_hw, bool)
        mask[claim.window.slices] = claim.evidence > 0
        logits = upsampled_as_sam_does(expected.logits[index])[:height, :width]
        top = tile * size
        yield _known_window(masks, index, size).clipped((height, width)), mask[top : top + height, :width], logits


def upsampled_as_sam_does(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Enlarge ``(H, W)`` four times in each direction, written out from scratch.

    Every new pixel centre lies between two old ones and takes a weighted mean of their values; beyond the outermost
    ones theirs. This is ``torch.nn.functional.interpolate(mode="bilinear", align_corners=False)``, which ``Sam``'s
    ``postprocess_masks`` uses.
    """
    fine = logits
    for axis in (0, 1):
        place = np.clip((np.arange(fine.shape[axis] * LOGIT_STRIDE_PX) + 0.5) / LOGIT_STRIDE_PX - 0.5, 0, None)
        before = np.minimum(place.astype(np.intp), fine.shape[axis] - 1)
        after = np.minimum(before + 1, fine.shape[axis] - 1)
        share = np.expand_dims((place - before).astype(np.float32), 1 - axis)
        fine = (1 - share) * fine.take(before, axis) + share * fine.take(after, axis)
    return fine


def _compare_mask(
    known: Window, mask: NDArray[np.bool_], excess: NDArray[np.float32], undecided: float, box: NDArray[np.float32]
) -> _ComparedMask:
    """Compare a mask with where reference logits exceed the threshold, on the pixels that its region covers."""
    reference = excess > 0
    mask, inside = mask[known.slices], reference[known.slices]
    decided = np.abs(excess[known.slices]) > undecided
    x0, y0, x1, y1 = np.clip(np.round(box), 0, None).astype(int).tolist()
    union, flipped = count_true((mask | inside) & decided), mask ^ inside
    return _ComparedMask(
        iou=1 - count_true(flipped & decided) / union if union else 1.0,
        compared_px=mask.size,
        flipped_depth_px=_depth(inside)[flipped] if flipped.any() else np.zeros(0),
        reference_px=count_true(reference),
        outside_px=count_true(reference) - count_true(inside),
        in_box_px=count_true(reference[y0:y1, x0:x1]),
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

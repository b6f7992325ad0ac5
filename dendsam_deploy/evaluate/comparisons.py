"""The numbers behind a parity report: a session's outputs against the reference's, level by level."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

import numpy as np
from scipy import ndimage

from dendsam_deploy.bundle.reference import DetectorOutputs
from dendsam_deploy.errors import ParityError
from dendsam_deploy.geometry import (
    LOGIT_STRIDE_PX,
    Frame,
    Tile,
    Window,
    bilinear_matrix,
    cut_regions,
    region_origins,
)
from dendsam_deploy.instances import box_iou
from dendsam_deploy.pipeline.decode import BoxDecoder, DecodeOptions, Embeddings, decode_masks
from dendsam_deploy.pipeline.prepare import TilePlan, plan_tiles, prepare_slice
from dendsam_deploy.pipeline.upsample import upsample_mask
from dendsam_deploy.volume.intensity import to_uint8

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from dendsam_deploy.bundle.manifest import Preprocessing
    from dendsam_deploy.bundle.reference import ReferenceInputs, SamOutputs
    from dendsam_deploy.instances import Masks
    from dendsam_deploy.runtimes.runner import Runner
    from dendsam_deploy.runtimes.session import Session

_SAME_BOX_IOU = 0.5
_FEWEST_BOXES = 20  # compared in each tile, even if none of them is confident
_SURE_SHARE = 0.8  # a candidate of such a rank on one side is among those of the other side as well
_DEEP_PX = 2.0
_NEAR_PX = 1.0
# In units of the logits' standard deviation. Rounding decides about pixels closer to the threshold; one of them would
# already take a mask of a few hundred pixels below the limit of its IoU.
_UNDECIDED_STD = 1e-4
_TINY = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True, slots=True)
class Finding:
    """A measured number, not yet judged; `detail` tells apart what is measured by the same metric."""

    level: int
    graph: str
    metric: str
    value: float
    detail: str = ""


def compare_preprocessing(preprocessing: Preprocessing, inputs: ReferenceInputs) -> Iterator[Finding]:
    """Compare the bytes that enter the graphs with the reference implementation's (level 1)."""
    tile = inputs.tiles[0].astype(np.uint16)
    texture = np.add.outer(7 * np.arange(tile.shape[0]), 13 * np.arange(tile.shape[1])) % 97
    slice_u16 = (199 * tile + texture + 1003).astype(np.uint16)
    differing = _count(to_uint8(slice_u16) != _stretched_as_micro_sam_does(slice_u16))
    yield Finding(1, "preprocessing", "bytes_differing", differing, "uint16")
    for index, (height, width) in enumerate(inputs.sizes.tolist()):
        plan = plan_tiles((height, width), preprocessing, None, 1.0)
        fed = prepare_slice(np.ascontiguousarray(inputs.tiles[index, :height, :width]), plan).tile_inputs(0)
        differing = _count(fed["tiles"] != inputs.tiles[index]) + _count(fed["sizes"] != inputs.sizes[index])
        yield Finding(1, "preprocessing", "bytes_differing", differing, f"tile={index}")


def _stretched_as_micro_sam_does(image: NDArray[np.uint16]) -> NDArray[np.uint8]:
    """Bring a slice to 8 bits in the words of ``micro_sam.util._to_image``, which `volume.intensity` is to equal."""
    stretched = image.astype("float32") - image.min()
    stretched /= stretched.max()
    scaled: NDArray[np.uint8] = (stretched * 255).astype("uint8")
    return scaled


def encode(encoder: Runner, inputs: ReferenceInputs) -> NDArray[np.float32]:
    """Return the embeddings of the tiles, encoded one at a time as in the pipeline."""
    encoded = [
        _run(encoder, {"tiles": inputs.tiles[i : i + 1], "sizes": inputs.sizes[i : i + 1]})["embeddings"]
        for i in range(len(inputs.tiles))
    ]
    return np.concatenate(encoded).astype(np.float32, copy=False)


def compare_embeddings(
    embeddings: NDArray[np.float32], expected: NDArray[np.float32], inputs: ReferenceInputs
) -> Iterator[Finding]:
    """Compare embeddings of whole tiles (level 2) and of padded ones, where preprocessing shows (level 1)."""
    padded = (inputs.sizes < inputs.tiles.shape[1]).any(axis=1)
    for is_padded, level, metric in ((True, 1, "padded_tile_relative_max"), (False, 2, "embedding_relative_max")):
        of_kind = padded == is_padded
        if of_kind.any():
            yield Finding(level, "encoder", metric, _relative_max(embeddings[of_kind], expected[of_kind]))
    yield Finding(2, "encoder", "embedding_cosine", _lowest_cosine(embeddings, expected))
    yield Finding(2, "encoder", "not_finite", _not_finite(embeddings))


def compare_logits(
    session: Session, inputs: ReferenceInputs, expected: SamOutputs, box_counts: tuple[int, ...]
) -> Iterator[Finding]:
    """Compare the decoder, fed the reference's embeddings, for several numbers of boxes and every region (level 2)."""
    cells = expected.embeddings.shape[-1]
    calls = [(count, cells, f"boxes={count}") for count in box_counts]
    calls += [(len(inputs.boxes), region, f"region={region}") for region in session.manifest.decoding.region_sizes[:-1]]
    for count, region, detail in calls:
        some = _first(inputs, count)
        outputs = _decode(session.decoder, expected.embeddings, some, region)
        yield from _compare_decoded(outputs, expected, region, detail)
        differing = (outputs["origin"] != region_origins(some.boxes, region, cells)).any(axis=1)
        yield Finding(2, "decoder", "origins_differing", _count(differing), detail)
    empty = _decode(session.decoder, expected.embeddings, _first(inputs, 0), cells)
    shapes = {"logits": (0, 4 * cells, 4 * cells), "origin": (0, 2), "iou": (0,)}
    wrong = sum(empty[name].shape != shape for name, shape in shapes.items())
    yield Finding(2, "decoder", "wrong_shapes", wrong, "boxes=0")


def compare_end_to_end(
    session: Session, embeddings: NDArray[np.float32], inputs: ReferenceInputs, expected: SamOutputs
) -> Iterator[Finding]:
    """Compare logits from the deployed encoder and decoder together (level 2)."""
    cells = expected.embeddings.shape[-1]
    outputs = _decode(session.decoder, embeddings, inputs, cells)
    value = _max_over_std(cast("NDArray[np.float32]", outputs["logits"]), expected.logits)
    yield Finding(2, "chain", "end_to_end_logits_max_over_std", value)


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
    yield Finding(3, "detector", "boxes_invalid", _count(~valid))
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
    found = [_run(detector, {"tiles": inputs.tiles[i : i + 1]}) for i in range(len(inputs.tiles))]
    boxes, scores = (np.concatenate([outputs[name] for outputs in found]) for name in ("boxes", "scores"))
    return DetectorOutputs(boxes.astype(np.float32), scores.astype(np.float32))


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
    near, deep = _count(depth <= _NEAR_PX), _count(depth > _DEEP_PX)
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
    union, flipped = _count((mask | inside) & decided), mask ^ inside
    return _ComparedMask(
        iou=1 - _count(flipped & decided) / union if union else 1.0,
        compared_px=mask.size,
        flipped_depth_px=_depth(inside)[flipped] if flipped.any() else np.zeros(0),
        reference_px=_count(reference),
        outside_px=_count(reference) - _count(inside),
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


def _match(
    one: DetectorOutputs, other: DetectorOutputs, tile: int, confident: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return IoU and score difference of each confident candidate of one side with the best one of the other.

    The other side's candidates need not be confident themselves, so that a score on the threshold does not count as a
    missing box; nor does one that the other side may have cut off, because it stops at so many candidates.
    """
    scores = one.scores[tile]
    count = max(_count(scores >= confident), _FEWEST_BOXES)
    count = min(count, len(scores), math.ceil(_SURE_SHARE * other.scores.shape[1]))
    chosen = np.argsort(-scores, kind="stable")[:count]
    overlap = box_iou(one.boxes[tile][chosen], other.boxes[tile]).astype(np.float64)
    difference = np.abs(scores[chosen][:, None].astype(np.float64) - other.scores[tile][None])
    # Of equally good counterparts (candidates may coincide) the one of the nearest score.
    partner = np.argmax(overlap - 1e-3 * difference, axis=1)
    rows = np.arange(count)
    return overlap[rows, partner], difference[rows, partner]


def _compare_decoded(
    outputs: dict[str, NDArray[np.generic]], expected: SamOutputs, region: int, detail: str
) -> Iterator[Finding]:
    """Compare one call of the decoder with the reference's whole masks, cut where the decoder says."""
    count = len(outputs["origin"])
    origin = np.clip(outputs["origin"].astype(np.int64), 0, expected.logits.shape[1] - 4 * region)
    wanted = cut_regions(expected.logits[:count], origin, region)
    logits, iou = outputs["logits"].astype(np.float32), outputs["iou"].astype(np.float32)
    yield Finding(2, "decoder", "logits_max_over_std", _max_over_std(logits, wanted), detail)
    yield Finding(2, "decoder", "predicted_iou_max_difference", _largest_difference(iou, expected.iou[:count]), detail)
    yield Finding(2, "decoder", "not_finite", _not_finite(logits) + _not_finite(iou), detail)


def _decode(
    decoder: Runner, embeddings: NDArray[np.float32], inputs: ReferenceInputs, region: int
) -> dict[str, NDArray[np.generic]]:
    """Decode the boxes of the inputs in one call."""
    return _run(
        decoder,
        {
            "embeddings": embeddings,
            "boxes": inputs.boxes,
            "tile_index": inputs.tile_index,
            "region": np.array([region], np.int64),
        },
    )


def _first(inputs: ReferenceInputs, count: int) -> ReferenceInputs:
    """Return the inputs with the first `count` boxes."""
    return replace(inputs, boxes=inputs.boxes[:count], tile_index=inputs.tile_index[:count])


def _run(runner: Runner, inputs: dict[str, NDArray[np.generic]]) -> dict[str, NDArray[np.generic]]:
    """Call a graph; NaN passes, because it is to be counted."""
    outputs = runner.run({name: np.ascontiguousarray(array) for name, array in inputs.items()})
    return {name: array.copy() for name, array in outputs.items()} if runner.borrows_outputs else outputs


def _relative_max(value: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """Return the largest difference over the largest expected magnitude."""
    return _largest_difference(value, expected) / max(float(np.abs(expected).max()), _TINY)


def _max_over_std(value: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """Return the largest difference over the standard deviation of what was expected."""
    return _largest_difference(value, expected) / max(float(expected.std()), _TINY)


def _lowest_cosine(value: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """Return the lowest cosine between corresponding tiles."""
    a, b = (array.reshape(len(array), -1).astype(np.float64) for array in (value, expected))
    with np.errstate(invalid="ignore"):
        cosine = (a * b).sum(axis=1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
    return float(cosine.min())


def _not_finite(array: NDArray[np.float32]) -> int:
    """Count NaN and infinities."""
    return _count(~np.isfinite(array))


def _count(condition: NDArray[np.bool_]) -> int:
    """Count what is true."""
    return int(np.count_nonzero(condition))


def _largest_difference(value: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """Return the largest magnitude of a difference; NaN where there is one, 0 of nothing."""
    with np.errstate(invalid="ignore"):
        return float(np.abs(value - expected).max(initial=0))

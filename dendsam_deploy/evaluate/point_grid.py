"""Segmenting everything without a detector: a grid of clicks on every tile, and filters that keep what is convincing.

All points of a tile are decoded in batches from its one embedding. Each gives three masks; kept are, in this order,

1. those whose predicted IoU is high enough;
2. those that are *stable*: little changes when the threshold of their logits moves by `stability_offset` up or down;
3. of masks whose boxes overlap much, the one of the highest predicted IoU, across all tiles of the slice.

With one tile, zoom 1 and no least area this equals segment_anything's ``SamAutomaticMaskGenerator`` without crops.
A tile is asked about the points of its own window only; what lies beyond is the neighbour's.

References
----------
segment_anything/automatic_mask_generator.py and segment_anything/utils/amg.py at
github.com/facebookresearch/segment-anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dendsam_deploy.errors import InvalidArgumentError
from dendsam_deploy.evaluate.point_prompts import FIRST_ALTERNATIVE, prompts_per_call, run_points
from dendsam_deploy.instances import Detections, Masks, suppress_duplicates
from dendsam_deploy.pipeline.upsample import upsample_masks

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from dendsam_deploy.geometry import Tile
    from dendsam_deploy.pipeline.decode import Embeddings
    from dendsam_deploy.pipeline.prepare import TilePlan
    from dendsam_deploy.runtimes.runner import Runner


@dataclass(frozen=True, slots=True)
class GridOptions:
    """How many clicks, and what is kept of their masks.

    Parameters
    ----------
    points_per_side : int
        Points along each side of a tile; their distance is the tile's side over this number, in model px.
    predicted_iou : float
        Least predicted IoU.
    stability : float
        Least IoU of the mask at the raised with that at the lowered threshold.
    stability_offset : float
        By how much the threshold is raised and lowered, in logits.
    nms_iou : float
        Largest IoU of two kept masks' boxes.
    """

    points_per_side: int = 32
    predicted_iou: float = 0.88
    stability: float = 0.95
    stability_offset: float = 1.0
    nms_iou: float = 0.7

    def __post_init__(self) -> None:
        if not 1 <= self.points_per_side <= 256:
            raise InvalidArgumentError(f"a grid of {self.points_per_side} points along a side, expected 1 to 256")
        for name in ("predicted_iou", "stability", "nms_iou"):
            if not 0 <= getattr(self, name) <= 1:
                raise InvalidArgumentError(f"{name} of the grid is {getattr(self, name)}, expected 0 to 1")
        if not 0 <= self.stability_offset < np.inf:
            raise InvalidArgumentError(f"the offset of stability is {self.stability_offset}, expected 0 or more")


@dataclass(frozen=True, slots=True)
class GridCounts:
    """How many points were asked about in a slice, and how many masks were left after each filter.

    `highest_iou` is the highest predicted IoU of all masks, so that a threshold which nothing reaches can be set right;
    `predicted_iou` and `stability` are the thresholds.
    """

    points: int
    masks: int
    confident: int
    stable: int
    distinct: int
    highest_iou: float
    predicted_iou: float
    stability: float


@dataclass(frozen=True, slots=True, eq=False)
class GridMasks:
    """What a grid of clicks found in a slice.

    Parameters
    ----------
    detections : Detections
        The masks' boxes in slice px, all of score 1.
    masks : Masks
        The masks.
    counts : GridCounts
        How they were chosen.
    """

    detections: Detections
    masks: Masks
    counts: GridCounts


@dataclass(frozen=True, slots=True, eq=False)
class _Candidate:
    """A mask of the grid: its box in whole slice px, both ends included as in segment_anything."""

    logits: NDArray[np.float32]
    origin_yx: tuple[int, int]
    tile: int
    predicted_iou: float
    stability: float
    box_xyxy: tuple[int, int, int, int]


@dataclass(frozen=True, slots=True, eq=False)
class GridCandidates:
    """The masks of a slice before their last filters, which can be set to any stricter thresholds.

    Parameters
    ----------
    points : int
        Points that were asked about.
    predicted_iou : ndarray, shape (3 * points,), float32
        Of all their masks.
    candidates : tuple
        Those that passed the thresholds that they were looked for with.
    """

    points: int
    predicted_iou: NDArray[np.float32]
    candidates: tuple[_Candidate, ...]

    def chosen(self, options: GridOptions) -> GridMasks:
        """Return what passes the thresholds of `options`, which are no lower than those of the search."""
        confident = int(np.count_nonzero(self.predicted_iou > options.predicted_iou))
        stable = [
            candidate
            for candidate in self.candidates
            if candidate.predicted_iou > options.predicted_iou and candidate.stability >= options.stability
        ]
        boxes = np.array([candidate.box_xyxy for candidate in stable], np.float32).reshape(-1, 4)
        scores = np.array([candidate.predicted_iou for candidate in stable], np.float32)
        kept = [stable[i] for i in suppress_duplicates(Detections(boxes, scores), options.nms_iou).tolist()]
        counts = GridCounts(
            points=self.points,
            masks=len(self.predicted_iou),
            confident=confident,
            stable=len(stable),
            distinct=len(kept),
            highest_iou=float(self.predicted_iou.max(initial=0)),
            predicted_iou=options.predicted_iou,
            stability=options.stability,
        )
        return GridMasks(_as_detections(kept), _as_masks(kept), counts)


def find_grid_masks(
    embeddings: Embeddings, decoder: Runner, plan: TilePlan, mask_logit: float, options: GridOptions
) -> GridMasks:
    """Segment everything in a slice.

    Parameters
    ----------
    embeddings : Embeddings
        All tiles of the slice, encoded.
    decoder : Runner
        The decoder for points, open.
    plan : TilePlan
        How the slice is cut.
    mask_logit : float
        Logit above which a pixel belongs to a mask.
    options : GridOptions
        How many clicks, and what is kept.
    """
    return find_grid_candidates(embeddings, decoder, plan, mask_logit, options).chosen(options)


def find_grid_candidates(
    embeddings: Embeddings, decoder: Runner, plan: TilePlan, mask_logit: float, options: GridOptions
) -> GridCandidates:
    """Ask about the points of a grid, and keep the masks that pass both thresholds; parameters as `find_grid_masks`."""
    candidates: list[_Candidate] = []
    predicted = [np.zeros(0, np.float32)]
    points = 0
    for number, tile in enumerate(plan.tiles):
        grid = grid_points(tile, plan.tile_size_px, options.points_per_side)
        points += len(grid)
        for start in range(0, len(grid), prompts_per_call(decoder)):
            some = grid[start : start + prompts_per_call(decoder), None]
            index = np.full(len(some), number, np.int64)
            outputs = run_points(decoder, embeddings, some, np.ones((len(some), 1), np.int64), index)
            logits, iou = outputs.logits[:, FIRST_ALTERNATIVE:], outputs.iou[:, FIRST_ALTERNATIVE:]
            predicted.append(iou.ravel())
            sure = iou > options.predicted_iou
            # Only those that pass are held; all masks of a tile would be 800 MB at 1024 px.
            candidates += _stable(logits[sure], iou[sure], number, plan, (mask_logit, options))
    return GridCandidates(points, np.concatenate(predicted), tuple(candidates))


def grid_points(tile: Tile, tile_size_px: int, points_per_side: int) -> NDArray[np.float32]:
    """Return the points ``(N, 2)``, (x, y) in tile px, of a regular grid that lie in a tile's own window.

    Parameters
    ----------
    tile : Tile
        The tile.
    tile_size_px : int
        Side of the model's input, which the grid spans.
    points_per_side : int
        Points along a side.
    """
    axis = (np.arange(points_per_side) + 0.5) * tile_size_px / points_per_side
    own, read = tile.own, tile.read
    x, y = (
        axis[(axis + start >= low) & (axis + start < high)]
        for start, low, high in ((read.x0, own.x0, own.x1), (read.y0, own.y0, own.y1))
    )
    rows, columns = np.meshgrid(y, x, indexing="ij")
    return np.stack([columns.ravel(), rows.ravel()], axis=1).astype(np.float32)


def _stable(
    logits: NDArray[np.float32],
    predicted_iou: NDArray[np.float32],
    tile: int,
    plan: TilePlan,
    rule: tuple[float, GridOptions],
) -> Iterator[_Candidate]:
    """Yield the masks ``(n, S/4, S/4)`` of a tile that are stable, judged on the pixels of the slice."""
    threshold, options = rule
    count, offset = len(logits), options.stability_offset
    several = Masks(
        tuple(logits),
        np.zeros((count, 2), np.int64),
        np.full(count, tile, np.int64),
        predicted_iou,
        np.arange(count, dtype=np.int64),
    )
    for index, patch in enumerate(upsample_masks(several, plan, threshold - offset)):
        low = np.count_nonzero(patch.logits > threshold - offset)
        high = np.count_nonzero(patch.logits > threshold + offset)
        stability = high / low if low else 0.0
        if not low or stability < options.stability:
            continue
        mask = patch.logits > threshold
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        if not len(rows):
            continue
        y, x = patch.window.y0, patch.window.x0
        box = int(x + columns[0]), int(y + rows[0]), int(x + columns[-1]), int(y + rows[-1])
        cut, origin = _cropped(logits[index], threshold)
        yield _Candidate(cut, origin, tile, float(predicted_iou[index]), stability, box)


def _cropped(logits: NDArray[np.float32], threshold: float) -> tuple[NDArray[np.float32], tuple[int, int]]:
    """Cut a square with all foreground of a mask, and two cells more on each side as far as the grid goes."""
    grid = len(logits)
    rows, columns = (np.flatnonzero((logits > threshold).any(axis=axis)) for axis in (1, 0))
    side = min(max(rows[-1] - rows[0], columns[-1] - columns[0]) + 5, grid)
    y, x = (int(np.clip(cells[0] - 2, 0, grid - side)) for cells in (rows, columns))
    return logits[y : y + side, x : x + side].copy(), (y, x)


def _as_detections(kept: list[_Candidate]) -> Detections:
    """Return the boxes of masks, at pixel edges."""
    boxes = np.array([candidate.box_xyxy for candidate in kept], np.float32).reshape(-1, 4)
    return Detections(boxes + np.array([0, 0, 1, 1], np.float32), np.ones(len(kept), np.float32))


def _as_masks(kept: list[_Candidate]) -> Masks:
    """Return masks as the painter takes them."""
    return Masks(
        tuple(candidate.logits for candidate in kept),
        np.array([candidate.origin_yx for candidate in kept], np.int64).reshape(-1, 2),
        np.array([candidate.tile for candidate in kept], np.int64),
        np.array([candidate.predicted_iou for candidate in kept], np.float32),
        np.arange(len(kept), dtype=np.int64),
    )

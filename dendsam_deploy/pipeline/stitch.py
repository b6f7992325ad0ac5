"""Objects larger than the overlap of two tiles: each tile saw a part, and the parts agree where both tiles looked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dendsam_deploy.instances import Detections
from dendsam_deploy.pipeline.claims import Claim, Overlaps, intersection, united

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dendsam_deploy.geometry import Window
    from dendsam_deploy.pipeline.prepare import TilePlan

LEAST_AGREEMENT = 0.6
"""IoU, inside the strip that two tiles share, from which two masks are parts of one object."""


@dataclass(frozen=True, slots=True)
class Candidates:
    """Masks of one slice that compete for its pixels.

    Parameters
    ----------
    claims : tuple of Claim
        Their pixels.
    detections : Detections
        The boxes that prompted them, slice px.
    predicted_iou : ndarray, shape (N,), float32
        Predicted IoU.
    """

    claims: tuple[Claim, ...]
    detections: Detections
    predicted_iou: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.claims)

    @property
    def areas_px(self) -> NDArray[np.int64]:
        """Number of pixels that each claims."""
        return np.array([claim.area_px for claim in self.claims], np.int64)

    def take(self, index: NDArray[np.intp] | NDArray[np.bool_]) -> Candidates:
        """Return the candidates that an index or a boolean selection names, in that order."""
        claims = tuple(self.claims[i] for i in np.arange(len(self))[index])
        return Candidates(claims, self.detections.take(index), self.predicted_iou[index])


def stitch_tiles(
    candidates: Candidates,
    box_index: NDArray[np.int64],
    tile_index: NDArray[np.int64],
    overlaps: Overlaps,
    plan: TilePlan,
) -> Candidates:
    """Join the masks that different tiles made of one object.

    Masks of one box are parts of one object. Two masks of different boxes and tiles are joined where their parts inside
    the strip that both tiles see have an IoU of at least `LEAST_AGREEMENT`. The joint mask takes the larger evidence at
    each pixel, the box around both boxes, the higher detection score, and the mean predicted IoU weighted by area.

    Parameters
    ----------
    candidates : Candidates
        Masks, each seen by one tile.
    box_index : ndarray, shape (N,), int64
        The box of each.
    tile_index : ndarray, shape (N,), int64
        The tile of each.
    overlaps : Overlaps
        Their shared pixels.
    plan : TilePlan
        How the slice was cut.

    Returns
    -------
    Candidates
        `candidates` itself where nothing is joined.
    """
    _, first, box = np.unique(box_index, return_index=True, return_inverse=True)
    root = first[box]
    reads = [plan.frame.window_to_slice(tile.read) for tile in plan.tiles]
    rows = zip(overlaps.first.tolist(), overlaps.second.tolist(), overlaps.areas_px.tolist(), strict=True)
    for i, j, shared in rows:
        if tile_index[i] == tile_index[j]:
            continue
        strip = intersection(reads[tile_index[i]], reads[tile_index[j]])
        union = _area_inside(candidates.claims[i], strip) + _area_inside(candidates.claims[j], strip) - shared
        if shared >= LEAST_AGREEMENT * union:
            root[root == root[j]] = root[i]
    if (root == np.arange(len(root))).all():
        return candidates
    return _join(candidates, root)


def _area_inside(claim: Claim, window: Window) -> int:
    """Count the pixels of a claim inside a window."""
    return int(np.count_nonzero(claim.part(intersection(claim.window, window))))


def _join(candidates: Candidates, root: NDArray[np.intp]) -> Candidates:
    """Merge the candidates of equal root into one each."""
    roots, sizes = np.unique(root, return_counts=True)
    kept = candidates.take(roots)
    claims, quality = list(kept.claims), kept.predicted_iou.copy()
    boxes, scores = kept.detections.boxes_xyxy.copy(), kept.detections.scores.copy()
    for row in np.flatnonzero(sizes > 1).tolist():
        parts = candidates.take(root == roots[row])
        claims[row] = united(parts.claims)
        corners = parts.detections.boxes_xyxy
        boxes[row] = np.concatenate([corners[:, :2].min(axis=0), corners[:, 2:].max(axis=0)])
        scores[row] = parts.detections.scores.max()
        quality[row] = np.average(parts.predicted_iou, weights=np.maximum(parts.areas_px, 1))
    return Candidates(tuple(claims), Detections(boxes, scores), quality)

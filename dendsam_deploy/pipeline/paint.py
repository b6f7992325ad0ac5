"""Masks that overlap become labels that do not: every pixel goes to the claim that is worth most there.

The value of claim ``i`` at pixel ``p`` is ::

    v_i(p) = w_e e_i(p)  +  log-odds(s_i q_i)  +  w_s specificity_i

``e_i(p)``
    Evidence, 0 at the mask's threshold to 1 from its median logit on (`claims.claim_from_logits`). Between neighbours
    of equal standing it draws the border where their logits, each relative to its own mask, are equal.
``s_i q_i``
    Detection score times predicted IoU: how sure it is that there is such an object and that this is its mask.
``specificity_i``
    How deep the mask lies inside a larger one (`claims.specificity`). A mask that covers several dendrites is worth
    less on each of them than the dendrite's own mask. A doubtful fragment (``s q`` = .15) inside a sound mask (.8)
    stays behind it all the same, unless it is more than 60 times smaller.

Objects that keep too little of what they claimed are then taken off, islands are cut off, and the competition is held
again, so that no hole remains where a loser stood.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from dendsam_deploy.geometry import Window
from dendsam_deploy.instances import Instances
from dendsam_deploy.pipeline.claims import (
    FULL_EVIDENCE,
    Claim,
    Overlaps,
    bounding,
    claim_from_logits,
    intersection,
    log_odds,
    measure_overlaps,
    specificity,
    suppress_same_masks,
)
from dendsam_deploy.pipeline.label_runs import LabelRuns
from dendsam_deploy.pipeline.stitch import Candidates, stitch_tiles
from dendsam_deploy.pipeline.upsample import upsample_masks

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dendsam_deploy.instances import Detections, Masks
    from dendsam_deploy.pipeline.prepare import TilePlan


@dataclass(frozen=True, slots=True)
class PaintOptions:
    """How masks compete.

    Parameters
    ----------
    mask_logit : float
        Logit above which a pixel belongs to a mask.
    min_area_px : float
        Least area of an object, slice px. Unlabelled holes inside one object that are smaller are filled.
    evidence_weight, specificity_weight : float
        ``w_e`` and ``w_s`` of the formula above.
    same_mask_iou : float
        Masks that overlap by more are one object found twice; the more confident one is kept.
    least_kept_fraction : float
        An object that keeps a smaller part of its mask is a remnant and goes.
    least_island_fraction : float
        A piece that is smaller than this part of the object's largest piece goes.
    """

    mask_logit: float
    min_area_px: float
    evidence_weight: float = 1.0
    specificity_weight: float = 0.75
    same_mask_iou: float = 0.8
    least_kept_fraction: float = 0.4
    least_island_fraction: float = 0.2


def paint_masks(
    detections: Detections, masks: Masks, plan: TilePlan, options: PaintOptions
) -> tuple[NDArray[np.uint32], Instances]:
    """Paint the masks of one slice; the result does not depend on their order.

    Parameters
    ----------
    detections : Detections
        The boxes that prompted the masks, slice px.
    masks : Masks
        Decoded masks.
    plan : TilePlan
        How the slice was cut.
    options : PaintOptions
        How masks compete.

    Returns
    -------
    labels : ndarray, shape (Y, X), uint32
        0 is background; objects are numbered from 1, the most confident first.
    instances : Instances
        The objects; their areas and runs are exactly the labelled pixels.
    """
    candidates, overlaps = _candidates(detections, masks, plan, options)
    distinct = suppress_same_masks(candidates.areas_px, overlaps, options.same_mask_iou)
    contest = _Contest(candidates.take(distinct), overlaps.among(distinct), plan.frame.slice_hw, options)
    runs, survivors = contest.settle()
    painted = runs.without_holes(options.min_area_px)
    return painted.to_image(), _instances(painted, survivors)


def _candidates(
    detections: Detections, masks: Masks, plan: TilePlan, options: PaintOptions
) -> tuple[Candidates, Overlaps]:
    """Return the masks that are large enough, joined across tiles, the most confident first, and who meets whom."""
    patches = upsample_masks(masks, plan, options.mask_logit)
    claims = tuple(claim_from_logits(patch, options.mask_logit) for patch in patches)
    found = Candidates(claims, detections.take(masks.box_index), masks.predicted_iou)
    # Ordered before masks are joined as well: the rounding of their mean scores must not depend on the input's order.
    order = _canonical_order(found)
    found = found.take(order)
    overlaps = measure_overlaps(found.claims)
    joined = stitch_tiles(found, masks.box_index[order], masks.tile_index[order], overlaps, plan)
    if joined is not found:
        found = joined.take(_canonical_order(joined))
        overlaps = measure_overlaps(found.claims)
    large = found.areas_px >= max(options.min_area_px, 1)
    return found.take(large), overlaps.among(large)


def _canonical_order(candidates: Candidates) -> NDArray[np.intp]:
    """Return the order of descending confidence; ties go to the upper, then the left box."""
    boxes = candidates.detections.boxes_xyxy
    confidence = candidates.detections.scores * candidates.predicted_iou
    return np.lexsort((boxes[:, 2], boxes[:, 3], boxes[:, 0], boxes[:, 1], -confidence))


class _Contest:
    """A slice while claims compete for its pixels.

    A claim that leaves or gives up pixels changes no pixels but those that it held, so only there are its neighbours
    asked again.
    """

    def __init__(
        self, candidates: Candidates, overlaps: Overlaps, shape_hw: tuple[int, int], options: PaintOptions
    ) -> None:
        self._candidates = candidates
        self._windows = [claim.window for claim in candidates.claims]
        self._overlaps = overlaps
        self._options = options
        self._strengths = log_odds(candidates.detections.scores * candidates.predicted_iou)
        self._strengths += options.specificity_weight * specificity(candidates.areas_px, overlaps)
        steps = options.evidence_weight * np.arange(FULL_EVIDENCE + 1) / FULL_EVIDENCE
        self._values = (self._strengths[:, None] + steps).astype(np.float32)
        self._values[:, 0] = -np.inf
        self._evidence = [claim.evidence for claim in candidates.claims]
        self._alive = np.ones(len(candidates), bool)
        self._best = np.full(shape_hw, -np.inf, np.float32)
        self._winners = np.zeros(shape_hw, np.int32)
        self._held_px = np.zeros(len(candidates) + 1, np.int64)  # by winner; the first are nobody's
        for index, window in enumerate(self._windows):
            self._bid(index, window)

    def settle(self) -> tuple[LabelRuns, Candidates]:
        """Compete until nobody loses any more.

        It ends because every round but the last takes a claim off or pixels away from one.

        Returns
        -------
        runs : LabelRuns
            The slice; survivor ``k`` has the label ``k + 1``.
        survivors : Candidates
            Those who kept enough.
        """
        areas_px = self._candidates.areas_px
        least_px = np.maximum(self._options.least_kept_fraction * areas_px, max(self._options.min_area_px, 1))
        unchecked = np.ones(len(areas_px), bool)
        while True:
            losers = self._first_to_go(self._alive & (self._held_px[1:] < least_px))
            if losers.any():
                vacated = self._take_off(losers)
            else:
                vacated = self._cut_islands(unchecked & self._alive)
                unchecked[:] = False
                if not vacated:
                    break
            unchecked |= self._refill(vacated)
        number = np.concatenate([[0], np.cumsum(self._alive)])
        runs = LabelRuns.of(self._winners)
        return replace(runs, labels=number[runs.labels]), self._candidates.take(self._alive)

    def _won(self, index: int) -> NDArray[np.bool_]:
        """Return the pixels of a claim's window that it holds."""
        won: NDArray[np.bool_] = self._winners[self._windows[index].slices] == index + 1
        return won

    def _bid(self, index: int, window: Window) -> None:
        """Let a claim bid for pixels of its window; an equal bid does not displace an earlier claim."""
        value = np.take(self._values[index], self._part(index, window))
        best, winners = self._best[window.slices], self._winners[window.slices]
        better = value > best
        displaced = winners[better]
        self._held_px -= np.bincount(displaced, minlength=len(self._held_px))
        self._held_px[index + 1] += len(displaced)
        np.copyto(best, value, where=better)
        np.copyto(winners, index + 1, where=better)

    def _part(self, index: int, window: Window) -> NDArray[np.uint8]:
        """Return a claim's evidence inside a window that lies in its own."""
        return Claim(self._windows[index], self._evidence[index]).part(window)

    def _refill(self, vacated: dict[int, Window]) -> NDArray[np.bool_]:
        """Let the neighbours of claims bid where these gave up pixels; return whose pixels may have changed."""
        concerned = np.zeros(len(self._alive), bool)
        concerned[list(vacated)] = True
        first, second = self._overlaps.first, self._overlaps.second
        bidder, leaver = np.concatenate([first, second]), np.concatenate([second, first])
        asked = concerned[leaver]
        bidder, leaver = bidder[asked], leaver[asked]
        concerned[bidder] = True
        # In the order of the claims, because of two equal bids the earlier one stands.
        for pair in np.lexsort((leaver, bidder)).tolist():
            index = int(bidder[pair])
            common = intersection(self._windows[index], vacated[int(leaver[pair])])
            if self._alive[index] and common.height and common.width:
                self._bid(index, common)
        return concerned

    def _vacate(self, index: int, pixels: NDArray[np.bool_]) -> Window:
        """Take pixels that it holds, of its window, away from a claim, for good; return the window around them."""
        window = self._windows[index]
        (rows,), (columns,) = (np.nonzero(pixels.any(axis=axis)) for axis in (1, 0))
        if not len(rows):
            return Window(window.y0, window.x0, 0, 0)
        y0, x0 = int(rows[0]), int(columns[0])
        around = Window(window.y0 + y0, window.x0 + x0, int(rows[-1]) + 1 - y0, int(columns[-1]) + 1 - x0)
        pixels = pixels[y0 : y0 + around.height, x0 : x0 + around.width]
        self._evidence[index] = self._evidence[index].copy()
        self._part(index, around)[pixels] = 0
        self._best[around.slices][pixels] = -np.inf
        self._winners[around.slices][pixels] = 0
        self._held_px[index + 1] -= np.count_nonzero(pixels)
        return around

    def _first_to_go(self, losers: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Return the losers that overlap no weaker loser: of several that dispute a place, the others may yet live."""
        goes = losers.copy()
        first, second = self._overlaps.first, self._overlaps.second
        # Of two equal ones the later goes first.
        stronger = np.where(self._strengths[first] >= self._strengths[second], first, second)
        goes[stronger[losers[first] & losers[second]]] = False
        return goes

    def _take_off(self, losers: NDArray[np.bool_]) -> dict[int, Window]:
        """Remove claims from the contest; return where they held pixels."""
        self._alive &= ~losers
        return {index: self._vacate(index, self._won(index)) for index in np.flatnonzero(losers).tolist()}

    def _cut_islands(self, who: NDArray[np.bool_]) -> dict[int, Window]:
        """Cut off pieces that are small against the largest piece that a claim won; return where there were some."""
        if not who.any():
            return {}
        around = bounding([self._windows[index] for index in np.flatnonzero(who)])
        runs = LabelRuns.of(self._winners[around.slices])
        piece = runs.pieces(np.append(False, who)[runs.labels])
        sizes = np.bincount(piece, runs.lengths_px)
        owner = np.zeros(len(sizes), np.int64)
        owner[piece] = runs.labels
        largest = np.zeros(len(who) + 1)
        np.maximum.at(largest, owner[1:], sizes[1:])
        small = sizes < self._options.least_island_fraction * largest[owner]
        small[0] = False
        islands = np.repeat(small[piece], runs.lengths_px).reshape(runs.shape_hw)
        vacated = {}
        for index in np.unique(owner[small] - 1).tolist():
            window = self._windows[index]
            y0, x0 = window.y0 - around.y0, window.x0 - around.x0
            inside = islands[y0 : y0 + window.height, x0 : x0 + window.width]
            vacated[index] = self._vacate(index, inside & self._won(index))
        return vacated


def _instances(painted: LabelRuns, survivors: Candidates) -> Instances:
    """Describe the painted objects; survivor ``k`` has the label ``k + 1``."""
    outlines = painted.outlines(len(survivors))
    return Instances(
        ids=np.arange(1, len(outlines) + 1, dtype=np.uint32),
        boxes_xyxy=survivors.detections.boxes_xyxy,
        scores=survivors.detections.scores,
        predicted_iou=survivors.predicted_iou,
        areas_px=np.array([outline.area_px for outline in outlines], np.int64),
        run_lengths=outlines,
    )

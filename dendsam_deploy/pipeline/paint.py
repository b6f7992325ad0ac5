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
from scipy import ndimage

from dendsam_deploy.geometry import Window
from dendsam_deploy.instances import Instances, Masks, RunLengths
from dendsam_deploy.pipeline.claims import (
    FULL_EVIDENCE,
    Claim,
    Overlaps,
    claim_from_logits,
    log_odds,
    measure_overlaps,
    specificity,
    suppress_same_masks,
)
from dendsam_deploy.pipeline.stitch import Candidates, stitch_tiles
from dendsam_deploy.pipeline.upsample import upsample_mask

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dendsam_deploy.instances import Detections
    from dendsam_deploy.pipeline.prepare import TilePlan

_EIGHT_NEIGHBOURS = np.ones((3, 3), bool)


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
    least_kept_fraction: float = 0.25
    least_island_fraction: float = 0.2


def paint_masks(
    detections: Detections, masks: Masks, plan: TilePlan, options: PaintOptions
) -> tuple[NDArray[np.uint32], Instances]:
    """Paint the masks of one slice; the result does not depend on their order.

    Parameters
    ----------
    detections : Detections
        The boxes that prompted the masks, slice px, in the same order.
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
    candidates = _candidates(detections, masks, plan, options)
    overlaps = measure_overlaps(candidates.claims)
    distinct = suppress_same_masks(candidates.areas_px, overlaps, options.same_mask_iou)
    contest = _Contest.between(candidates.take(distinct), overlaps.among(distinct), options)
    labels, survivors = contest.settle(plan.frame.slice_hw, options)
    fill_holes(labels, options.min_area_px)
    return labels, _instances(labels, survivors)


def _candidates(detections: Detections, masks: Masks, plan: TilePlan, options: PaintOptions) -> Candidates:
    """Return the masks that are large enough, joined across tiles, the most confident first."""
    claims = tuple(
        claim_from_logits(upsample_mask(masks, index, plan, options.mask_logit), options.mask_logit)
        for index in range(len(masks))
    )
    found = Candidates(claims, detections, masks.predicted_iou)
    # Ordered before masks are joined as well: the rounding of their mean scores must not depend on the input's order.
    order = _canonical_order(found)
    found = stitch_tiles(found.take(order), masks.tile_index[order], plan)
    found = found.take(_canonical_order(found))
    return found.take(found.areas_px >= max(options.min_area_px, 1))


def _canonical_order(candidates: Candidates) -> NDArray[np.intp]:
    """Return the order of descending confidence; ties go to the upper, then the left box."""
    boxes = candidates.detections.boxes_xyxy
    confidence = candidates.detections.scores * candidates.predicted_iou
    return np.lexsort((boxes[:, 2], boxes[:, 3], boxes[:, 0], boxes[:, 1], -confidence))


@dataclass(frozen=True, slots=True)
class _Contest:
    """Candidates, what they are worth before evidence is heard, and who meets whom."""

    candidates: Candidates
    strengths: NDArray[np.float64]
    overlaps: Overlaps
    evidence_weight: float

    @classmethod
    def between(cls, candidates: Candidates, overlaps: Overlaps, options: PaintOptions) -> _Contest:
        """Weigh the candidates."""
        strengths = log_odds(candidates.detections.scores * candidates.predicted_iou)
        strengths += options.specificity_weight * specificity(candidates.areas_px, overlaps)
        return cls(candidates, strengths, overlaps, options.evidence_weight)

    def settle(self, shape_hw: tuple[int, int], options: PaintOptions) -> tuple[NDArray[np.uint32], Candidates]:
        """Compete until nobody loses any more.

        It ends because every round but the last takes a claim off or pixels away from one.

        Returns
        -------
        labels : ndarray, shape (Y, X), uint32
            Survivor ``k`` has the label ``k + 1``.
        survivors : Candidates
            Those who kept enough.
        """
        claims = list(self.candidates.claims)
        alive = np.ones(len(claims), bool)
        least_px = np.maximum(options.least_kept_fraction * self.candidates.areas_px, max(options.min_area_px, 1))
        while True:
            winners = self._compete(claims, alive, shape_hw)
            kept_px = np.bincount(winners.ravel(), minlength=len(claims) + 1)[1:]
            losers = alive & (kept_px < least_px)
            if losers.any():
                alive &= ~self._first_to_go(losers)
                continue
            trimmed = {
                index: claim
                for index in np.nonzero(alive)[0].tolist()
                if (claim := _without_islands(claims[index], winners, index + 1, options)) is not claims[index]
            }
            if not trimmed:
                break
            for index, claim in trimmed.items():
                claims[index] = claim
        number = np.concatenate([[0], np.cumsum(alive)]).astype(np.uint32)
        return number[winners], self.candidates.take(alive)

    def _compete(self, claims: list[Claim], alive: NDArray[np.bool_], shape_hw: tuple[int, int]) -> NDArray[np.int32]:
        """Return for every pixel of the slice 1 + the claim of the highest value, the earlier one in a tie, or 0."""
        best = np.full(shape_hw, -np.inf, np.float32)
        winners = np.zeros(shape_hw, np.int32)
        evidence = np.arange(FULL_EVIDENCE + 1) / FULL_EVIDENCE
        for index in np.nonzero(alive)[0].tolist():
            value_of = (self.strengths[index] + self.evidence_weight * evidence).astype(np.float32)
            value_of[0] = -np.inf
            value = value_of[claims[index].evidence]
            place = claims[index].window.slices
            better = value > best[place]
            best[place][better] = value[better]
            winners[place][better] = index + 1
        return winners

    def _first_to_go(self, losers: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Return the losers that overlap no weaker loser: of several that dispute a place, the others may yet live."""
        goes = losers.copy()
        first, second = self.overlaps.first, self.overlaps.second
        # Of two equal ones the later goes first.
        stronger = np.where(self.strengths[first] >= self.strengths[second], first, second)
        goes[stronger[losers[first] & losers[second]]] = False
        return goes


def _without_islands(claim: Claim, winners: NDArray[np.int32], label: int, options: PaintOptions) -> Claim:
    """Return a claim without the pieces that are small against the largest piece that it won; itself where none is."""
    won = winners[claim.window.slices] == label
    pieces, count = ndimage.label(won, _EIGHT_NEIGHBOURS)
    if count < 2:
        return claim
    sizes = np.bincount(pieces.ravel())
    sizes[0] = 0
    small = sizes < options.least_island_fraction * sizes.max()
    small[0] = False
    if not small.any():
        return claim
    return replace(claim, evidence=np.where(small[pieces], 0, claim.evidence).astype(np.uint8))


def fill_holes(labels: NDArray[np.uint32], below_px: float) -> None:
    """Fill, in place, unlabelled holes of fewer than `below_px` pixels that a single object encloses."""
    empty, _ = ndimage.label(labels == 0)
    sizes = np.bincount(empty.ravel())
    height, width = labels.shape
    for number, place in enumerate(ndimage.find_objects(empty), start=1):
        rows, columns = place
        touches_border = rows.start == 0 or columns.start == 0 or rows.stop == height or columns.stop == width
        if touches_border or sizes[number] >= below_px:
            continue
        around = slice(rows.start - 1, rows.stop + 1), slice(columns.start - 1, columns.stop + 1)
        hole = empty[around] == number
        owners = np.unique(labels[around][ndimage.binary_dilation(hole) & ~hole])
        if len(owners) == 1:
            labels[around][hole] = owners[0]


def _instances(labels: NDArray[np.uint32], survivors: Candidates) -> Instances:
    """Describe the painted objects; survivor ``k`` has the label ``k + 1``."""
    runs = []
    for label, place in enumerate(ndimage.find_objects(labels.view(np.int32)), start=1):
        rows, columns = place
        window = Window(rows.start, columns.start, rows.stop - rows.start, columns.stop - columns.start)
        runs.append(RunLengths.from_mask(labels[place] == label, window))
    return Instances(
        ids=np.arange(1, len(runs) + 1, dtype=np.uint32),
        boxes_xyxy=survivors.detections.boxes_xyxy,
        scores=survivors.detections.scores,
        predicted_iou=survivors.predicted_iou,
        areas_px=np.array([run.area_px for run in runs], np.int64),
        run_lengths=tuple(runs),
    )

"""Scores by the size of the objects: whether it is the small dendrites that are lost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dendsam_deploy.metrics.matching import MSA_THRESHOLDS, S_INST_THRESHOLDS, match_objects

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    from dendsam_deploy.metrics.overlaps import ObjectOverlaps

ACCURACY_THRESHOLDS = tuple(sorted({*S_INST_THRESHOLDS, *MSA_THRESHOLDS}))
"""IoU .10, .15, ... .95."""

_PANOPTIC_IOU = float(np.nextafter(0.5, 1))
"""Panoptic quality counts an IoU above .5, segmentation accuracy one of .5, too."""

_MATCH_THRESHOLDS = (*ACCURACY_THRESHOLDS, _PANOPTIC_IOU)


@dataclass(frozen=True, slots=True, eq=False)
class ObjectMatches:
    """Which objects were found, and how well; what is left of overlaps when sizes are all that matters.

    Parameters
    ----------
    truth_sizes, segment_sizes : ndarray, shapes (T,) and (S,), int64
        Sizes of the objects on either side.
    truth_found, segment_found : ndarray, shapes (T,) and (S,), int64
        Bit ``i`` is set where the object is matched at IoU ``.10 + .05 i``, the last where it is above .5.
    best_iou : ndarray, shape (T,), float64
        The largest IoU that an object of the truth has with any segment.
    """

    truth_sizes: NDArray[np.int64]
    segment_sizes: NDArray[np.int64]
    truth_found: NDArray[np.int64]
    segment_found: NDArray[np.int64]
    best_iou: NDArray[np.float64]

    @classmethod
    def from_overlaps(cls, overlaps: ObjectOverlaps) -> ObjectMatches:
        """Match objects at every threshold."""
        truth_found = np.zeros(len(overlaps.truth_ids), np.int64)
        segment_found = np.zeros(len(overlaps.segment_ids), np.int64)
        for bit, threshold in enumerate(_MATCH_THRESHOLDS):
            matched = match_objects(overlaps, threshold)
            truth_found[overlaps.pair_truth[matched]] |= 1 << bit
            segment_found[overlaps.pair_segment[matched]] |= 1 << bit
        _, best = overlaps.best_segments()
        return cls(overlaps.truth_voxels, overlaps.segment_voxels, truth_found, segment_found, best)

    def accuracy(self) -> NDArray[np.float64]:
        """Return S(t) = TP / (TP + FP + FN) at each of `ACCURACY_THRESHOLDS`; 1 where neither side has an object."""
        bits = np.arange(len(ACCURACY_THRESHOLDS))
        hits = np.count_nonzero(self.truth_found[:, None] >> bits & 1, axis=0)
        objects = len(self.truth_sizes) + len(self.segment_sizes) - hits
        accuracy: NDArray[np.float64] = np.divide(hits, objects, out=np.ones(len(bits)), where=objects > 0)
        return accuracy

    @classmethod
    def pooled(cls, several: Iterable[ObjectMatches]) -> ObjectMatches:
        """Put the objects of several slices together."""
        several = tuple(several)
        none = np.zeros(0, np.int64)
        return cls(
            np.concatenate([none, *(each.truth_sizes for each in several)]),
            np.concatenate([none, *(each.segment_sizes for each in several)]),
            np.concatenate([none, *(each.truth_found for each in several)]),
            np.concatenate([none, *(each.segment_found for each in several)]),
            np.concatenate([np.zeros(0), *(each.best_iou for each in several)]),
        )


@dataclass(frozen=True, slots=True)
class SizeClass:
    """Scores of the objects of one class of sizes; perfect where neither side has such an object.

    An object of the truth belongs to the class of its own size, and so does the segment that matches it; a segment that
    matches nothing belongs to the class of the segment's size.

    Parameters
    ----------
    low_px, high_px : int or None
        Sizes from `low_px` to below `high_px`, in px or voxels; None: no limit.
    truth_objects, found : int
        Objects of the truth, and how many of them have a segment of IoU above .5.
    extra_segments : int
        Segments of that size that match nothing above .5.
    mean_best_iou : float or None
        Mean of the largest IoU that each object has with any segment; None without objects.
    pq, sq, dq, s_inst, msa, sa50, sa75 : float
        As in `summary.ObjectScores`.
    """

    low_px: int | None
    high_px: int | None
    truth_objects: int
    found: int
    extra_segments: int
    mean_best_iou: float | None
    pq: float
    sq: float
    dq: float
    s_inst: float
    msa: float
    sa50: float
    sa75: float


def tercile_limits(sizes: NDArray[np.int64]) -> tuple[int, ...]:
    """Return the limits that divide objects into three classes of about equal number; fewer where sizes are alike."""
    ranked = np.sort(sizes)
    starts = {-(-len(ranked) * third // 3) for third in (1, 2)}
    limits = {int(ranked[start]) for start in starts if start < len(ranked)}
    return tuple(sorted(limit for limit in limits if limit > ranked[0]))


def score_size_classes(matches: ObjectMatches, limits_px: Sequence[int]) -> tuple[SizeClass, ...]:
    """Score objects class by class, the smallest first.

    Parameters
    ----------
    matches : ObjectMatches
        The objects.
    limits_px : sequence of int
        Ascending sizes at which a new class begins.
    """
    ends = (None, *limits_px, None)
    truth_class = np.searchsorted(limits_px, matches.truth_sizes, side="right")
    segment_class = np.searchsorted(limits_px, matches.segment_sizes, side="right")
    return tuple(
        _score_class(matches, truth_class == number, segment_class == number, (ends[number], ends[number + 1]))
        for number in range(len(limits_px) + 1)
    )


def _score_class(
    matches: ObjectMatches, of_truth: NDArray[np.bool_], of_segments: NDArray[np.bool_], ends: tuple[int | None, ...]
) -> SizeClass:
    """Score one class."""
    found, extra = matches.truth_found[of_truth], matches.segment_found[of_segments]
    best = matches.best_iou[of_truth]
    accuracy = {}
    for bit, threshold in enumerate(ACCURACY_THRESHOLDS):
        hits = int(np.count_nonzero(found >> bit & 1))
        objects = len(found) + int(np.count_nonzero(~extra >> bit & 1))
        accuracy[threshold] = hits / objects if objects else 1.0
    panoptic = _MATCH_THRESHOLDS.index(_PANOPTIC_IOU)
    is_found = (found >> panoptic & 1).astype(bool)  # such pairs are one to one by nature
    false = int(np.count_nonzero(~extra >> panoptic & 1))
    hits = int(np.count_nonzero(is_found))
    is_empty = not len(found) and not false
    sq = 1.0 if is_empty else float(best[is_found].mean()) if hits else 0.0
    dq = 1.0 if is_empty else hits / (hits + (false + len(found) - hits) / 2)
    return SizeClass(
        low_px=ends[0],
        high_px=ends[1],
        truth_objects=len(found),
        found=hits,
        extra_segments=false,
        mean_best_iou=float(best.mean()) if len(best) else None,
        pq=sq * dq,
        sq=sq,
        dq=dq,
        s_inst=sum(accuracy[t] for t in S_INST_THRESHOLDS) / len(S_INST_THRESHOLDS),
        msa=sum(accuracy[t] for t in MSA_THRESHOLDS) / len(MSA_THRESHOLDS),
        sa50=accuracy[0.5],
        sa75=accuracy[0.75],
    )

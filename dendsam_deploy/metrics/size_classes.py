"""Scores by the size of the objects: whether it is the small dendrites that are lost."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from dendsam_deploy.metrics.bootstrap import bootstrap_weights, percentile_interval
from dendsam_deploy.metrics.matching import MSA_THRESHOLDS, S_INST_THRESHOLDS, match_objects
from dendsam_deploy.metrics.object_consistency import object_errors

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

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
    truth_error, segment_error : ndarray, shapes (T,) and (S,), float64
        What each object contributes to E_gs, and each segment to E_sg, see `object_consistency`.
    """

    truth_sizes: NDArray[np.int64]
    segment_sizes: NDArray[np.int64]
    truth_found: NDArray[np.int64]
    segment_found: NDArray[np.int64]
    best_iou: NDArray[np.float64]
    truth_error: NDArray[np.float64]
    segment_error: NDArray[np.float64]

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
        errors = object_errors(overlaps), object_errors(overlaps.transposed())
        return cls(overlaps.truth_voxels, overlaps.segment_voxels, truth_found, segment_found, best, *errors)

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
        none, nothing = np.zeros(0, np.int64), np.zeros(0)
        return cls(
            np.concatenate([none, *(each.truth_sizes for each in several)]),
            np.concatenate([none, *(each.segment_sizes for each in several)]),
            np.concatenate([none, *(each.truth_found for each in several)]),
            np.concatenate([none, *(each.segment_found for each in several)]),
            np.concatenate([nothing, *(each.best_iou for each in several)]),
            np.concatenate([nothing, *(each.truth_error for each in several)]),
            np.concatenate([nothing, *(each.segment_error for each in several)]),
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
    e_gs, e_sg, oce : float or None
        The directed errors of the objects and of the segments of that size, and the smaller one; None without any.
    intervals : mapping
        Score -> lower and upper end, by drawing slices; empty where that was not asked for.
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
    e_gs: float | None
    e_sg: float | None
    oce: float | None
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)


def tercile_limits(sizes: NDArray[np.int64]) -> tuple[int, ...]:
    """Return the limits that divide objects into three classes of about equal number; fewer where sizes are alike."""
    ranked = np.sort(sizes)
    starts = {-(-len(ranked) * third // 3) for third in (1, 2)}
    limits = {int(ranked[start]) for start in starts if start < len(ranked)}
    return tuple(sorted(limit for limit in limits if limit > ranked[0]))


def score_size_classes(
    matches: ObjectMatches,
    limits_px: Sequence[int],
    per_slice: Sequence[ObjectMatches] = (),
    resamples: int = 0,
    seed: int = 0,
) -> tuple[SizeClass, ...]:
    """Score objects class by class, the smallest first.

    Parameters
    ----------
    matches : ObjectMatches
        The objects.
    limits_px : sequence of int
        Ascending sizes at which a new class begins.
    per_slice : sequence of ObjectMatches
        The same objects slice by slice, where slices are to be drawn for intervals.
    resamples, seed : int
        See `bootstrap.bootstrap_weights`.
    """
    ends = (None, *limits_px, None)
    sums = _sums(matches, limits_px)
    scores = _scores(sums)
    intervals = _intervals(per_slice, limits_px, resamples, seed)
    return tuple(
        SizeClass(
            low_px=ends[number],
            high_px=ends[number + 1],
            truth_objects=int(sums[number, _OBJECTS]),
            found=int(sums[number, _FOUND]),
            extra_segments=int(sums[number, _EXTRA]),
            **_named(scores, number),
            intervals={name: ends_of[number] for name, ends_of in intervals.items() if number in ends_of},
        )
        for number in range(len(limits_px) + 1)
    )


_OBJECTS, _BEST_IOU, _FOUND_IOU, _TRUTH_SIZE, _TRUTH_ERROR, _HITS = 0, 1, 2, 3, 4, 5
_FOUND = _HITS + len(ACCURACY_THRESHOLDS)
_SEGMENT_SIZE, _SEGMENT_ERROR, _MISSES = _FOUND + 1, _FOUND + 2, _FOUND + 3
_EXTRA = _MISSES + len(ACCURACY_THRESHOLDS)
"""Columns of the sums that all scores of a class are made of. They add up over slices, so slices can be drawn."""


def _sums(matches: ObjectMatches, limits_px: Sequence[int]) -> NDArray[np.float64]:
    """Return the sums of each class, shape (C, K)."""
    bits = np.arange(len(_MATCH_THRESHOLDS))
    hits = matches.truth_found[:, None] >> bits & 1
    misses = ~matches.segment_found[:, None] >> bits & 1
    truth_columns = (
        np.ones(len(hits)),
        matches.best_iou,
        matches.best_iou * hits[:, -1],  # above .5 pairs are one to one by nature
        matches.truth_sizes,
        matches.truth_sizes * matches.truth_error,
        hits,
    )
    segment_columns = matches.segment_sizes, matches.segment_sizes * matches.segment_error, misses
    return np.concatenate(
        [
            _added_up(np.column_stack(columns), np.searchsorted(limits_px, sizes, side="right"), len(limits_px) + 1)
            for columns, sizes in ((truth_columns, matches.truth_sizes), (segment_columns, matches.segment_sizes))
        ],
        axis=1,
    )


def _added_up(values: NDArray[np.float64], classes: NDArray[np.intp], count: int) -> NDArray[np.float64]:
    """Add up rows (N, K) by their classes: (C, K)."""
    sums = np.zeros((count, values.shape[1]))
    np.add.at(sums, classes, values)
    return sums


def _scores(sums: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    """Return the scores of sums (..., K) by name, each of shape (...); NaN where there is nothing to score."""
    objects, found, extra = (sums[..., column] for column in (_OBJECTS, _FOUND, _EXTRA))
    is_empty = (objects == 0) & (extra == 0)
    sq = np.where(is_empty, 1.0, _divided(sums[..., _FOUND_IOU], found, 0.0))
    dq = _divided(found, found + (extra + objects - found) / 2, 1.0)
    hits = sums[..., _HITS:_FOUND]
    accuracy = _divided(hits, objects[..., None] + sums[..., _MISSES:_EXTRA], 1.0)
    place = {threshold: column for column, threshold in enumerate(ACCURACY_THRESHOLDS)}
    e_gs = _divided(sums[..., _TRUTH_ERROR], sums[..., _TRUTH_SIZE], np.nan)
    e_sg = _divided(sums[..., _SEGMENT_ERROR], sums[..., _SEGMENT_SIZE], np.nan)
    return {
        "mean_best_iou": _divided(sums[..., _BEST_IOU], objects, np.nan),
        "pq": sq * dq,
        "sq": sq,
        "dq": dq,
        "s_inst": accuracy[..., [place[t] for t in S_INST_THRESHOLDS]].mean(-1),
        "msa": accuracy[..., [place[t] for t in MSA_THRESHOLDS]].mean(-1),
        "sa50": accuracy[..., place[0.5]],
        "sa75": accuracy[..., place[0.75]],
        "e_gs": e_gs,
        "e_sg": e_sg,
        "oce": np.fmin(e_gs, e_sg),
    }


def _divided(part: NDArray[np.float64], whole: NDArray[np.float64], otherwise: float) -> NDArray[np.float64]:
    """Divide; where there is nothing to divide by, return another number."""
    result: NDArray[np.float64] = np.divide(part, whole, out=np.full(np.shape(part), otherwise), where=whole > 0)
    return result


def _intervals(
    per_slice: Sequence[ObjectMatches], limits_px: Sequence[int], resamples: int, seed: int
) -> dict[str, dict[int, tuple[float, float]]]:
    """Return the interval of each score by class; none where some draw of slices has nothing to score."""
    if len(per_slice) < 2 or not resamples:
        return {}
    sums = np.stack([_sums(each, limits_px) for each in per_slice])
    weights = bootstrap_weights(len(per_slice), resamples, seed)
    drawn = _scores(np.tensordot(weights, sums, 1))
    return {
        name: {
            number: (float(low), float(high))
            for number, (low, high) in enumerate(percentile_interval(values).T)
            if not np.isnan(low)
        }
        for name, values in drawn.items()
    }


def _named(scores: Mapping[str, NDArray[np.float64]], number: int) -> dict[str, Any]:
    """Return the scores of one class; None where there is nothing to score."""
    return {name: None if np.isnan(values[number]) else float(values[number]) for name, values in scores.items()}

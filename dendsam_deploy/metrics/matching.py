"""One-to-one matching of objects and the accuracy TP / (TP + FP + FN) that it gives."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import min_weight_full_bipartite_matching

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from dendsam_deploy.metrics.overlaps import ObjectOverlaps

S_INST_THRESHOLDS = tuple(step / 20 for step in range(2, 19))
"""IoU .10, .15, ... .90, over which S_inst is the mean. Divided, not added up, so that an IoU of 3/5 reaches .60."""

MSA_THRESHOLDS = tuple(step / 20 for step in range(10, 20))
"""IoU .50, .55, ... .95, over which mSA is the mean."""

_TIE_BREAK = 1e-9
"""Worth of a pair beside its IoU: of assignments with equal total IoU, the one with more pairs is taken."""


def match_objects(overlaps: ObjectOverlaps, iou_threshold: float) -> NDArray[np.bool_]:
    """Assign objects of the truth to segments one to one, such that the sum of the IoU of all pairs is largest.

    Only pairs that reach the threshold take part. Above .5 there is nothing to choose: an object cannot share
    more than half of the union with two others.

    Parameters
    ----------
    overlaps : ObjectOverlaps
        The pairs that meet.
    iou_threshold : float
        Least IoU of a matched pair, itself included.

    Returns
    -------
    ndarray, shape (P,), bool
        Which pairs of `overlaps` are matched.
    """
    iou = overlaps.iou
    matched = iou >= iou_threshold
    rivals = np.bincount(overlaps.pair_truth[matched], minlength=len(overlaps.truth_ids))[overlaps.pair_truth]
    rivals += np.bincount(overlaps.pair_segment[matched], minlength=len(overlaps.segment_ids))[overlaps.pair_segment]
    contested = np.flatnonzero(matched & (rivals > 2))
    if len(contested):
        matched[contested] = _assign(overlaps.pair_truth[contested], overlaps.pair_segment[contested], iou[contested])
    return matched


def _assign(truth: NDArray[np.intp], segment: NDArray[np.intp], iou: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Choose pairs of a bipartite graph, no two with a common end, of the largest total IoU.

    The solver wants every row assigned. So each object of the truth gets a column of its own that stands for "no
    segment" and is worth 1, while a pair is worth 1 + IoU; the ones add up to the same in every assignment.
    """
    objects, row = np.unique(truth, return_inverse=True)
    segments, column = np.unique(segment, return_inverse=True)
    nothing = np.arange(len(objects))
    worth = np.concatenate([1.0 + iou + _TIE_BREAK, np.ones(len(objects))])
    ends = np.concatenate([row, nothing]), np.concatenate([column, len(segments) + nothing])
    graph = csr_array((worth, ends), shape=(len(objects), len(segments) + len(objects)))
    _, chosen = min_weight_full_bipartite_matching(graph, maximize=True)
    is_chosen: NDArray[np.bool_] = chosen[row] == column
    return is_chosen


def segmentation_accuracy(overlaps: ObjectOverlaps, iou_thresholds: Sequence[float]) -> NDArray[np.float64]:
    """Compute S(t) = TP / (TP + FP + FN) for each IoU threshold t.

    Its mean over `S_INST_THRESHOLDS` is S_inst, over `MSA_THRESHOLDS` the mean segmentation accuracy mSA; S(.5) and
    S(.75) are SA50 and SA75. It is 1 where neither side has an object.

    Parameters
    ----------
    overlaps : ObjectOverlaps
        The pairs that meet.
    iou_thresholds : sequence of float, length N
        A pair whose IoU equals the threshold counts as matched.

    Returns
    -------
    ndarray, shape (N,), float64

    References
    ----------
    J. C. Caicedo et al., Nature Methods 16 (2019) 1247-1253, doi:10.1038/s41592-019-0612-7;
    https://github.com/stardist/stardist, stardist/matching.py;
    https://github.com/ZE-WEN/dendrite-3d-instance-seg, evaluation/evaluate.py
    """
    objects = len(overlaps.truth_ids) + len(overlaps.segment_ids)
    if not objects:
        return np.ones(len(iou_thresholds))
    true_positives = np.array([match_objects(overlaps, threshold).sum() for threshold in iou_thresholds])
    accuracy: NDArray[np.float64] = true_positives / (objects - true_positives)
    return accuracy

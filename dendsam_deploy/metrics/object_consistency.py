"""Object-level consistency error (OCE): the score of the paper, and the two directed errors behind it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dendsam_deploy.metrics.overlaps import ObjectOverlaps


@dataclass(frozen=True, slots=True)
class ObjectConsistency:
    """The two directed errors, each from 0 (consistent) to 1.

    Parameters
    ----------
    e_gs : float
        Seen from the truth: grows when objects of the truth are missing, cut or covered by something larger. Blind to
        segments that meet no truth.
    e_sg : float
        Seen from the segmentation: grows when segments are spurious, too small or too large. Blind to objects that
        are missing.
    """

    e_gs: float
    e_sg: float

    @property
    def oce(self) -> float:
        """The smaller of the two. It forgives whole objects that are missing or extra, so never report it alone."""
        return min(self.e_gs, self.e_sg)


def object_consistency(overlaps: ObjectOverlaps) -> ObjectConsistency:
    """Compute both directed errors of the object-level consistency error.

    With objects A_j of the truth and B_i of the segmentation::

        E_gs = sum_j W_j [1 - sum_i W_ji |A_j n B_i| / |A_j u B_i|]
        W_j  = |A_j| / sum_l |A_l|
        W_ji = |B_i| / sum_k |B_k| over the B_k that meet A_j; 0 for a B_i that does not

    and E_sg with exchanged roles. Both are 0 where neither side has an object, and 1 where only one side has any.

    References
    ----------
    M. Polak, H. Zhang, M. Pi, "An evaluation metric for image segmentation of multiple objects", Image and Vision
    Computing 27 (2009) 1223-1227, doi:10.1016/j.imavis.2008.09.008
    """
    if not len(overlaps.truth_ids) or not len(overlaps.segment_ids):
        error = float(len(overlaps.truth_ids) != len(overlaps.segment_ids))
        return ObjectConsistency(error, error)
    return ObjectConsistency(e_gs=_directed_error(overlaps), e_sg=_directed_error(overlaps.transposed()))


def object_errors(overlaps: ObjectOverlaps) -> NDArray[np.float64]:
    """Return what each object of the truth contributes to E_gs: the bracket of `object_consistency`, shape (T,)."""
    count = len(overlaps.truth_ids)
    weight = overlaps.segment_voxels[overlaps.pair_segment].astype(np.float64)
    weighted_iou = np.bincount(overlaps.pair_truth, weight * overlaps.iou, count)
    weight_sum = np.bincount(overlaps.pair_truth, weight, count)
    agreement = np.divide(weighted_iou, weight_sum, out=np.zeros(count), where=weight_sum > 0)
    errors: NDArray[np.float64] = 1.0 - agreement
    return errors


def _directed_error(overlaps: ObjectOverlaps) -> float:
    """Compute E_gs; both sides have objects."""
    return float(np.average(object_errors(overlaps), weights=overlaps.truth_voxels))

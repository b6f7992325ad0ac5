"""The objects of a contingency table and the pairs that meet: what object-level scores are made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dendsam_deploy.metrics.contingency import ContingencyTable


@dataclass(frozen=True, slots=True, eq=False)
class ObjectOverlaps:
    """Objects of the truth, objects of the segmentation ("segments"), and every pair of them that shares a voxel.

    Parameters
    ----------
    truth_ids, truth_voxels : ndarray, shape (T,), int64
        Labels, ascending, and sizes of the objects of the truth. Background is no object.
    segment_ids, segment_voxels : ndarray, shape (S,), int64
        The same of the segments.
    pair_truth, pair_segment : ndarray, shape (P,), intp
        Positions in `truth_ids` and in `segment_ids` of two objects that meet; each pair once.
    pair_voxels : ndarray, shape (P,), int64
        Number of voxels that they share.
    """

    truth_ids: NDArray[np.int64]
    truth_voxels: NDArray[np.int64]
    segment_ids: NDArray[np.int64]
    segment_voxels: NDArray[np.int64]
    pair_truth: NDArray[np.intp]
    pair_segment: NDArray[np.intp]
    pair_voxels: NDArray[np.int64]

    @classmethod
    def from_table(cls, table: ContingencyTable) -> ObjectOverlaps:
        """Find the objects of a table; their sizes include the voxels that they share with background."""
        truth_ids, truth_voxels = _sizes(table.truth, table.voxels)
        segment_ids, segment_voxels = _sizes(table.segment, table.voxels)
        meet = (table.truth > 0) & (table.segment > 0)
        return cls(
            truth_ids,
            truth_voxels,
            segment_ids,
            segment_voxels,
            np.searchsorted(truth_ids, table.truth[meet]),
            np.searchsorted(segment_ids, table.segment[meet]),
            table.voxels[meet],
        )

    @property
    def iou(self) -> NDArray[np.float64]:
        """Intersection over union of each pair, shape (P,)."""
        union = self.truth_voxels[self.pair_truth] + self.segment_voxels[self.pair_segment] - self.pair_voxels
        ratio: NDArray[np.float64] = self.pair_voxels / union
        return ratio

    def transposed(self) -> ObjectOverlaps:
        """Return the same pairs with the roles of truth and segmentation exchanged."""
        return ObjectOverlaps(
            self.segment_ids,
            self.segment_voxels,
            self.truth_ids,
            self.truth_voxels,
            self.pair_segment,
            self.pair_truth,
            self.pair_voxels,
        )

    def best_segments(self) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Find for each object of the truth the segment with which it has the largest IoU.

        Returns
        -------
        ids : ndarray, shape (T,), int64
            Label of that segment, the smallest one of equals; 0 for an object that meets no segment.
        iou : ndarray, shape (T,), float64
            Their IoU; 0 for an object that meets no segment.
        """
        ids, best = np.zeros(len(self.truth_ids), np.int64), np.zeros(len(self.truth_ids))
        iou = self.iou
        # Ascending, so that the last assignment to an object is its best pair.
        order = np.lexsort((-self.pair_segment, iou))
        ids[self.pair_truth[order]] = self.segment_ids[self.pair_segment[order]]
        best[self.pair_truth[order]] = iou[order]
        return ids, best


def _sizes(labels: NDArray[np.int64], voxels: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the labels above 0, ascending, and the number of voxels of each."""
    is_object = labels > 0
    ids, position = np.unique(labels[is_object], return_inverse=True)
    sizes = np.zeros(len(ids), np.int64)
    np.add.at(sizes, position, voxels[is_object])
    return ids, sizes

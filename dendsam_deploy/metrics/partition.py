"""Scores of labellings as partitions of the voxels: variation of information and adapted Rand error.

Both look at the voxels of the truth's objects only, and take the background of the segmentation as one more segment: an
object that was not found is one that was merged with all others that were not found. With no such voxel nothing is
compared, and the scores are those of a perfect result.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dendsam_deploy.metrics.contingency import ContingencyTable


@dataclass(frozen=True, slots=True)
class VariationOfInformation:
    """The two conditional entropies, in bits per voxel; 0 is perfect.

    Parameters
    ----------
    split : float
        H(segmentation | truth): how uncertain the segment of a voxel is when its object is known. Grows when objects
        are cut.
    merge : float
        H(truth | segmentation): how uncertain the object of a voxel is when its segment is known. Grows when objects
        are joined.
    """

    split: float
    merge: float


@dataclass(frozen=True, slots=True)
class AdaptedRand:
    """Agreement about pairs of voxels.

    Parameters
    ----------
    precision : float
        Of the pairs that the segmentation puts together, the share that belongs together. Falls when objects are
        joined.
    recall : float
        Of the pairs that belong together, the share that the segmentation puts together. Falls when objects are cut.
    error : float
        1 - F1 score of the two; 0 is perfect.
    """

    precision: float
    recall: float
    error: float


def variation_of_information(table: ContingencyTable) -> VariationOfInformation:
    """Compute the variation of information, its two parts apart.

    References
    ----------
    M. Meila, Journal of Multivariate Analysis 98 (2007) 873-895, doi:10.1016/j.jmva.2006.11.013
    """
    shared, of_object, of_segment = _sizes_within_truth(table)
    weight = shared / max(shared.sum(), 1.0)
    return VariationOfInformation(
        split=float(weight @ np.log2(of_object / shared)), merge=float(weight @ np.log2(of_segment / shared))
    )


def adapted_rand(table: ContingencyTable) -> AdaptedRand:
    """Compute the adapted Rand error, counting pairs of two different voxels.

    scikit-image's `adapted_rand_error` returns the same error, but returns this recall as its precision and this
    precision as its recall (version 0.26).

    References
    ----------
    I. Arganda-Carreras et al., Frontiers in Neuroanatomy 9 (2015) 142, doi:10.3389/fnana.2015.00142
    """
    shared, of_object, of_segment = _sizes_within_truth(table)
    # Each of the shared voxels has so many partners in the intersection, in its object, in its segment.
    agreed = float(shared @ (shared - 1))
    in_objects, in_segments = float(shared @ (of_object - 1)), float(shared @ (of_segment - 1))
    return AdaptedRand(
        precision=_share(agreed, in_segments),
        recall=_share(agreed, in_objects),
        error=1.0 - _share(2 * agreed, in_objects + in_segments),
    )


def _sizes_within_truth(
    table: ContingencyTable,
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Return for each row with an object of the truth its own voxels, its object's and its segment's inside the truth.

    Each has the shape (K,). They are floats because the square of 3e9 voxels does not fit an int64.
    """
    foreground = table.truth > 0
    shared = table.voxels[foreground].astype(np.float64)
    return shared, _label_sizes(table.truth[foreground], shared), _label_sizes(table.segment[foreground], shared)


def _label_sizes(labels: NDArray[np.int64], voxels: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return for each row the voxels of all rows with its label."""
    distinct, position = np.unique(labels, return_inverse=True)
    sizes = np.zeros(len(distinct))
    np.add.at(sizes, position, voxels)
    return sizes[position]


def _share(part: float, whole: float) -> float:
    """Return part / whole; nothing out of nothing is all of it."""
    return part / whole if whole else 1.0

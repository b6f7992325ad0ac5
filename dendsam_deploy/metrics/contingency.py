"""The sparse contingency table of two labellings: all that any score of this package needs to know of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dendsam_deploy.errors import InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, eq=False)
class ContingencyTable:
    """How many voxels each label of the truth shares with each label of a segmentation. Label 0 is background.

    Tables of the slices of a volume add up to the table of the volume (`total`), so that a volume is never held whole.

    Parameters
    ----------
    truth, segment : ndarray, shape (K,), int64
        The labels of each occurring combination, background included; ascending by truth, then by segment.
    voxels : ndarray, shape (K,), int64
        Number of voxels of that combination, at least 1.
    """

    truth: NDArray[np.int64]
    segment: NDArray[np.int64]
    voxels: NDArray[np.int64]

    def __post_init__(self) -> None:
        for name, column in (("truth", self.truth), ("segment", self.segment), ("voxels", self.voxels)):
            if column.dtype != np.int64 or column.shape != (len(self.voxels),):
                raise InvalidArgumentError(
                    f"column {name} is {column.dtype}{column.shape}, expected int64({len(self.voxels)},)"
                )
        if min(self.truth.min(initial=0), self.segment.min(initial=0)) < 0:
            raise InvalidArgumentError("a label is negative or beyond int64; relabel the objects from 1 upwards")

    def __len__(self) -> int:
        return len(self.voxels)

    @classmethod
    def from_labels(cls, truth: NDArray[np.integer], segmentation: NDArray[np.integer]) -> ContingencyTable:
        """Count the combinations of labels of two arrays of one shape.

        Parameters
        ----------
        truth, segmentation : ndarray of int, any number of axes
            Labels, 0 for background.

        Raises
        ------
        InvalidArgumentError
            The shapes differ, or the labels are not integers from 0 upwards.
        """
        if truth.shape != segmentation.shape:
            raise InvalidArgumentError(f"truth has the shape {truth.shape} but the segmentation {segmentation.shape}")
        for name, labels in (("truth", truth), ("segmentation", segmentation)):
            if labels.dtype.kind not in "iub":
                raise InvalidArgumentError(f"the labels of the {name} are {labels.dtype}, expected integers")
        first, second = truth.reshape(-1), segmentation.reshape(-1)
        # Labels are constant over long runs of voxels: only one voxel per run has to be sorted.
        is_start = np.ones(first.size, bool)
        is_start[1:] = (first[1:] != first[:-1]) | (second[1:] != second[:-1])
        starts = np.flatnonzero(is_start)
        lengths = np.diff(starts, append=first.size).astype(np.int64)
        return cls._summed(first[starts].astype(np.int64), second[starts].astype(np.int64), lengths)

    @classmethod
    def total(cls, tables: Iterable[ContingencyTable]) -> ContingencyTable:
        """Return the table of all voxels of several tables together, such as those of the slices of a volume."""
        tables = tuple(tables)
        if not tables:
            nothing = np.zeros(0, np.int64)
            return cls(nothing, nothing, nothing)
        return cls._summed(
            np.concatenate([table.truth for table in tables]),
            np.concatenate([table.segment for table in tables]),
            np.concatenate([table.voxels for table in tables]),
        )

    @classmethod
    def _summed(
        cls, truth: NDArray[np.int64], segment: NDArray[np.int64], voxels: NDArray[np.int64]
    ) -> ContingencyTable:
        """Sort rows and add up those of the same combination."""
        if not len(voxels):
            return cls(truth, segment, voxels)
        order = np.lexsort((segment, truth))
        truth, segment = truth[order], segment[order]
        is_new = np.ones(len(order), bool)
        is_new[1:] = (truth[1:] != truth[:-1]) | (segment[1:] != segment[:-1])
        starts = np.flatnonzero(is_new)
        return cls(truth[starts], segment[starts], np.add.reduceat(voxels[order], starts))

    def transposed(self) -> ContingencyTable:
        """Return the table with the roles of truth and segmentation exchanged."""
        return self._summed(self.segment, self.truth, self.voxels)

    def without_truth(self, void_labels: Collection[int]) -> ContingencyTable:
        """Leave out the voxels whose truth is void, from the truth and from the segmentation.

        Parameters
        ----------
        void_labels : collection of int
            Labels of the truth that mean "not judged", such as membrane or unlabelled tissue; 0 may be among them.
        """
        return self._rows(~np.isin(self.truth, np.fromiter(void_labels, np.int64)))

    def without_unannotated(self) -> ContingencyTable:
        """Leave out the segments that touch no object of the truth: the rule for a truth that is annotated sparsely.

        Such a segment may be a real object that nobody drew, so it counts neither for nor against the segmentation.

        References
        ----------
        https://github.com/ZE-WEN/dendrite-3d-instance-seg, evaluation/evaluate.py
        """
        touching = self.segment[self.truth > 0]
        return self._rows((self.segment == 0) | np.isin(self.segment, touching))

    def _rows(self, keep: NDArray[np.bool_]) -> ContingencyTable:
        return ContingencyTable(self.truth[keep], self.segment[keep], self.voxels[keep])

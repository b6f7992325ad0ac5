"""Expected run length: how far one can walk along a dendrite's skeleton before the segmentation goes wrong."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dendsam_deploy.errors import InvalidArgumentError

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class RunLength:
    """Expected run length and what shortens it; all lengths in the unit of the edges.

    Parameters
    ----------
    expected : float
        Mean length of the correct segment around a point that is chosen anywhere on the skeletons, each unit of length
        with the same probability; 0 for a point that lies in no correct segment.
    longest : float
        The same for a perfect segmentation: no result can be better.
    correct, split, merged, omitted : float
        Total length of the edges of each kind. The kinds exclude each other and add up to the length of the skeletons.
    merged_segments : int
        Segments that hold nodes of more than one skeleton.
    """

    expected: float
    longest: float
    correct: float
    split: float
    merged: float
    omitted: float
    merged_segments: int

    @property
    def share(self) -> float:
        """The expected run length over the longest possible one, 0 to 1; 1 where there is nothing to walk along."""
        return self.expected / self.longest if self.longest else 1.0


def expected_run_length(
    skeletons: NDArray[np.int64], segments: NDArray[np.int64], edges: NDArray[np.int64], lengths: NDArray[np.float64]
) -> RunLength:
    """Compute the expected run length of a segmentation.

    An edge between two nodes is *omitted* if one of them lies in background; otherwise *merged* if one of them lies in
    a segment that also holds a node of another skeleton; otherwise *split* if they lie in different segments; otherwise
    *correct*. The run of a point on a correct edge is the length of all correct edges of its skeleton in its segment,
    and its expectation over all points is ::

        ERL = sum over skeletons s and segments g of  L(s, g)^2  /  sum over s of L(s)

    with ``L(s, g)`` the length of the correct edges of ``s`` in ``g`` and ``L(s)`` that of all edges of ``s``. A merger
    therefore costs both dendrites all of their length in it, wherever it happened.

    Parameters
    ----------
    skeletons : ndarray, shape (N,), int64
        The skeleton of each node.
    segments : ndarray, shape (N,), int64
        The segment at each node, 0 for background.
    edges : ndarray, shape (E, 2), int64
        Pairs of nodes of the same skeleton.
    lengths : ndarray, shape (E,), float64
        Length of each edge.

    Raises
    ------
    InvalidArgumentError
        Where an edge joins two skeletons.

    References
    ----------
    M. Januszewski et al., Nature Methods 15 (2018) 605-610, doi:10.1038/s41592-018-0049-4
    """
    first, second = edges[:, 0], edges[:, 1]
    if (skeletons[first] != skeletons[second]).any():
        raise InvalidArgumentError("an edge joins two skeletons; every edge lies within one")
    inside = segments > 0
    pairs = np.unique(np.stack([segments[inside], skeletons[inside]]), axis=1)
    held, counts = np.unique(pairs[0], return_counts=True)
    mergers = held[counts > 1]
    is_omitted = ~(inside[first] & inside[second])
    is_merged = ~is_omitted & (np.isin(segments[first], mergers) | np.isin(segments[second], mergers))
    is_split = ~is_omitted & ~is_merged & (segments[first] != segments[second])
    is_correct = ~(is_omitted | is_merged | is_split)
    total = float(lengths.sum())
    runs = _length_of_each(np.stack([skeletons[first], segments[first]])[:, is_correct], lengths[is_correct])
    whole = _length_of_each(skeletons[first][None], lengths)
    return RunLength(
        expected=float(runs @ runs) / total if total else 0.0,
        longest=float(whole @ whole) / total if total else 0.0,
        correct=float(lengths[is_correct].sum()),
        split=float(lengths[is_split].sum()),
        merged=float(lengths[is_merged].sum()),
        omitted=float(lengths[is_omitted].sum()),
        merged_segments=len(mergers),
    )


def _length_of_each(keys: NDArray[np.int64], lengths: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the total length of the edges of each distinct column of `keys`."""
    distinct, place = np.unique(keys, axis=1, return_inverse=True)
    sums = np.zeros(distinct.shape[1])
    np.add.at(sums, place.reshape(-1), lengths)
    return sums

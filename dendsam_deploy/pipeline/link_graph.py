"""The overlap graph: how likely two overlapping objects are one dendrite, and which of the doubtful pairs to believe.

Evidence is a log-odds, linear in four features without unit. The coefficients were fitted to pairs of objects from
three volumes with known answer (isotropic 10 nm, 32 x 32 x 40 nm and 4 x 4 x 50 nm voxels; clean, at reduced
z-resolution, and with outlines jittered and objects dropped or fused as a segmentation does), each volume with equal
weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dendsam_deploy.pipeline.link_overlap import PairVerdict, WeighedPairs

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dendsam_deploy.pipeline.link import LinkOptions
    from dendsam_deploy.pipeline.link_overlap import Overlaps


@dataclass(frozen=True, slots=True)
class Evidence:
    """Coefficients of a logistic model: intercept, IoU, containment, log(area ratio), centroid shift."""

    intercept: float
    iou: float
    containment: float
    log_area_ratio: float
    shift: float

    def log_odds(self, overlaps: Overlaps) -> NDArray[np.float64]:
        """Return log(p / (1 - p)) that the objects of each pair belong to one dendrite."""
        result: NDArray[np.float64] = (
            self.intercept
            + self.iou * overlaps.iou
            + self.containment * overlaps.containment
            + self.log_area_ratio * np.log(overlaps.area_ratio)
            + self.shift * overlaps.shift
        )
        return result


CONTINUATION = Evidence(intercept=-3.9, iou=8.8, containment=5.2, log_area_ratio=1.1, shift=0.5)
"""For two objects that both lack a certain partner in the other slice."""

BRANCH = Evidence(intercept=-5.6, iou=2.0, containment=7.8, log_area_ratio=0.9, shift=0.2)
"""For an object without partner that meets one which already has its own: here containment tells, IoU hardly does."""

CERTAIN_IOU = 0.6
"""Above one half, a partner is unique on both sides. Of the 41,814 such pairs in the data of the fit 18 were wrong."""

GAP_LOG_ODDS = -2.0
"""Added for each slice that a pair skips: dendrites vanish for a slice more seldom than others take their place."""


def judge_by_evidence(overlaps: Overlaps, skipped: int, options: LinkOptions) -> PairVerdict:
    """Sort the overlapping pairs of two slices into certain, doubtful and hopeless ones.

    Parameters
    ----------
    overlaps : Overlaps
        All pairs of two adjacent slices, or, across a gap, the pairs of objects that found no certain partner in
        between.
    skipped : int
        Slices between the two. Nothing is certain across a gap, and no branch is looked for.
    options : LinkOptions
        `min_probability` and `min_branch_probability` are read.
    """
    continuation = CONTINUATION.log_odds(overlaps) + GAP_LOG_ODDS * skipped
    likely = continuation >= _log_odds(options.min_probability)
    if skipped:
        index = np.flatnonzero(likely)
        return PairVerdict(WeighedPairs.none(), WeighedPairs(index, continuation[index]), WeighedPairs.none())

    certain = overlaps.iou > CERTAIN_IOU
    lower_is_free = ~np.isin(overlaps.lower, overlaps.lower[certain])
    upper_is_free = ~np.isin(overlaps.upper, overlaps.upper[certain])
    branch = BRANCH.log_odds(overlaps)
    chained = np.flatnonzero(certain)
    continuing = np.flatnonzero(likely & lower_is_free & upper_is_free)
    branching = np.flatnonzero((branch >= _log_odds(options.min_branch_probability)) & (lower_is_free | upper_is_free))
    return PairVerdict(
        chained=WeighedPairs(chained, continuation[chained]),
        continuations=WeighedPairs(continuing, continuation[continuing]),
        branches=WeighedPairs(branching, branch[branching]),
    )


@dataclass(frozen=True, slots=True)
class Candidates:
    """Doubtful links between objects, numbered through all slices.

    Parameters
    ----------
    lower, upper : ndarray, shape (C,), int64
        The two objects; `lower` lies in the earlier slice.
    log_odds : ndarray, shape (C,), float32
        Evidence for each.
    """

    lower: NDArray[np.int64]
    upper: NDArray[np.int64]
    log_odds: NDArray[np.float32]

    def strongest_first(self) -> NDArray[np.intp]:
        """Return the order of judgement: descending evidence, ties in the order of the objects."""
        return np.lexsort((self.lower, self.upper, -self.log_odds))


@dataclass(frozen=True, slots=True)
class Tracks:
    """Chains of objects, one in each of consecutive slices.

    Parameters
    ----------
    of_object : ndarray, shape (N,), uint32
        Track of each object; objects are numbered through all slices. Tracks are numbered in order of their first
        object.
    z_of_object : ndarray, shape (N,), int32
        Slice of each object.
    z_first, z_last : ndarray, shape (T,), int32
        First and last slice of each track.
    """

    of_object: NDArray[np.uint32]
    z_of_object: NDArray[np.int32]
    z_first: NDArray[np.int32]
    z_last: NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Merger:
    """Which tracks are one dendrite.

    Parameters
    ----------
    root_of_track : ndarray, shape (T,), uint32
        The first track of the dendrite that each track belongs to.
    continued, branched : ndarray of bool
        Which of the candidates were believed.
    """

    root_of_track: NDArray[np.uint32]
    continued: NDArray[np.bool_]
    branched: NDArray[np.bool_]


def merge_tracks(tracks: Tracks, continuations: Candidates, branches: Candidates, conflict_slices: int) -> Merger:
    """Judge all doubtful links, the strongest first: continuations of tracks, then branches.

    A link is refused where it contradicts a stronger one:

    - each end of a track is used once, so a track has one continuation, or branches off one other track;
    - **conflict rule**: a link between slices z and z' unites two dendrites. Where these lie side by side in at least
      `conflict_slices` slices up to z *and* in as many from z' on, they are two dendrites that touch, and the link is
      an accident. A true branch runs beside its parent on one side of the branching point only.

    This is greedy contraction of a signed graph whose repulsive edges are infinitely strong (a mutex watershed), with
    a total order.

    Parameters
    ----------
    tracks : Tracks
        The chains that are certain.
    continuations, branches : Candidates
        Doubtful links.
    conflict_slices : int
        Slices on each side that make a conflict.

    References
    ----------
    Wolf et al. 2018, ECCV, doi:10.1007/978-3-030-01225-0_34 (mutex watershed); Bailoni et al. 2022, CVPR,
    doi:10.1109/CVPR52688.2022.01137 (greedy contraction of signed graphs).
    """
    clusters = _Clusters(tracks, conflict_slices)
    continued = np.zeros(len(continuations.lower), bool)
    for candidate in continuations.strongest_first().tolist():
        below, above = int(continuations.lower[candidate]), int(continuations.upper[candidate])
        if clusters.is_open_above(below) and clusters.is_open_below(above):
            continued[candidate] = clusters.link(below, above)
    branched = np.zeros(len(branches.lower), bool)
    for candidate in branches.strongest_first().tolist():
        below, above = int(branches.lower[candidate]), int(branches.upper[candidate])
        if clusters.is_open_above(below) or clusters.is_open_below(above):
            branched[candidate] = clusters.link(below, above)
    roots = np.array([clusters.root(track) for track in range(len(tracks.z_first))], np.uint32)
    return Merger(roots, continued, branched)


class _Clusters:
    """Tracks that are being united: a union-find that knows in which slices each cluster is present."""

    def __init__(self, tracks: Tracks, conflict_slices: int) -> None:
        self._tracks = tracks
        self._conflict_slices = conflict_slices
        self._parents = np.arange(len(tracks.z_first), dtype=np.uint32)
        self._used_above = np.zeros(len(tracks.z_first), bool)
        self._used_below = np.zeros(len(tracks.z_first), bool)
        self._presence: dict[int, int] = {}

    def root(self, track: int) -> int:
        """Return the first track of a cluster, and shorten the way to it."""
        parents = self._parents
        while parents[track] != track:
            parents[track] = parents[parents[track]]
            track = int(parents[track])
        return track

    def is_open_above(self, item: int) -> bool:
        """Tell whether an object is the last one of its track, and nothing follows that yet."""
        track = self._tracks.of_object[item]
        ends_here = self._tracks.z_of_object[item] == self._tracks.z_last[track]
        return bool(ends_here and not self._used_above[track])

    def is_open_below(self, item: int) -> bool:
        """Tell whether an object is the first one of its track, and nothing precedes that yet."""
        track = self._tracks.of_object[item]
        starts_here = self._tracks.z_of_object[item] == self._tracks.z_first[track]
        return bool(starts_here and not self._used_below[track])

    def link(self, below: int, above: int) -> bool:
        """Unite the clusters of two objects unless they are in conflict; tell whether the link stands."""
        first, second = (self.root(int(self._tracks.of_object[item])) for item in (below, above))
        if first != second:
            if self._are_in_conflict(first, second, below, above):
                return False
            root, other = min(first, second), max(first, second)
            self._presence[root] = self._slices_of(first) | self._slices_of(second)
            self._presence.pop(other, None)
            self._parents[other] = root
        if self.is_open_above(below):
            self._used_above[self._tracks.of_object[below]] = True
        if self.is_open_below(above):
            self._used_below[self._tracks.of_object[above]] = True
        return True

    def _are_in_conflict(self, first: int, second: int, below: int, above: int) -> bool:
        """Apply the conflict rule of `merge_tracks` to two clusters."""
        shared = self._slices_of(first) & self._slices_of(second)
        z_below, z_above = (int(self._tracks.z_of_object[item]) for item in (below, above))
        before = (shared & ((1 << (z_below + 1)) - 1)).bit_count()
        after = (shared >> z_above).bit_count()
        return min(before, after) >= self._conflict_slices

    def _slices_of(self, root: int) -> int:
        """Return the slices in which a cluster is present, as the bits of an integer."""
        if root not in self._presence:
            z_first, z_last = int(self._tracks.z_first[root]), int(self._tracks.z_last[root])
            self._presence[root] = ((1 << (z_last - z_first + 1)) - 1) << z_first
        return self._presence[root]


def _log_odds(probability: float) -> float:
    """Return the natural logarithm of p / (1 - p)."""
    return float(np.log(probability / (1 - probability)))

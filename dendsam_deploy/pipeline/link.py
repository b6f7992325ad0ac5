"""Link the objects of consecutive slices into 3-D objects, slice by slice.

Two things happen. While slices stream past, pairs of objects that continue one another beyond doubt are chained into
*tracks*; what is less clear (branches, weak overlaps, jumps over a gap) is kept as a *candidate*. After the last
slice the candidates are judged in descending order of their evidence, and those that would fuse two dendrites that
run side by side are refused (`link_graph.merge_tracks`).
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeVar, get_args

import numpy as np

from dendsam_deploy.errors import InvalidArgumentError
from dendsam_deploy.pipeline.link_align import find_shift
from dendsam_deploy.pipeline.link_graph import Candidates, Tracks, judge_by_evidence, merge_tracks
from dendsam_deploy.pipeline.link_greedy import judge_by_iou
from dendsam_deploy.pipeline.link_overlap import SliceRuns, measure_overlaps

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from numpy.typing import NDArray

    from dendsam_deploy.instances import Instances
    from dendsam_deploy.pipeline.link_overlap import Overlaps, PairVerdict, WeighedPairs

LinkMethod = Literal["overlap-graph", "iou-greedy"]
"""``overlap-graph`` follows branches and resolves conflicts; ``iou-greedy`` is the baseline, one partner above and
one below."""

_Scalar = TypeVar("_Scalar", bound=np.generic)


@dataclass(frozen=True, slots=True)
class LinkOptions:
    """How objects of different slices are joined.

    Parameters
    ----------
    method : {"overlap-graph", "iou-greedy"}
        The linker.
    max_gap_slices : int
        Most slices for which a dendrite may vanish and still be the same one afterwards.
    align : bool
        Undo shifts between slices that the objects make evident (`link_align.find_shift`).
    min_probability : float
        overlap-graph: least probability of a doubtful continuation.
    min_branch_probability : float
        overlap-graph: least probability that an object without partner is a branch of another.
    conflict_slices : int
        overlap-graph: two dendrites side by side in that many slices on both sides of a link are never united by it.
    min_iou : float
        iou-greedy: least IoU of a link.
    """

    method: LinkMethod = "overlap-graph"
    max_gap_slices: int = 2
    align: bool = True
    min_probability: float = 0.5
    min_branch_probability: float = 0.65
    conflict_slices: int = 2
    min_iou: float = 0.25

    def __post_init__(self) -> None:
        if self.method not in get_args(LinkMethod):
            raise InvalidArgumentError(f"there is no linker {self.method!r}; choose one of {get_args(LinkMethod)}")
        if self.max_gap_slices < 0:
            raise InvalidArgumentError(f"max_gap_slices is {self.max_gap_slices}, expected 0 or more")
        if self.conflict_slices < 1:
            raise InvalidArgumentError(f"conflict_slices is {self.conflict_slices}, expected 1 or more")
        for name in ("min_probability", "min_branch_probability", "min_iou"):
            if not 0 < getattr(self, name) < 1:
                raise InvalidArgumentError(f"{name} is {getattr(self, name)}, expected a number between 0 and 1")


@dataclass(frozen=True, slots=True)
class SliceObjects:
    """The painted objects of slice `z`."""

    z: int
    instances: Instances


@dataclass(frozen=True, slots=True)
class LinkResult:
    """Which 3-D object each 2-D object belongs to. Look-ups are by slice; the arrays run through all slices.

    Parameters
    ----------
    rows_of_z : mapping
        For each slice that was linked, its half-open range of rows in the arrays below.
    ids_2d, ids_3d : ndarray, shape (N,), uint32
        Label in the slice, and 3-D object, of each 2-D object. 3-D objects are numbered from 1 in the order of their
        first appearance (z, 2-D label).
    confidence : ndarray, shape (N,), float32
        Probability of the best link of each 2-D object to another slice; 0 where it has none.
    object_count : int
        Number of 3-D objects, which is also the largest id.
    """

    rows_of_z: Mapping[int, tuple[int, int]]
    ids_2d: NDArray[np.uint32]
    ids_3d: NDArray[np.uint32]
    confidence: NDArray[np.float32]
    object_count: int

    def ids_of(self, z: int) -> NDArray[np.uint32]:
        """Return the table that turns the labels of slice `z` into 3-D ids; entry 0 is 0.

        Raises
        ------
        InvalidArgumentError
            The slice was not linked. A slice without objects has the table ``[0]``.
        """
        return self._table(z, self.ids_3d)

    def confidence_of(self, z: int) -> NDArray[np.float32]:
        """Return, indexed by the labels of slice `z`, the confidence of each object; raises as `ids_of` does."""
        return self._table(z, self.confidence)

    def _table(self, z: int, values: NDArray[_Scalar]) -> NDArray[_Scalar]:
        """Spread the values of one slice over its labels."""
        if z not in self.rows_of_z:
            raise InvalidArgumentError(f"slice {z} was not linked; linked are {len(self.rows_of_z)} other slices")
        first, last = self.rows_of_z[z]
        labels = self.ids_2d[first:last]
        table = np.zeros(int(labels[-1]) + 1 if len(labels) else 1, values.dtype)
        table[labels] = values[first:last]
        return table


def link_slices(pieces: Iterable[SliceObjects], options: LinkOptions) -> LinkResult:
    """Link the objects of a volume's slices.

    Only the last ``options.max_gap_slices + 1`` slices are held; what grows is 16 bytes for each 2-D object and 20
    for each doubtful pair. The result is a function of the objects alone: no hashing, no threads, ties in the order
    of (z, label).

    Parameters
    ----------
    pieces : iterable of SliceObjects
        Slices in ascending z. A slice that is left out counts as one without objects.
    options : LinkOptions
        Method and thresholds.

    Returns
    -------
    LinkResult
        Tables from 2-D labels to 3-D ids.

    Raises
    ------
    InvalidArgumentError
        Slices out of order, or objects of one slice that share pixels.
    """
    growth = _Growth(options)
    for piece in pieces:
        growth.add(piece)
    return growth.result()


_JUDGES: dict[LinkMethod, Callable[[Overlaps, int, LinkOptions], PairVerdict]] = {
    "overlap-graph": judge_by_evidence,
    "iou-greedy": judge_by_iou,
}


@dataclass(slots=True)
class _Slice:
    """A slice that has been seen, and what is still known of it.

    `runs` holds the objects that later slices may link to, `rows` their rows; `tracks` and `confidence` have one
    entry for each object of the slice, -1 for an object that is not on a track yet.
    """

    z: int
    first_object: int
    runs: SliceRuns
    rows: NDArray[np.intp]
    tracks: NDArray[np.int64]
    confidence: NDArray[np.float32]
    is_continued: NDArray[np.bool_]


class _Growth:
    """Tracks and candidates while slices stream past."""

    def __init__(self, options: LinkOptions) -> None:
        self._options = options
        self._recent: list[_Slice] = []
        self._anchor: SliceRuns | None = None
        self._offset_yx = (0, 0)
        self._rows_of_z: dict[int, tuple[int, int]] = {}
        self._ids_2d: list[NDArray[np.uint32]] = []
        self._tracks: list[NDArray[np.uint32]] = []
        self._confidence: list[NDArray[np.float32]] = []
        self._z_first, self._z_last = array("i"), array("i")
        self._continuations, self._branches = _CandidateList(), _CandidateList()

    def add(self, piece: SliceObjects) -> None:
        """Link one more slice to those before it."""
        latest = max(self._rows_of_z, default=-1)
        if piece.z <= latest:
            raise InvalidArgumentError(f"slice {piece.z} comes after slice {latest}; link slices in ascending z from 0")
        count = len(piece.instances)
        first_object = self._rows_of_z[latest][1] if self._rows_of_z else 0
        above = _Slice(
            z=piece.z,
            first_object=first_object,
            runs=self._aligned(SliceRuns.from_instances(piece.instances)),
            rows=np.arange(count),
            tracks=np.full(count, -1, np.int64),
            confidence=np.zeros(count, np.float32),
            is_continued=np.zeros(count, bool),
        )
        self._recent = [below for below in self._recent if piece.z - below.z - 1 <= self._options.max_gap_slices]
        for below in reversed(self._recent):
            self._link(below, above)
        self._start_tracks(above)
        self._recent.append(above)
        self._rows_of_z[piece.z] = (first_object, first_object + count)
        self._ids_2d.append(piece.instances.ids)
        self._tracks.append(above.tracks.astype(np.uint32))
        self._confidence.append(above.confidence)

    def _aligned(self, runs: SliceRuns) -> SliceRuns:
        """Bring a slice into the frame of those before it."""
        runs = runs.moved(self._offset_yx)
        if self._options.align and self._anchor is not None:
            shift_yx = find_shift(self._anchor, runs)
            runs = runs.moved(shift_yx)
            self._offset_yx = (self._offset_yx[0] + shift_yx[0], self._offset_yx[1] + shift_yx[1])
        if len(runs):
            self._anchor = runs
        return runs

    def _link(self, below: _Slice, above: _Slice) -> None:
        """Judge the pairs of two slices; across a gap only of objects that found no partner in between."""
        skipped = above.z - below.z - 1
        if skipped:
            below.runs, below.rows = _open_objects(below, ~below.is_continued)
            runs_above, rows_above = _open_objects(above, above.tracks < 0)
        else:
            runs_above, rows_above = above.runs, above.rows
        overlaps = measure_overlaps(below.runs, runs_above)
        verdict = _JUDGES[self._options.method](overlaps, skipped, self._options)

        lower, upper = below.rows[overlaps.lower], rows_above[overlaps.upper]
        chained = verdict.chained.index
        for row_below, row_above in zip(lower[chained].tolist(), upper[chained].tolist(), strict=True):
            track = int(below.tracks[row_below])
            above.tracks[row_above] = track
            self._z_last[track] = above.z
        below.is_continued[lower[chained]] = True
        probability = _probability(verdict.chained.log_odds)
        below.confidence[lower[chained]] = np.maximum(below.confidence[lower[chained]], probability)
        above.confidence[upper[chained]] = probability
        for candidates, pairs in ((self._continuations, verdict.continuations), (self._branches, verdict.branches)):
            candidates.extend(lower + below.first_object, upper + above.first_object, pairs)

    def _start_tracks(self, above: _Slice) -> None:
        """Give each object that continues nothing a track of its own."""
        new = np.flatnonzero(above.tracks < 0)
        above.tracks[new] = len(self._z_first) + np.arange(len(new))
        self._z_first.extend([above.z] * len(new))
        self._z_last.extend([above.z] * len(new))

    def result(self) -> LinkResult:
        """Judge the candidates and number the objects."""
        z_values = np.fromiter(self._rows_of_z, np.int32, len(self._rows_of_z))
        tracks = Tracks(
            of_object=_joined(self._tracks, np.uint32),
            z_of_object=np.repeat(z_values, [len(ids) for ids in self._ids_2d]),
            z_first=np.array(self._z_first, np.int32),
            z_last=np.array(self._z_last, np.int32),
        )
        continuations, branches = self._continuations.joined(), self._branches.joined()
        merger = merge_tracks(tracks, continuations, branches, self._options.conflict_slices)
        confidence = _joined(self._confidence, np.float32)
        for candidates, believed in ((continuations, merger.continued), (branches, merger.branched)):
            probability = _probability(candidates.log_odds[believed])
            for objects in (candidates.lower[believed], candidates.upper[believed]):
                np.maximum.at(confidence, objects, probability)
        roots, rank_of_track = np.unique(merger.root_of_track, return_inverse=True)
        return LinkResult(
            rows_of_z=dict(self._rows_of_z),
            ids_2d=_joined(self._ids_2d, np.uint32),
            ids_3d=(rank_of_track[tracks.of_object] + 1).astype(np.uint32),
            confidence=confidence,
            object_count=len(roots),
        )


class _CandidateList:
    """Candidates as they come, in pieces."""

    def __init__(self) -> None:
        self._pieces: list[Candidates] = []

    def extend(self, lower: NDArray[np.int64], upper: NDArray[np.int64], pairs: WeighedPairs) -> None:
        """Add those pairs of the objects `lower` and `upper` that have been weighed."""
        if len(pairs.index):
            log_odds = pairs.log_odds.astype(np.float32)
            self._pieces.append(Candidates(lower[pairs.index], upper[pairs.index], log_odds))

    def joined(self) -> Candidates:
        """Return all of them."""
        return Candidates(
            _joined([piece.lower for piece in self._pieces], np.int64),
            _joined([piece.upper for piece in self._pieces], np.int64),
            _joined([piece.log_odds for piece in self._pieces], np.float32),
        )


def _open_objects(piece: _Slice, is_open: NDArray[np.bool_]) -> tuple[SliceRuns, NDArray[np.intp]]:
    """Return those of the objects still held that are open, and their rows."""
    kept = np.flatnonzero(is_open[piece.rows])
    return piece.runs.take(kept), piece.rows[kept]


def _probability(log_odds: NDArray[np.floating]) -> NDArray[np.float32]:
    """Return 1 / (1 + exp(-x))."""
    result: NDArray[np.float32] = (1 / (1 + np.exp(-log_odds.astype(np.float64)))).astype(np.float32)
    return result


def _joined(pieces: list[NDArray[_Scalar]], dtype: type[_Scalar]) -> NDArray[_Scalar]:
    """Concatenate arrays of one dtype; none give an empty one."""
    return np.concatenate(pieces) if pieces else np.zeros(0, dtype)

"""Intervals of the scores of slices, by drawing slices, and of a volume, by drawing or leaving out blocks of them."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import TYPE_CHECKING

import numpy as np

from dendsam_deploy.evaluate.score_report import NO_INTERVALS, Intervals
from dendsam_deploy.metrics.bootstrap import (
    blocks_of,
    bootstrap_weights,
    jackknife_interval,
    mean_intervals,
    percentile_interval,
)
from dendsam_deploy.metrics.contingency import ContingencyTable
from dendsam_deploy.metrics.summary import ObjectScores, score_objects, score_partition

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from dendsam_deploy.evaluate.score_report import Bounds, EvaluateOptions

MOST_BLOCKS = 64
"""Blocks of neighbouring slices that a volume is resampled by: memory and time do not grow with its depth."""

_POOLED_RESAMPLES, _LEAST_DRAWS, _POOLED_ROWS = 200, 50, 20_000_000
"""Draws of pooled objects, which cost as much as all slices together: 200, fewer where there are millions of rows."""

_UNBOUNDED = frozenset({"vi_split", "vi_merge"})
"""Scores that can be above 1."""

_DRAW_STRIDE = 2**32


class VolumeBlocks:
    """The tables of a volume's slices, added up block by block as they come.

    Parameters
    ----------
    slices : int
        Number of slices that may come.
    """

    def __init__(self, slices: int) -> None:
        self._block_of = blocks_of(slices, MOST_BLOCKS)
        self._pending: dict[int, list[ContingencyTable]] = {}
        self._seen = 0

    def skip(self) -> None:
        """Leave out the next slice."""
        self._seen += 1

    def add(self, table: ContingencyTable) -> None:
        """Add the table of the next slice."""
        pending = self._pending.setdefault(int(self._block_of[self._seen]), [])
        self._seen += 1
        pending.append(table)
        # Added up whenever they have doubled: memory for the sum and not for every slice, few sorts for each row.
        if sum(map(len, pending)) > 2 * len(pending[0]):
            pending[:] = [ContingencyTable.total(pending)]

    def tables(self) -> list[ContingencyTable]:
        """Return the table of each block that has one, in the order of the slices."""
        return [ContingencyTable.total(pending) for pending in self._pending.values()]


def resampled_intervals(
    per_slice: Sequence[ObjectScores], blocks: Sequence[ContingencyTable], options: EvaluateOptions
) -> Intervals:
    """Resample slices for the means over slices, and blocks of neighbouring slices for the scores of the volume.

    Parameters
    ----------
    per_slice : sequence of ObjectScores
        Scores of each slice.
    blocks : sequence of ContingencyTable
        Of the blocks of slices.
    options : EvaluateOptions
        How often, and by which rules tables are scored.
    """
    if not options.resamples or len(per_slice) < 2:
        return NO_INTERVALS
    names = [field.name for field in fields(ObjectScores)]
    values = np.array([[getattr(row, name) for name in names] for row in per_slice])
    ends = mean_intervals(values, options.resamples, options.seed)
    if len(blocks) < 2:
        volume: dict[str, Bounds] = {}
    else:
        volume = _drawn_objects(blocks, options) if options.as_2d else _without_each(blocks, options)
    return Intervals(
        resamples=options.resamples,
        seed=options.seed,
        slices=_named(names, ends),
        volume_method="bootstrap" if options.as_2d else "jackknife",
        volume_blocks=len(blocks),
        volume=volume,
    )


def _drawn_objects(blocks: Sequence[ContingencyTable], options: EvaluateOptions) -> dict[str, Bounds]:
    """Return intervals where labels hold for one slice only: a slice that is drawn twice brings its objects twice."""
    rows = sum(map(len, blocks))
    draws = min(options.resamples, max(_LEAST_DRAWS, min(_POOLED_RESAMPLES, _POOLED_ROWS // max(rows, 1))))
    found = [
        _scores(_repeated_objects(blocks, weights), options)
        for weights in bootstrap_weights(len(blocks), draws, options.seed)
    ]
    return _named(list(found[0]), percentile_interval(_matrix(found)))


def _without_each(blocks: Sequence[ContingencyTable], options: EvaluateOptions) -> dict[str, Bounds]:
    """Return intervals of a volume whose objects go on through the slices, by leaving each block out once."""
    weighted, everything = _Weighted(blocks), np.ones(len(blocks), np.int64)
    whole = _scores(weighted(blocks, everything), options)
    rows = [
        _scores(weighted(blocks, np.where(np.arange(len(blocks)) == left_out, 0, everything)), options)
        for left_out in range(len(blocks))
    ]
    ends = jackknife_interval(_matrix([whole])[0], _matrix(rows))
    least, most = np.zeros(len(whole)), np.array([np.inf if name in _UNBOUNDED else 1.0 for name in whole])
    return _named(list(whole), np.clip(ends, least, most))


def _scores(table: ContingencyTable, options: EvaluateOptions) -> dict[str, float]:
    """Score a volume by the rule of the options."""
    judged = table.without_unannotated() if options.sparse_truth else table
    return asdict(score_objects(judged)) | asdict(score_partition(judged))


def _matrix(rows: Sequence[dict[str, float]]) -> NDArray[np.float64]:
    """Return the values of rows of equal keys."""
    return np.array([list(row.values()) for row in rows])


class _Weighted:
    """Sums of tables with whole-number weights, without sorting anew for each."""

    def __init__(self, blocks: Sequence[ContingencyTable]) -> None:
        self._all = ContingencyTable.total(blocks)
        truth, segment = np.unique(self._all.truth), np.unique(self._all.segment)

        def keys(table: ContingencyTable) -> NDArray[np.int64]:
            """Return one number for each combination, which ascends as the rows of tables do."""
            rows = np.searchsorted(truth, table.truth).astype(np.int64)
            return rows * len(segment) + np.searchsorted(segment, table.segment)

        everything = keys(self._all)
        self._places = [np.searchsorted(everything, keys(block)) for block in blocks]

    def __call__(self, blocks: Sequence[ContingencyTable], weights: NDArray[np.int64]) -> ContingencyTable:
        """Return the table in which each block counts as often as its weight says."""
        voxels = np.zeros(len(self._all), np.int64)
        for block, places, weight in zip(blocks, self._places, weights.tolist(), strict=True):
            voxels[places] += weight * block.voxels
        kept = voxels > 0
        return ContingencyTable(self._all.truth[kept], self._all.segment[kept], voxels[kept])


def _repeated_objects(blocks: Sequence[ContingencyTable], weights: NDArray[np.int64]) -> ContingencyTable:
    """Return the table of blocks whose objects are others each time that a block is drawn."""
    parts: list[ContingencyTable] = []
    for block, weight in zip(blocks, weights.tolist(), strict=True):
        for copy in range(weight):
            # Labels of slices are multiples of 2**32 apart; there is room for copies above all of them.
            shift = copy * _DRAW_STRIDE * 2**24
            truth, segment = (np.where(ids > 0, ids + shift, 0) for ids in (block.truth, block.segment))
            parts.append(ContingencyTable(truth, segment, block.voxels))
    return ContingencyTable.total(parts)


def _named(names: Sequence[str], ends: NDArray[np.float64]) -> dict[str, Bounds]:
    """Return lower and upper end by name."""
    return {name: (low, high) for name, low, high in zip(names, *ends.tolist(), strict=True)}

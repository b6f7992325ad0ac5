"""What a comparison of prompt sources finds: plain records, and the document that ``compare --json`` writes."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from dendsam_deploy.metrics.bootstrap import bootstrap_weights, percentile_interval
from dendsam_deploy.metrics.summary import ObjectScores

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from dendsam_deploy.evaluate.box_error_curve import BoxErrorCurve
    from dendsam_deploy.evaluate.point_grid import GridCounts
    from dendsam_deploy.evaluate.score_report import ScoreReport, SliceScores

ERRORS = frozenset({"oce", "e_gs", "e_sg"})
"""Scores that are 0 when perfect. Their relative change is that of ``1 - error``."""

SOURCE_TITLES = {
    "truth_box": "ground-truth box",
    "truth_point": "ground-truth point",
    "truth_points": "ground-truth points",
    "detector_box": "detector box",
    "point_grid": "point grid",
}


@dataclass(frozen=True, slots=True)
class RelativeChange:
    """By how many per cent a score is better than the first bundle's, with the ends of its interval where there are."""

    percent: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True)
class ComparedBundle:
    """A bundle of a comparison: its name there, its folder, and what it ran on, for people."""

    name: str
    path: str
    description: str


@dataclass(frozen=True, slots=True)
class ComparisonRow:
    """One prompt source on one bundle.

    Parameters
    ----------
    bundle, prompts : str
        Names of the bundle and of the source.
    report : ScoreReport
        Scores of its label maps: means over slices, and of the objects of all slices together.
    seconds_per_slice : float
        What it took beside encoding, on this machine.
    relative : mapping
        Change of each score over slices against the first bundle's row of the same source; empty for that itself.
    grid : GridCounts or None
        How the masks of a grid were chosen, summed over slices.
    """

    bundle: str
    prompts: str
    report: ScoreReport
    seconds_per_slice: float
    relative: Mapping[str, RelativeChange]
    grid: GridCounts | None


@dataclass(frozen=True, slots=True, eq=False)
class ShownSlice:
    """A part of one slice to look at.

    Parameters
    ----------
    z : int
        The slice.
    image : ndarray, shape (Y, X), uint8
        The micrograph.
    truth : ndarray, shape (Y, X), uint32
        What is judged.
    labels : mapping
        (bundle, source) -> labels (Y, X) uint32.
    """

    z: int
    image: NDArray[np.uint8]
    truth: NDArray[np.uint32]
    labels: Mapping[tuple[str, str], NDArray[np.uint32]]


@dataclass(frozen=True, slots=True)
class Comparison:
    """The whole comparison.

    Parameters
    ----------
    volume, truth : str
        What was segmented, and what it was judged against.
    slices : tuple of int
        The slices.
    options : mapping
        How, as JSON values.
    least_px : float
        Pieces of the truth of fewer px were not judged.
    bundles : tuple of ComparedBundle
        In their order.
    rows : tuple of ComparisonRow
        By bundle, then by source.
    curves : tuple of BoxErrorCurve
        One for each bundle, where they were asked for.
    notes : tuple of str
        Rows that could not be filled, and why.
    shown : ShownSlice or None
        Something to look at.
    """

    volume: str
    truth: str
    slices: tuple[int, ...]
    options: Mapping[str, Any]
    least_px: float
    bundles: tuple[ComparedBundle, ...]
    rows: tuple[ComparisonRow, ...]
    curves: tuple[BoxErrorCurve, ...]
    notes: tuple[str, ...]
    shown: ShownSlice | None = None

    def to_document(self) -> dict[str, Any]:
        """Return the comparison as JSON values: the content of ``compare --json``."""
        return {
            "volume": self.volume,
            "truth": self.truth,
            "slices": list(self.slices),
            "options": dict(self.options),
            "least_area_px": self.least_px,
            "bundles": [asdict(bundle) for bundle in self.bundles],
            "rows": [_row_document(row) for row in self.rows],
            "curves": [curve.to_document() for curve in self.curves],
            "notes": list(self.notes),
        }


def _row_document(row: ComparisonRow) -> dict[str, Any]:
    """Return one row as JSON values: the means over slices at its top, and what `evaluate` writes below."""
    document = row.report.to_document()
    kept = ("volume", "slices", "intervals", "size_classes", "per_slice", "unscored_slices", "segments_left_out")
    return {
        "bundle": row.bundle,
        "prompts": row.prompts,
        **asdict(row.report.slices),
        **{name: document[name] for name in kept},
        "relative_percent": {name: asdict(change) for name, change in row.relative.items()},
        "seconds_per_slice": row.seconds_per_slice,
        "grid": None if row.grid is None else asdict(row.grid),
    }


def relative_changes(
    rows: Sequence[SliceScores], first: Sequence[SliceScores], resamples: int, seed: int
) -> dict[str, RelativeChange]:
    """Return by how many per cent scores over slices are better than those of another bundle on the same slices.

    The change is ``100 (s / s_first - 1)`` of scores of which more is better, so that +19.1 means 1.191 times the first
    bundle's score, as in the paper; an error can only shrink by 100 %, so that figures such as +150.1 % are gains of
    that kind. Of an error ``e`` the score is ``1 - e``. Both bundles are resampled on the same slices.

    Parameters
    ----------
    rows, first : sequence of SliceScores
        Of the same slices.
    resamples, seed : int
        Draws of slices behind the intervals; 0 for none.
    """
    names = [field.name for field in fields(ObjectScores)]
    mine, others = (_goodness(side, names) for side in (rows, first))
    weights = bootstrap_weights(len(mine), resamples, seed) if resamples and len(mine) > 1 else None
    changes = {}
    for column, name in enumerate(names):
        ours, base = mine[:, column], others[:, column]
        percent = _percent(ours.mean(), base.mean())
        low = high = None
        if weights is not None and percent is not None and (weights @ base > 0).all():
            ends = percentile_interval(100 * (weights @ ours / (weights @ base) - 1))
            low, high = float(ends[0]), float(ends[1])
        changes[name] = RelativeChange(percent, low, high)
    return changes


def _goodness(rows: Sequence[SliceScores], names: Sequence[str]) -> NDArray[np.float64]:
    """Return the scores of slices, shape (Z, M), errors turned round so that more is better."""
    values = np.array([[getattr(row.scores, name) for name in names] for row in rows])
    is_error = np.array([name in ERRORS for name in names])
    return np.where(is_error, 1 - values, values)


def _percent(value: float, base: float) -> float | None:
    """Return the relative change; None from nothing."""
    return float(100 * (value / base - 1)) if base > 0 else None

"""One bundle of a comparison: every prompt source on every slice, scored as they come."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from dendsam_deploy.errors import MissingCapabilityError, VolumeError
from dendsam_deploy.evaluate.box_error_curve import (
    CURVE_SCORE,
    JITTERS,
    BoxErrorCurve,
    curve_points,
    detector_error,
    jittered_boxes,
    measure_boxes,
)
from dendsam_deploy.evaluate.comparison_report import ComparedBundle, ComparisonRow, ShownSlice, relative_changes
from dendsam_deploy.evaluate.grid_choice import best_grid
from dendsam_deploy.evaluate.point_grid import GridCounts
from dendsam_deploy.evaluate.prompt_sources import NEEDS, SOURCES, Bench
from dendsam_deploy.evaluate.score_report import EvaluateOptions
from dendsam_deploy.evaluate.scores import ScoreTally
from dendsam_deploy.geometry import Window
from dendsam_deploy.metrics.contingency import ContingencyTable
from dendsam_deploy.metrics.summary import ObjectScores, score_objects
from dendsam_deploy.pipeline.segment import make_recipe
from dendsam_deploy.runtimes.session import Session, open_session

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    from dendsam_deploy.bundle.bundle import Bundle
    from dendsam_deploy.evaluate.box_error_curve import BoxErrors
    from dendsam_deploy.evaluate.labelled_slices import CompareOptions, LabelledStack
    from dendsam_deploy.evaluate.prompt_sources import TrueSlice
    from dendsam_deploy.evaluate.score_report import ScoreReport

_SHOWN_PX = 640
"""Side of what is shown of a slice."""


class BundleRun:
    """One bundle on all slices.

    Parameters
    ----------
    bundle : Bundle
        The bundle.
    name : str
        What it is called in the comparison.
    slices : LabelledStack
        What it works on.
    """

    def __init__(self, bundle: Bundle, name: str, slices: LabelledStack) -> None:
        self.name, self.slices, options = name, slices, slices.options
        has_points = bundle.manifest.graph("points", "fp32") is not None
        self.session = open_session(bundle, replace(options.session, with_points=has_points))
        self.described = ComparedBundle(name, str(bundle.path), self.session.description)
        _, height, width = slices.raw.info.shape_zyx
        self._recipe = make_recipe((height, width), self.session.manifest, options.slice_options)
        self.sources, self.notes = _served(self.session, name, options)
        judged = EvaluateOptions(
            sparse_truth=options.sparse_truth, as_2d=True, resamples=options.resamples, seed=options.seed
        )
        self._tallies = {source: ScoreTally(range(len(slices.chosen)), judged) for source in self.sources}
        self._seconds: dict[str, float] = dict.fromkeys(self.sources, 0.0)
        self._grids: list[GridCounts] = []
        self._box_errors: list[BoxErrors] = []
        self._jittered: list[list[list[ObjectScores]]] = []
        self._prompting = options.prompting
        self.blank: list[int] = []
        self.shown: ShownSlice | None = None

    def choose_grid(self, truths: Iterable[TrueSlice]) -> None:
        """Choose what the options leave open of the thresholds of the grid, on slices that are not judged."""
        if "point_grid" not in self.sources:
            return
        benches = (Bench.of_slice(self.session, self._recipe, truth) for truth in truths)
        options = self.slices.options
        grid = best_grid(benches, options.prompting.grid, (options.grid_iou, options.grid_stability), self._score)
        self._prompting = replace(options.prompting, grid=grid)

    def add(self, truth: TrueSlice) -> None:
        """Segment and score the next slice."""
        options = self.slices.options
        bench = Bench.of_slice(self.session, self._recipe, truth)
        painted: dict[str, NDArray[np.uint32]] = {}
        is_scored = True
        for source in self.sources:
            result = SOURCES[source](bench, self._prompting)
            painted[source] = result.labels
            is_scored = self._tallies[source].add(truth.z, self._table(truth, result.labels)) and is_scored
            self._seconds[source] += result.seconds
            if result.grid is not None:
                self._grids.append(result.grid)
            if result.detections is not None:
                found = measure_boxes(result.detections, truth, sparse_truth=options.sparse_truth)
                self._box_errors.append(found)
        if options.curve_repeats and is_scored:  # the curve is of the slices of the table
            self._jittered.append(self._curve_of(bench))
        if not truth.boxes_xyxy:
            self.blank.append(truth.z)
        if truth.z == self.slices.chosen[len(self.slices.chosen) // 2]:
            self.shown = _cut(truth, {(self.name, source): labels for source, labels in painted.items()})

    def reports(self) -> dict[str, ScoreReport]:
        """Return the scores of each source."""
        found = {}
        for source, tally in self._tallies.items():
            if not tally.per_slice:
                raise VolumeError(
                    f"{self.slices.labels.info.source}: nothing in the chosen slices is labelled; choose other slices"
                )
            report = tally.report(source, self.slices.labels.info.source)
            found[source] = replace(report, voxel_size_nm=self.slices.options.voxel_size_nm)
        return found

    def rows(self, own: dict[str, ScoreReport], first: dict[str, ScoreReport]) -> list[ComparisonRow]:
        """Return the rows of the table; changes are those against the first bundle."""
        options = self.slices.options
        return [
            ComparisonRow(
                bundle=self.name,
                prompts=source,
                report=report,
                seconds_per_slice=self._seconds[source] / len(self.slices.chosen),
                relative={}
                if own is first or source not in first
                else relative_changes(report.per_slice, first[source].per_slice, options.resamples, options.seed),
                grid=_summed(self._grids) if source == "point_grid" else None,
            )
            for source, report in own.items()
        ]

    def curve(self, own: dict[str, ScoreReport]) -> BoxErrorCurve:
        """Return quality against box error, and where the detector lies."""
        options, report = self.slices.options, own.get("detector_box")
        return BoxErrorCurve(
            bundle=self.name,
            repeats=options.curve_repeats,
            points=curve_points(self._jittered, options.resamples, options.seed),
            detector=None if report is None else detector_error(self._box_errors),
            detector_score=None if report is None else getattr(report.slices, CURVE_SCORE),
        )

    def _table(self, truth: TrueSlice, labels: NDArray[np.uint32]) -> ContingencyTable:
        """Lay labels over the truth; what is not judged is left out."""
        return ContingencyTable.from_labels(truth.components, labels).without_truth(truth.void)

    def _score(self, truth: TrueSlice, labels: NDArray[np.uint32]) -> ObjectScores:
        """Score the labels of one slice."""
        table = self._table(truth, labels)
        return score_objects(table.without_unannotated() if self.slices.options.sparse_truth else table)

    def _curve_of(self, bench: Bench) -> list[list[ObjectScores]]:
        """Score jittered boxes of a slice: all repetitions, by level."""
        options = self.slices.options
        scores: list[list[ObjectScores]] = [[] for _ in JITTERS]
        for level, boxes in jittered_boxes(bench.truth, options.seed, options.curve_repeats):
            scores[level].append(self._score(bench.truth, bench.paint_boxes(boxes)))
        return scores


def _served(session: Session, name: str, options: CompareOptions) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the sources that a bundle can serve, and a note on each that it cannot.

    Raises
    ------
    MissingCapabilityError
        Where it lacks a source that was asked for by name.
    """
    served, notes = [], []
    for source in options.sources or tuple(SOURCES):
        need = NEEDS.get(source)
        if need is None or getattr(session, need) is not None:
            served.append(source)
            continue
        lacks = "no detector" if need == "detector" else "no decoder for points, which older versions did not export"
        sentence = f"{name}: the bundle has {lacks}, so there is no row {source}; export it again"
        if options.sources:
            raise MissingCapabilityError(sentence)
        notes.append(sentence)
    return tuple(served), tuple(notes)


def _summed(counts: Sequence[GridCounts]) -> GridCounts:
    """Add up what was counted in each slice."""
    return GridCounts(
        points=sum(each.points for each in counts),
        masks=sum(each.masks for each in counts),
        confident=sum(each.confident for each in counts),
        stable=sum(each.stable for each in counts),
        distinct=sum(each.distinct for each in counts),
        highest_iou=max(each.highest_iou for each in counts),
        predicted_iou=counts[0].predicted_iou,
        stability=counts[0].stability,
    )


def _cut(truth: TrueSlice, labels: dict[tuple[str, str], NDArray[np.uint32]]) -> ShownSlice:
    """Cut the middle out of a slice, to be looked at."""
    height, width = truth.image.shape
    side = _SHOWN_PX
    window = Window((height - side) // 2, (width - side) // 2, side, side).clipped((height, width))
    judged = np.where(np.isin(truth.components, list(truth.void)), 0, truth.components).astype(np.uint32)
    return ShownSlice(
        truth.z,
        truth.image[window.slices].copy(),
        judged[window.slices].copy(),
        {key: painted[window.slices].copy() for key, painted in labels.items()},
    )

"""Score a label volume against the truth: per slice, per object, by size, along skeletons, and as a volume."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np

from dendsam_deploy.errors import InvalidArgumentError, VolumeError
from dendsam_deploy.evaluate.score_intervals import VolumeBlocks, resampled_intervals
from dendsam_deploy.evaluate.score_report import (
    AccuracyCurve,
    EvaluateOptions,
    ObjectRow,
    ScoreReport,
    SizeClasses,
    SliceScores,
    VolumeScores,
)
from dendsam_deploy.evaluate.segmentation import find_segmentation
from dendsam_deploy.evaluate.walked_skeletons import SkeletonWalk
from dendsam_deploy.metrics.contingency import ContingencyTable
from dendsam_deploy.metrics.overlaps import ObjectOverlaps
from dendsam_deploy.metrics.size_classes import ACCURACY_THRESHOLDS, ObjectMatches, score_size_classes, tercile_limits
from dendsam_deploy.metrics.summary import ObjectScores, score_objects, score_partition
from dendsam_deploy.pipeline.journal import RUN_FILE
from dendsam_deploy.progress import Progress, ProgressCallback, no_progress
from dendsam_deploy.volume.open import open_labels

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dendsam_deploy.volume.volume import VolumeInfo, VolumeReader

_SLICE_STRIDE = 2**32
"""Offset between the labels of two slices when each slice has objects of its own; larger than any label on disk."""


def evaluate_labels(
    labels_path: Path | str,
    truth_path: Path | str,
    options: EvaluateOptions | None = None,
    progress: ProgressCallback = no_progress,
) -> ScoreReport:
    """Score a label volume on disk against the truth on disk.

    Parameters
    ----------
    labels_path : Path or str
        The segmentation: a label volume, or the folder that `segment` wrote.
    truth_path : Path or str
        The truth, of the same shape, or longer in z where `options.first_slice` or the run's record says which part.
    options : EvaluateOptions or None
        None stands for the defaults.
    progress : callable
        Told after each slice.

    Raises
    ------
    VolumeError
        A file cannot be read as labels, the shapes differ, or nothing can be compared.
    InputFileError
        Skeletons cannot be read, or lie elsewhere.
    InvalidArgumentError
        The slices asked for are not in the volume.
    """
    options = options or EvaluateOptions()
    if (Path(truth_path) / RUN_FILE).is_file():
        raise InvalidArgumentError(f"{truth_path}: the result of a run, expected the truth; are the two swapped?")
    found = find_segmentation(Path(labels_path))
    if options.first_slice is None and found.first_slice is not None:
        options = replace(options, first_slice=found.first_slice)
    with open_labels(found.path) as labels, open_labels(truth_path) as truth:
        return score_volumes(labels, truth, options, progress)


def score_volumes(
    labels: VolumeReader, truth: VolumeReader, options: EvaluateOptions, progress: ProgressCallback = no_progress
) -> ScoreReport:
    """Score a label volume against the truth, both open for reading; see `evaluate_labels`.

    Two slices are in memory at a time, and the sparse tables of what was read so far.
    """
    chosen = _chosen_slices(labels.info, truth.info, options)
    voxel_size = options.voxel_size_nm or truth.info.voxel_size_nm or labels.info.voxel_size_nm
    walk = (
        None if options.skeletons is None else SkeletonWalk.begin(options.skeletons, voxel_size, truth.info.shape_zyx)
    )
    first, tally = options.first_slice or 0, ScoreTally(chosen, options)
    for done, z in enumerate(chosen, start=1):
        wanted = cast("NDArray[np.uint32]", truth.read(z))
        found = cast("NDArray[np.uint32]", labels.read(z - first))
        if walk is not None:
            walk.visit(z, found)
        tally.add(z, ContingencyTable.from_labels(wanted, found).without_truth(options.ignore_labels))
        progress(Progress("evaluate", done, len(chosen)))
    if not tally.per_slice:
        what = "is labelled" if options.sparse_truth else "counts, all of it is in ignore_labels"
        raise VolumeError(f"{truth.info.source}: nothing in its slices {_named(chosen)} {what}; choose other slices")
    progress(Progress("intervals", 0, 1))
    report = tally.report(labels.info.source, truth.info.source)
    progress(Progress("intervals", 1, 1))
    return replace(report, skeletons=None if walk is None else walk.scores(), voxel_size_nm=voxel_size)


class ScoreTally:
    """What is remembered of the slices that were read; slices come in order.

    Parameters
    ----------
    chosen : range
        The slices that will come.
    options : EvaluateOptions
        How they are compared.
    """

    def __init__(self, chosen: range, options: EvaluateOptions) -> None:
        self.per_slice: list[SliceScores] = []
        self._options = options
        self._unscored: list[int] = []
        self._blocks = VolumeBlocks(len(chosen))
        self._profiles: list[ObjectMatches] = []
        self._largest: dict[int, tuple[int, int]] = {}

    def add(self, z: int, table: ContingencyTable) -> bool:
        """Score the next slice; tell whether there was anything to score.

        Parameters
        ----------
        z : int
            The slice.
        table : ContingencyTable
            Of its truth and its labels, without what is not judged.
        """
        options = self._options
        judged = table.without_unannotated() if options.sparse_truth else table
        if not len(judged) or (options.sparse_truth and not judged.truth.any()):
            self._unscored.append(z)
            self._blocks.skip()
            return False
        overlaps = ObjectOverlaps.from_table(judged)
        counts = len(overlaps.truth_ids), len(overlaps.segment_ids)
        self.per_slice.append(SliceScores(z, *counts, score_objects(judged)))
        self._profiles.append(ObjectMatches.from_overlaps(overlaps))
        self._blocks.add(_labels_of_own_slice(table, z) if options.as_2d else table)
        for truth_id, area in zip(overlaps.truth_ids.tolist(), overlaps.truth_voxels.tolist(), strict=True):
            if area > self._largest.get(truth_id, (0, 0))[0]:
                self._largest[truth_id] = area, z
        return True

    def report(self, labels: str, truth: str) -> ScoreReport:
        """Put everything together; at least one slice was scored."""
        options, blocks = self._options, self._blocks.tables()
        profiles = ObjectMatches.pooled(self._profiles)
        everything = ContingencyTable.total(blocks)
        total = everything.without_unannotated() if options.sparse_truth else everything
        overlaps = ObjectOverlaps.from_table(total)
        objects = profiles if options.as_2d else ObjectMatches.from_overlaps(overlaps)
        counts = len(overlaps.truth_ids), len(overlaps.segment_ids)
        return ScoreReport(
            labels=labels,
            truth=truth,
            options=options,
            volume=VolumeScores(*counts, score_objects(total), score_partition(total)),
            slices=mean_scores([row.scores for row in self.per_slice]),
            per_slice=tuple(self.per_slice),
            per_object=tuple(self._object_rows(overlaps)),
            unscored_slices=tuple(self._unscored),
            segments_left_out=len(np.setdiff1d(everything.segment, total.segment)),
            intervals=resampled_intervals([row.scores for row in self.per_slice], blocks, options),
            size_classes=SizeClasses(
                score_size_classes(
                    profiles,
                    options.size_limits_px or tercile_limits(profiles.truth_sizes),
                    self._profiles,
                    options.resamples,
                    options.seed,
                ),
                () if options.as_2d else score_size_classes(objects, tercile_limits(objects.truth_sizes)),
            ),
            accuracy=AccuracyCurve(
                ACCURACY_THRESHOLDS,
                tuple(np.mean([each.accuracy() for each in self._profiles], axis=0).tolist()),
                tuple(objects.accuracy().tolist()),
            ),
        )

    def _object_rows(self, overlaps: ObjectOverlaps) -> list[ObjectRow]:
        """List the objects of the truth with their best segments."""
        segment_ids, iou = overlaps.best_segments()
        columns = (overlaps.truth_ids, overlaps.truth_voxels, segment_ids, iou)
        rows = []
        for truth_id, voxels, segment_id, best in zip(*(column.tolist() for column in columns), strict=True):
            z, own_id = divmod(truth_id, _SLICE_STRIDE) if self._options.as_2d else (None, truth_id)
            shown_z = self._largest[own_id][1] if z is None else z
            rows.append(ObjectRow(z, own_id, voxels, segment_id % _SLICE_STRIDE or None, best, shown_z))
        return rows


def _chosen_slices(labels: VolumeInfo, truth: VolumeInfo, options: EvaluateOptions) -> range:
    """Return the slices to score, or say why the volumes cannot be compared."""
    depth, *plane = labels.shape_zyx
    first = options.first_slice or 0
    fits = first + depth <= truth.shape_zyx[0] if options.first_slice is not None else depth == truth.shape_zyx[0]
    if plane != list(truth.shape_zyx[1:]) or not fits:
        found = " x ".join(map(str, labels.shape_zyx))
        expected = " x ".join(map(str, truth.shape_zyx))
        beginning = f" from slice {first} on" if first else ""
        raise VolumeError(
            f"{labels.source}: {found} voxels (z, y, x){beginning}, but {truth.source} has {expected}; "
            "crop or resample one of them so that both show the same voxels"
        )
    covered = range(first, first + depth)
    chosen = covered if options.slices is None else options.slices
    if chosen and not (chosen[0] in covered and chosen[-1] in covered):
        raise InvalidArgumentError(
            f"slices {_named(chosen)} asked for, but {labels.source} shows slices {_named(covered)}"
        )
    return chosen


def _named(slices: range) -> str:
    """Name a range of slices by its first and last one."""
    return f"{slices[0]} to {slices[-1]}" if slices else "(none)"


def _labels_of_own_slice(table: ContingencyTable, z: int) -> ContingencyTable:
    """Make the labels of a slice differ from those of all other slices; background stays 0."""
    truth, segment = (np.where(ids > 0, ids + z * _SLICE_STRIDE, 0) for ids in (table.truth, table.segment))
    return ContingencyTable(truth, segment, table.voxels)


def mean_scores(scores: list[ObjectScores]) -> ObjectScores:
    """Average each score over slices, every slice with the same weight."""
    return ObjectScores(
        **{field.name: float(np.mean([getattr(row, field.name) for row in scores])) for field in fields(ObjectScores)}
    )

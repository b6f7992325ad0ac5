"""Score a label volume against the truth: per slice, per object, and as a volume."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np

from dendsam_deploy.errors import InvalidArgumentError, VolumeError
from dendsam_deploy.evaluate.segmentation import find_segmentation
from dendsam_deploy.metrics.contingency import ContingencyTable
from dendsam_deploy.metrics.overlaps import ObjectOverlaps
from dendsam_deploy.metrics.summary import ObjectScores, PartitionScores, score_objects, score_partition
from dendsam_deploy.pipeline.journal import RUN_FILE
from dendsam_deploy.progress import Progress, ProgressCallback, no_progress
from dendsam_deploy.volume.open import open_labels

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dendsam_deploy.volume.volume import VolumeInfo, VolumeReader

_SLICE_STRIDE = 2**32
"""Offset between the labels of two slices when each slice has objects of its own; larger than any label on disk."""


@dataclass(frozen=True, slots=True)
class EvaluateOptions:
    """What is compared, and how strictly.

    Parameters
    ----------
    slices : range or None
        Slices of the truth to score, such as those that training did not see; None scores all that the labels cover.
    ignore_labels : tuple of int
        Labels of the truth that mean "not judged", such as membrane: their voxels are removed from both volumes. Truth
        of label 0 is background, and judged, unless 0 is listed here.
    sparse_truth : bool
        The truth shows only some of the objects: segments that touch none of them are left out, and so are slices
        without any of them, from the scores of the volume too.
    as_2d : bool
        Labels hold for one slice only, in both volumes: the scores of the volume are then those of the 2-D objects of
        all slices together, whose background stays one segment to VI and adapted Rand.
    first_slice : int or None
        Slice of the truth that the first slice of the labels shows; None takes what the run's record says, and needs
        volumes of equal depth where there is none.
    """

    slices: range | None = None
    ignore_labels: tuple[int, ...] = ()
    sparse_truth: bool = False
    as_2d: bool = False
    first_slice: int | None = None

    def __post_init__(self) -> None:
        if self.first_slice is not None and self.first_slice < 0:
            raise InvalidArgumentError(f"the first slice is {self.first_slice}, expected 0 or more")
        if self.slices is not None and (not self.slices or self.slices.step < 1 or self.slices.start < 0):
            raise InvalidArgumentError(f"{self.slices} names no slices; give start < stop, counted from 0")


@dataclass(frozen=True, slots=True)
class SliceScores:
    """One slice: its number of objects on either side, and the scores of its 2-D objects."""

    z: int
    truth_objects: int
    segments: int
    scores: ObjectScores


@dataclass(frozen=True, slots=True)
class VolumeScores:
    """All slices as one volume, in which an object extends over slices."""

    truth_objects: int
    segments: int
    objects: ObjectScores
    partition: PartitionScores


@dataclass(frozen=True, slots=True)
class ObjectRow:
    """One object of the truth.

    Parameters
    ----------
    z : int or None
        Its slice where labels hold for one slice only, otherwise None.
    truth_id : int
        Its label.
    voxels : int
        Its size.
    segment_id : int or None
        The segment with which it has the largest IoU; None where it meets no segment.
    iou : float
        That IoU; 0 where it meets no segment.
    """

    z: int | None
    truth_id: int
    voxels: int
    segment_id: int | None
    iou: float


@dataclass(frozen=True, slots=True)
class ScoreReport:
    """Scores of a label volume.

    Parameters
    ----------
    labels, truth : str
        What was compared.
    options : EvaluateOptions
        How it was compared.
    volume : VolumeScores
        Scores of the volume.
    slices : ObjectScores
        Mean of each score over `per_slice`.
    per_slice : tuple of SliceScores
        Ascending in z.
    per_object : tuple of ObjectRow
        The objects of the truth, ascending by slice and label.
    unscored_slices : tuple of int
        Slices that nothing could be said about: wholly void or, with a sparse truth, without an annotated object.
    """

    labels: str
    truth: str
    options: EvaluateOptions
    volume: VolumeScores
    slices: ObjectScores
    per_slice: tuple[SliceScores, ...]
    per_object: tuple[ObjectRow, ...]
    unscored_slices: tuple[int, ...]

    def to_document(self) -> dict[str, object]:
        """Return the report as plain dictionaries, lists, numbers and strings: the content of ``evaluate --json``."""
        options, slices = asdict(self.options), self.options.slices
        volume = self.volume
        return {
            "labels": self.labels,
            "truth": self.truth,
            "options": options | {"slices": None if slices is None else [slices.start, slices.stop, slices.step]},
            "volume": {
                **asdict(volume.objects),
                **asdict(volume.partition),
                "truth_objects": volume.truth_objects,
                "segments": volume.segments,
            },
            "slices": asdict(self.slices),
            "per_slice": [
                {"z": row.z, **asdict(row.scores), "truth_objects": row.truth_objects, "segments": row.segments}
                for row in self.per_slice
            ],
            "per_object": [asdict(row) for row in self.per_object],
            "unscored_slices": list(self.unscored_slices),
        }

    def to_json(self) -> str:
        """Return the report as indented JSON."""
        return json.dumps(self.to_document(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


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
    first = options.first_slice or 0
    per_slice: list[SliceScores] = []
    unscored: list[int] = []
    pending: list[ContingencyTable] = []
    for done, z in enumerate(chosen, start=1):
        table = ContingencyTable.from_labels(
            cast("NDArray[np.uint32]", truth.read(z)), cast("NDArray[np.uint32]", labels.read(z - first))
        ).without_truth(options.ignore_labels)
        judged = table.without_unannotated() if options.sparse_truth else table
        if len(judged) and (judged.truth.any() or not options.sparse_truth):
            per_slice.append(_score_slice(z, judged))
            pending.append(_labels_of_own_slice(table, z) if options.as_2d else table)
        else:
            unscored.append(z)
        # Added up whenever they have doubled: memory for the sum and not for every slice, few sorts for each row.
        if pending and sum(map(len, pending)) > 2 * len(pending[0]):
            pending = [ContingencyTable.total(pending)]
        progress(Progress("evaluate", done, len(chosen)))
    if not per_slice:
        what = "is labelled" if options.sparse_truth else "counts, all of it is in ignore_labels"
        raise VolumeError(f"{truth.info.source}: nothing in its slices {_named(chosen)} {what}; choose other slices")
    total = ContingencyTable.total(pending)
    total = total.without_unannotated() if options.sparse_truth else total
    overlaps = ObjectOverlaps.from_table(total)
    return ScoreReport(
        labels=labels.info.source,
        truth=truth.info.source,
        options=options,
        volume=VolumeScores(
            len(overlaps.truth_ids), len(overlaps.segment_ids), score_objects(total), score_partition(total)
        ),
        slices=_mean([row.scores for row in per_slice]),
        per_slice=tuple(per_slice),
        per_object=_object_rows(overlaps, options.as_2d),
        unscored_slices=tuple(unscored),
    )


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


def _score_slice(z: int, table: ContingencyTable) -> SliceScores:
    """Score the 2-D objects of a slice, labels as they appear there."""
    truth_objects, segments = (len(np.unique(ids[ids > 0])) for ids in (table.truth, table.segment))
    return SliceScores(z, truth_objects, segments, score_objects(table))


def _mean(scores: list[ObjectScores]) -> ObjectScores:
    """Average each score over slices, every slice with the same weight."""
    return ObjectScores(
        **{field.name: float(np.mean([getattr(row, field.name) for row in scores])) for field in fields(ObjectScores)}
    )


def _object_rows(overlaps: ObjectOverlaps, as_2d: bool) -> tuple[ObjectRow, ...]:
    """List the objects of the truth with their best segments."""
    segment_ids, iou = overlaps.best_segments()
    columns = (overlaps.truth_ids, overlaps.truth_voxels, segment_ids, iou)
    return tuple(
        ObjectRow(
            z=truth_id // _SLICE_STRIDE if as_2d else None,
            truth_id=truth_id % _SLICE_STRIDE,
            voxels=voxels,
            segment_id=segment_id % _SLICE_STRIDE or None,
            iou=best,
        )
        for truth_id, voxels, segment_id, best in zip(*(column.tolist() for column in columns), strict=True)
    )

"""What an evaluation is asked for and what it finds: records, and the document that ``evaluate --json`` writes."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from dendsam_deploy.errors import InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from dendsam_deploy.metrics.run_length import RunLength
    from dendsam_deploy.metrics.size_classes import SizeClass
    from dendsam_deploy.metrics.summary import ObjectScores, PartitionScores

Bounds = tuple[float, float]
"""Lower and upper end of an interval."""


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
    resamples : int
        Draws of slices behind each confidence interval; 0 leaves intervals out.
    seed : int
        Decides about the draws.
    size_limits_px : tuple of int
        Ascending areas, px, at which a new class of 2-D objects begins; empty takes the terciles of the truth's.
    skeletons : Path or None
        SWC file or folder of SWC files, micrometres from the truth's corner, for the expected run length.
    voxel_size_nm : (float, float, float) or None
        Voxel size ``(z, y, x)``, in place of what the files record.
    """

    slices: range | None = None
    ignore_labels: tuple[int, ...] = ()
    sparse_truth: bool = False
    as_2d: bool = False
    first_slice: int | None = None
    resamples: int = 1000
    seed: int = 0
    size_limits_px: tuple[int, ...] = ()
    skeletons: Path | None = None
    voxel_size_nm: tuple[float, float, float] | None = None

    def __post_init__(self) -> None:
        if self.first_slice is not None and self.first_slice < 0:
            raise InvalidArgumentError(f"the first slice is {self.first_slice}, expected 0 or more")
        if self.slices is not None and (not self.slices or self.slices.step < 1 or self.slices.start < 0):
            raise InvalidArgumentError(f"{self.slices} names no slices; give start < stop, counted from 0")
        if self.resamples < 0 or self.seed < 0:
            raise InvalidArgumentError(f"resamples {self.resamples} and seed {self.seed}: expected 0 or more")
        limits = self.size_limits_px
        if any(low >= high for low, high in zip((0, *limits), limits, strict=False)):
            raise InvalidArgumentError(
                f"size limits {limits} do not ascend from 1 px on; give, for example, 200 and 2000"
            )


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
    shown_z : int
        The slice in which it is largest.
    """

    z: int | None
    truth_id: int
    voxels: int
    segment_id: int | None
    iou: float
    shown_z: int = 0


@dataclass(frozen=True, slots=True)
class Intervals:
    """95 % intervals of the scores; see `metrics.bootstrap`.

    Parameters
    ----------
    resamples, seed : int
        Draws behind the intervals of `slices`.
    slices : mapping
        Of the means over slices, by score.
    volume_method : str
        How the intervals of `volume` were made: ``jackknife``, by leaving out each block of neighbouring slices once,
        or ``bootstrap``, by drawing blocks, where labels hold for one slice only.
    volume_blocks : int
        Number of blocks.
    volume : mapping
        Of the scores of the volume.
    """

    resamples: int
    seed: int
    slices: Mapping[str, Bounds]
    volume_method: str
    volume_blocks: int
    volume: Mapping[str, Bounds]


NO_INTERVALS = Intervals(0, 0, MappingProxyType({}), "", 0, MappingProxyType({}))
"""Where none were asked for, or one slice says nothing about others."""


@dataclass(frozen=True, slots=True)
class SizeClasses:
    """Scores by size: of the 2-D objects of all slices, and of the objects of the volume."""

    slices: tuple[SizeClass, ...]
    volume: tuple[SizeClass, ...]


@dataclass(frozen=True, slots=True)
class AccuracyCurve:
    """S(t) = TP / (TP + FP + FN) at every IoU threshold t: means over slices, and of the objects of the volume."""

    thresholds: tuple[float, ...]
    slices: tuple[float, ...]
    volume: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class SkeletonScores:
    """Expected run length, in micrometres, and how many skeletons and nodes lie in the slices that were scored."""

    run_length: RunLength
    skeletons: int
    nodes: int
    nodes_outside: int


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
    segments_left_out : int
        Segments that touch no object of a sparse truth.
    intervals : Intervals
        How sure the scores are.
    size_classes : SizeClasses
        Scores by size.
    accuracy : AccuracyCurve
        Scores by how much overlap is asked for.
    skeletons : SkeletonScores or None
        Expected run length, where skeletons were given.
    voxel_size_nm : (float, float, float) or None
        Voxel size ``(z, y, x)``, where it is known.
    """

    labels: str
    truth: str
    options: EvaluateOptions
    volume: VolumeScores
    slices: ObjectScores
    per_slice: tuple[SliceScores, ...]
    per_object: tuple[ObjectRow, ...]
    unscored_slices: tuple[int, ...]
    segments_left_out: int = 0
    intervals: Intervals = NO_INTERVALS
    size_classes: SizeClasses = field(default_factory=lambda: SizeClasses((), ()))
    accuracy: AccuracyCurve = field(default_factory=lambda: AccuracyCurve((), (), ()))
    skeletons: SkeletonScores | None = None
    voxel_size_nm: tuple[float, float, float] | None = None

    def to_document(self) -> dict[str, object]:
        """Return the report as plain dictionaries, lists, numbers and strings: the content of ``evaluate --json``."""
        volume = self.volume
        return {
            "labels": self.labels,
            "truth": self.truth,
            "options": _options_document(self.options),
            "voxel_size_nm": None if self.voxel_size_nm is None else list(self.voxel_size_nm),
            "volume": {
                **asdict(volume.objects),
                **asdict(volume.partition),
                **({} if self.skeletons is None else skeleton_document(self.skeletons)),
                "truth_objects": volume.truth_objects,
                "segments": volume.segments,
            },
            "slices": asdict(self.slices),
            "intervals": intervals_document(self.intervals),
            "accuracy": {name: list(values) for name, values in asdict(self.accuracy).items()},
            "size_classes": {
                "slices": [size_class_document(row, self.voxel_size_nm, 2) for row in self.size_classes.slices],
                "volume": [size_class_document(row, self.voxel_size_nm, 3) for row in self.size_classes.volume],
            },
            "per_slice": [
                {"z": row.z, **asdict(row.scores), "truth_objects": row.truth_objects, "segments": row.segments}
                for row in self.per_slice
            ],
            "per_object": [asdict(row) for row in self.per_object],
            "unscored_slices": list(self.unscored_slices),
            "segments_left_out": self.segments_left_out,
        }

    def to_json(self) -> str:
        """Return the report as indented JSON."""
        return json.dumps(self.to_document(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _options_document(options: EvaluateOptions) -> dict[str, Any]:
    """Return options as JSON values."""
    slices, skeletons = options.slices, options.skeletons
    return asdict(options) | {
        "slices": None if slices is None else [slices.start, slices.stop, slices.step],
        "skeletons": None if skeletons is None else str(skeletons),
    }


def intervals_document(intervals: Intervals) -> dict[str, Any]:
    """Return intervals as JSON values; empty where there are none."""
    slices, volume = (
        {score: list(ends) for score, ends in table.items()} for table in (intervals.slices, intervals.volume)
    )
    return {
        "resamples": intervals.resamples,
        "seed": intervals.seed,
        "slices": slices,
        "volume_method": intervals.volume_method,
        "volume_blocks": intervals.volume_blocks,
        "volume": volume,
    }


def size_class_document(row: SizeClass, voxel_size_nm: tuple[float, float, float] | None, axes: int) -> dict[str, Any]:
    """Return one class as JSON values, its limits also in nm: of 2 axes areas, of 3 volumes, and diameters of both.

    The diameter is that of the disc or of the ball of that size.
    """
    document = asdict(row)
    for name in ("low", "high"):
        size, unit = document[f"{name}_px"], None if voxel_size_nm is None else math.prod(voxel_size_nm[-axes:])
        measured = None if size is None or unit is None else size * unit
        document[f"{name}_nm{axes}"] = measured
        document[f"{name}_diameter_nm"] = None if measured is None else diameter_nm(measured, axes)
    return document


def diameter_nm(size: float, axes: int) -> float:
    """Return the diameter of the disc of an area in nm^2, or of the ball of a volume in nm^3."""
    return float(2 * math.sqrt(size / math.pi) if axes == 2 else 2 * (size * 3 / (4 * math.pi)) ** (1 / 3))


def skeleton_document(scores: SkeletonScores) -> dict[str, float]:
    """Return the expected run length under the names that ``--json`` uses."""
    run = scores.run_length
    return {
        "erl_um": run.expected,
        "erl_longest_um": run.longest,
        "erl_share": run.share,
        "erl_correct_um": run.correct,
        "erl_split_um": run.split,
        "erl_merged_um": run.merged,
        "erl_omitted_um": run.omitted,
    }

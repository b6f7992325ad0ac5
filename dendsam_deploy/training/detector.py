"""Fine-tuning of the YOLO detector on boxes derived from labelled slices, by ultralytics' own training.

The tiles have the size, scale and padding of deployment. Sections are split into blocks with a gap between them, and
the checkpoint that detects the held-out ones best is kept. An interrupted training goes on exactly where it was.
"""

from __future__ import annotations

import dataclasses
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dendsam_deploy.durable import prepare_place
from dendsam_deploy.errors import DendsamError
from dendsam_deploy.models.detector import (
    DetectorRecord,
    YoloDetector,
    check_description,
    load_detector,
    save_detector,
)
from dendsam_deploy.progress import Progress, ProgressCallback, no_progress
from dendsam_deploy.training.detector_judge import judge_tiles, sample_predictions
from dendsam_deploy.training.detector_limits import HeadFacts, LimitCheck, check_limits, head_facts
from dendsam_deploy.training.detector_loop import LoopPlan, all_threads, score_row, train_detector
from dendsam_deploy.training.detector_plan import BatchPlan, plan_batch
from dendsam_deploy.training.detector_scores import HeldOutScores, JudgedBoxes, SizeClassScores, score_boxes
from dendsam_deploy.training.detector_state import read_state
from dendsam_deploy.training.detector_story import DetectorCourse, tell_course
from dendsam_deploy.training.detector_tiles import (
    BoxStatistics,
    TileAt,
    TileBoxes,
    held_out_tiles,
    training_tiles,
    write_tiles,
)
from dendsam_deploy.training.device import check_device
from dendsam_deploy.training.logbook import Logbook, logbook_folder
from dendsam_deploy.training.resume import ResumeFolder, training_fingerprint
from dendsam_deploy.training.source import hulls, open_sources, recorded_scale
from dendsam_deploy.training.story import VolumeStory, volume_stories
from dendsam_deploy.training.volume_list import training_volumes
from dendsam_deploy.weights import PACKAGED_DETECTOR

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dendsam_deploy.training.options import DetectorTrainingOptions
    from dendsam_deploy.training.source import TrainingSource
    from dendsam_deploy.training.story import HistoryRow, TrainingStory
    from dendsam_deploy.training.volume_list import LabelledPaths

DEFAULT_ARCHITECTURE = Path("yolo11n.yaml")
"""What is trained where there are no weights to start from."""


@dataclass(frozen=True, slots=True)
class DetectorTrainingResult:
    """What came of a training.

    Parameters
    ----------
    out : str
        The checkpoint.
    architecture : str
        Such as ``yolo11n``.
    zoom : float
        Model px per slice px, of the heaviest volume.
    model_pixel_size_nm : float or None
        Size of a model pixel, where the volumes record their voxel sizes.
    train_slices, held_out_slices : (int, int)
        Of the first volume that holds slices out: from its first slice of a kind to behind its last one.
    volumes : tuple of VolumeStory
        All volumes with the exact blocks of slices.
    scores : HeldOutScores
        Of the written checkpoint, by the deployed graph on held-out tiles as deployment cuts them.
    first_scores : HeldOutScores or None
        Of the weights that training started from; None where they were random.
    per_size : tuple of SizeClassScores
        The same as `scores` for small, medium and large objects.
    boxes : BoxStatistics
        What the training tiles hold.
    limits : tuple of LimitCheck
        That compared with what the detector can return and see.
    epochs : int
        Epochs trained.
    best_epoch : int
        Epoch of the written weights; 0 where no epoch was better than what training started from.
    stopped_early : bool
        Whether training ended because nothing improved any more.
    batch : int
        Tiles of a step.
    seconds : float
        Time of this run and, if it was resumed, of the earlier ones.
    resumed : bool
        Whether an interrupted training was continued.
    warnings : tuple of str
        Where the data and the detector do not go well together.
    story : TrainingStory
        All that a report shows.
    """

    out: str
    architecture: str
    zoom: float
    model_pixel_size_nm: float | None
    train_slices: tuple[int, int]
    held_out_slices: tuple[int, int]
    volumes: tuple[VolumeStory, ...]
    scores: HeldOutScores
    first_scores: HeldOutScores | None
    per_size: tuple[SizeClassScores, ...]
    boxes: BoxStatistics
    limits: tuple[LimitCheck, ...]
    epochs: int
    best_epoch: int
    stopped_early: bool
    batch: int
    seconds: float
    resumed: bool
    warnings: tuple[str, ...]
    story: TrainingStory

    def to_document(self) -> dict[str, Any]:
        """Return the result, but for its story, as plain values that JSON knows; what has no value is null."""
        names = [field.name for field in dataclasses.fields(self) if field.name != "story"]
        document: dict[str, Any] = _plain({name: getattr(self, name) for name in names})
        return document


class _TrainingSet(NamedTuple):
    """What lies on disk to train on, and what is known about it."""

    boxes: TileBoxes
    held_out: tuple[TileAt, ...]
    volumes: tuple[VolumeStory, ...]
    slices: tuple[tuple[int, int], tuple[int, int]]
    scale: tuple[float, float | None]

    @property
    def most_boxes(self) -> int:
        """Boxes on the fullest tile."""
        return int(self.boxes.objects_per_tile.max(initial=0))


class _Setup(NamedTuple):
    """How the data and the network go together, and what follows from it."""

    head: HeadFacts
    limits: tuple[LimitCheck, ...]
    warnings: tuple[str, ...]
    batch: BatchPlan
    config: dict[str, Any]


class _Winner(NamedTuple):
    """Weights, how they were judged, and the epoch that they are from."""

    detector: YoloDetector
    judged: tuple[JudgedBoxes, ...]
    scores: HeldOutScores
    per_size: tuple[SizeClassScores, ...]
    epoch: int


def finetune_detector(
    volume_path: Path | None,
    labels_path: Path | None,
    options: DetectorTrainingOptions,
    progress: ProgressCallback = no_progress,
) -> DetectorTrainingResult:
    """Train a detector on labelled volumes and write the best checkpoint.

    The course of the training is kept beside the checkpoint, see `training.logbook`.

    Parameters
    ----------
    volume_path, labels_path : Path or None
        Image and instance labels of the same shape; None where `options.data` names what to train on.
    options : DetectorTrainingOptions
        See there.
    progress : callable
        Told what was planned (stage ``plan``) and about every batch.

    Raises
    ------
    InvalidArgumentError, MissingCapabilityError, VolumeError, CheckpointError, UnsafeFileError, StorageError
        As the classes say; nothing is written then but the folders to resume from and of the course.
    """
    started = time.monotonic()
    volumes = training_volumes(volume_path, labels_path, options.data)
    check_device(options.schedule.device)
    prepare_place(options.out)
    start = _starting_detector(options)
    loading_s = time.monotonic() - started
    digest = start.sha256 or start.architecture
    folder = ResumeFolder(options.out, training_fingerprint(options, volumes, digest))
    earlier_s = folder.open(resume=options.resume)
    started -= earlier_s
    try:
        with open_sources(volumes, options, options.tile_size_px, options.min_object_px) as sources:
            data = _write_training_set(sources, options, folder.path)
    except DendsamError:
        if not earlier_s:
            folder.remove()
        raise
    state = read_state(folder.path)
    # What is resumed goes on with its batch, however much memory is free by now.
    setup = _set_up(start, data, options, digest, None if state is None else state.get("batch"))
    for line in (setup.batch.describe(), *setup.warnings):
        progress(Progress("plan", 1, 1, line))
    judging = time.monotonic()
    first = _judged(start, data, options, 0) if start.sha256 and not options.from_scratch else None
    plan = LoopPlan(
        folder=folder.path,
        tile_size_px=options.tile_size_px,
        most_boxes=data.most_boxes,
        from_scratch=options.from_scratch,
        schedule=options.schedule,
        batch=setup.batch.tiles,
        held_out=data.held_out,
        elapsed_s=time.monotonic() - started,
        joins_tiles=options.augment != "none",
        state=state,
        closing_s=loading_s + time.monotonic() - judging,
    )
    with Logbook(logbook_folder(options.out), setup.config, "epoch", plan.first_epoch) as book:
        if first is not None and not book.rows:
            book.add({"epoch": 0.0, "elapsed_s": 0.0} | score_row(first.scores, first.per_size))
        trained = train_detector(start, plan, book, progress, folder.note)
        history = book.rows
    best = _judged(load_detector(plan.best), data, options, _best_epoch(history))
    winner = _better(first, best)
    course = DetectorCourse(
        options=options,
        architecture=start.architecture,
        volumes=data.volumes,
        boxes=data.boxes,
        head=setup.head,
        batch=setup.batch,
        history=history,
        trained=trained,
        first=None if first is None else first.scores,
        scores=winner.scores,
        per_size=winner.per_size,
        best_epoch=winner.epoch,
        samples=sample_predictions(data.held_out, winner.judged, winner.scores.score_threshold),
        seconds=time.monotonic() - started,
        warnings=setup.warnings,
    )
    result = _result(course, data, setup.limits)
    _write_checkpoint(options, volumes, winner, result)
    folder.remove()
    return result


def _set_up(
    start: YoloDetector, data: _TrainingSet, options: DetectorTrainingOptions, digest: str, batch_before: int | None
) -> _Setup:
    """Compare the data with the network, and choose the batch, or take the one of the interrupted run."""
    head = head_facts(start, options.tile_size_px)
    limits = check_limits(data.boxes, head, data.scale[0])
    warnings = tuple(check.describe() for check in limits if not check.passed)
    schedule = replace(options.schedule, batch=batch_before) if batch_before else options.schedule
    batch = plan_batch(start, options.tile_size_px, data.most_boxes, schedule)
    config = {"options": _plain(options), "start": digest, "batch": batch.tiles, "volumes": _plain(data.volumes)}
    return _Setup(head, limits, warnings, batch, config)


def _better(first: _Winner | None, best: _Winner) -> _Winner:
    """Return the starting weights where nothing better came of them, else the best ones of the training.

    Weights for other objects, such as those of COCO, are no detector of ours whatever their score.
    """
    if first is None or len(first.detector.class_names) != 1:
        return best
    return first if first.scores.map50_95 > best.scores.map50_95 else best


def _write_checkpoint(
    options: DetectorTrainingOptions,
    volumes: Sequence[LabelledPaths],
    winner: _Winner,
    result: DetectorTrainingResult,
) -> None:
    """Write the weights with a record of where they come from."""
    origin = {
        "volume": ", ".join(entry.volume.name for entry in volumes),
        "labels": ", ".join(entry.labels.name for entry in volumes),
        "seed": options.schedule.seed,
    }
    record = DetectorRecord(
        tile_size_px=options.tile_size_px,
        model_pixel_size_nm=result.model_pixel_size_nm,
        zoom=result.zoom,
        score_threshold=winner.scores.score_threshold,
        summary=origin | result.to_document() | {"out": options.out.name},
    )
    save_detector(options.out, winner.detector.network, record)


def _result(course: DetectorCourse, data: _TrainingSet, limits: tuple[LimitCheck, ...]) -> DetectorTrainingResult:
    """Gather what came of a training."""
    zoom, model_pixel_size_nm = data.scale
    train_slices, held_out_slices = data.slices
    return DetectorTrainingResult(
        out=str(course.options.out),
        architecture=course.architecture,
        zoom=zoom,
        model_pixel_size_nm=model_pixel_size_nm,
        train_slices=train_slices,
        held_out_slices=held_out_slices,
        volumes=course.volumes,
        scores=course.scores,
        first_scores=course.first,
        per_size=course.per_size,
        boxes=course.boxes.statistics(),
        limits=limits,
        epochs=course.trained.epochs,
        best_epoch=course.best_epoch,
        stopped_early=course.trained.stopped_early,
        batch=course.batch.tiles,
        seconds=course.seconds,
        resumed=course.trained.resumed,
        warnings=course.warnings,
        story=tell_course(course),
    )


def _judged(detector: YoloDetector, data: _TrainingSet, options: DetectorTrainingOptions, epoch: int) -> _Winner:
    """Judge weights on the held-out tiles."""
    with all_threads():
        judged = judge_tiles(detector, data.held_out, options.tile_size_px, options.schedule.device)
    return _Winner(detector, judged, *score_boxes(judged), epoch)


def _best_epoch(history: Sequence[HistoryRow]) -> int:
    """Return the epoch whose weights were kept: the first of those with the highest score."""
    scores = {int(row["epoch"]): row["held_out_map50_95"] for row in history if row["epoch"] > 0}
    return max(scores, key=lambda epoch: (0.0 if math.isnan(scores[epoch]) else scores[epoch], -epoch))


def _plain(value: Any) -> Any:  # noqa: ANN401 - any value that JSON knows, or a dataclass of such
    """Return plain values that JSON knows; numbers that are none, and infinite ones, are None."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(name): _plain(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, int | str | bool | None) else str(value)


def _starting_detector(options: DetectorTrainingOptions) -> YoloDetector:
    """Return what training starts from."""
    has_default = PACKAGED_DETECTOR.is_file() and not options.from_scratch
    path = options.start or (PACKAGED_DETECTOR if has_default else DEFAULT_ARCHITECTURE)
    detector = load_detector(path, options.schedule.seed)
    # Training builds the network anew from the description that its checkpoint brings along.
    description: Any = detector.network.yaml
    check_description(description, path)
    return detector


def _write_training_set(
    sources: Sequence[TrainingSource], options: DetectorTrainingOptions, folder: Path
) -> _TrainingSet:
    """Cut the tiles to train on and those to judge by; say what the former hold."""
    schedule = options.schedule
    boxes = write_tiles(folder, "train", training_tiles(sources, schedule.tile_count, schedule.seed))
    held_out = held_out_tiles(sources, schedule.judge_tiles)
    write_tiles(folder, "val", held_out)
    stories = volume_stories(sources, options.gap)
    return _TrainingSet(boxes, tuple(held_out), stories, hulls(sources), recorded_scale(sources))

"""What the training of a detector has to tell."""

from __future__ import annotations

import platform
from importlib import metadata
from typing import TYPE_CHECKING, NamedTuple

import torch

from dendsam_deploy.training.detector_loop import RATE_FROM_SCRATCH, RATE_FROM_WEIGHTS
from dendsam_deploy.training.story import BoxStory, SizeScores, TrainingStory

if TYPE_CHECKING:
    from dendsam_deploy.training.detector_limits import HeadFacts
    from dendsam_deploy.training.detector_loop import TrainedDetector
    from dendsam_deploy.training.detector_plan import BatchPlan
    from dendsam_deploy.training.detector_scores import HeldOutScores, SizeClassScores
    from dendsam_deploy.training.detector_tiles import TileBoxes
    from dendsam_deploy.training.options import DetectorTrainingOptions
    from dendsam_deploy.training.story import HistoryRow, SamplePrediction, VolumeStory


class DetectorCourse(NamedTuple):
    """Everything that happened; see `detector.DetectorTrainingResult` for most of it."""

    options: DetectorTrainingOptions
    architecture: str
    volumes: tuple[VolumeStory, ...]
    boxes: TileBoxes
    head: HeadFacts
    batch: BatchPlan
    history: tuple[HistoryRow, ...]
    trained: TrainedDetector
    first: HeldOutScores | None
    scores: HeldOutScores
    per_size: tuple[SizeClassScores, ...]
    best_epoch: int
    samples: tuple[SamplePrediction, ...]
    seconds: float
    warnings: tuple[str, ...]


def tell_course(course: DetectorCourse) -> TrainingStory:
    """Tell the course of a training as `report.training_report` shows it."""
    scores = course.scores
    return TrainingStory(
        kind="detector",
        model=course.architecture,
        out=course.options.out.name,
        score_name="held-out AP50-95",
        first_score=float("nan") if course.first is None else course.first.map50_95,
        best_score=scores.map50_95,
        best_at=course.best_epoch,
        volumes=course.volumes,
        history=course.history,
        seconds=course.seconds,
        settings=_settings(course),
        environment=_environment(course),
        metrics={
            "precision at IoU .5": scores.precision,
            "recall at IoU .5": scores.recall,
            "AP50": scores.map50,
            "AP50-95": scores.map50_95,
            "score threshold": scores.score_threshold,
        },
        per_size=tuple(_size_scores(entry) for entry in course.per_size),
        boxes=BoxStory(
            objects_per_tile=course.boxes.objects_per_tile,
            short_side_px=course.boxes.short_side_px,
            aspect=course.boxes.aspect,
            most_objects=course.head.most_objects,
            finest_cell_px=course.head.strides_px[0],
        ),
        samples=course.samples,
        notes=_notes(course),
    )


def _size_scores(entry: SizeClassScores) -> SizeScores:
    limits = {
        "small": f"small, below {entry.most_px:g} px",
        "medium": f"medium, {entry.least_px:g} to {entry.most_px:g} px",
        "large": f"large, from {entry.least_px:g} px",
    }
    values = {
        "precision": entry.precision,
        "recall": entry.recall,
        "AP50": entry.map50,
        "AP50-95": entry.map50_95,
    }
    return SizeScores(limits[entry.name], entry.objects, values)


def _notes(course: DetectorCourse) -> tuple[str, ...]:
    """Say what a careful reader has to know."""
    notes = []
    if course.best_epoch == 0:
        notes.append(
            "Never improved: no epoch was better on the held-out tiles than the weights that training started from "
            f"(AP50-95 {course.scores.map50_95:.3f}), so those were written. Train longer, or on more labelled slices."
        )
    elif course.first is None:
        notes.append("Training began with random weights, so there is no score to compare with.")
    if course.trained.stopped_early:
        notes.append(
            f"Stopped early: the last {course.options.schedule.patience} epochs were no better than epoch "
            f"{course.best_epoch or course.trained.epochs - (course.options.schedule.patience or 0)}."
        )
    elif course.best_epoch and course.best_epoch == course.trained.epochs:
        notes.append("The last epoch was the best one: longer training may well find more.")
    if course.trained.resumed:
        notes.append("Interrupted and resumed.")
    if sum(entry.objects for entry in course.per_size) < 100:
        count = sum(entry.objects for entry in course.per_size)
        notes.append(f"Judged by {count} held-out objects only: differences of a few per cent mean nothing.")
    return (*notes, *course.warnings)


def _settings(course: DetectorCourse) -> dict[str, str]:
    """Write the settings as they are to be read."""
    options, schedule = course.options, course.options.schedule
    start = "random weights" if course.first is None else (options.start.name if options.start else "packaged weights")
    default_rate = RATE_FROM_SCRATCH if course.first is None else RATE_FROM_WEIGHTS
    lengths = [f"{schedule.minutes:g} minutes"] if schedule.minutes is not None else []
    lengths += [f"{schedule.epochs} epochs"] if schedule.epochs is not None else []
    return {
        "architecture": course.architecture,
        "start": start,
        "tile": f"{options.tile_size_px} px, neighbours overlap by {course.head.overlap_px} px at deployment",
        "length": " or ".join(lengths) + f", {course.trained.epochs} epochs trained",
        "early stop": "never" if schedule.patience is None else f"after {schedule.patience} epochs without improvement",
        "batch": course.batch.describe().removeprefix("batch: "),
        "tiles": f"{schedule.tile_count} random ones, {schedule.epoch_tiles} of them in an epoch",
        "learning rate": f"{schedule.learning_rate or default_rate:g} at its peak",
        "augmentation": options.augment,
        "background labels": ", ".join(map(str, options.background_labels)) or "none but 0",
        "gap": f"{options.gap} slices at least",
        "seed": str(schedule.seed),
        "candidates": f"{course.head.candidates} boxes of a tile, {len(course.head.strides_px)} grids with cells of "
        + ", ".join(map(str, course.head.strides_px))
        + " px",
    }


def _environment(course: DetectorCourse) -> dict[str, str]:
    """Say where it ran."""
    return {
        "device": course.options.schedule.device,
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "ultralytics": metadata.version("ultralytics"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }

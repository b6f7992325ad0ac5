"""Fine-tuning of the YOLO detector on boxes derived from labelled slices, by ultralytics' own training.

The tiles have the size, scale and padding of deployment. Sections are split into contiguous blocks, and the checkpoint
that detects the held-out block best is kept. An interrupted training goes on where it was.
"""

from __future__ import annotations

import dataclasses
import json
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dendsam_deploy.errors import DendsamError, InvalidArgumentError, VolumeError
from dendsam_deploy.models.detector import (
    DetectorRecord,
    YoloDetector,
    check_description,
    load_detector,
    save_detector,
)
from dendsam_deploy.models.detector_graph import candidate_count
from dendsam_deploy.progress import ProgressCallback, no_progress
from dendsam_deploy.training.boxes import plan_zoom, split_blocks
from dendsam_deploy.training.detector_loop import (
    DetectorSchedule,
    HeldOutScores,
    LoopPlan,
    train_detector,
)
from dendsam_deploy.training.detector_tiles import (
    BoxStatistics,
    held_out_tiles,
    least_area_px,
    training_tiles,
    write_tiles,
)
from dendsam_deploy.training.device import check_device
from dendsam_deploy.training.resume_folder import ResumeFolder
from dendsam_deploy.training.samples import LabelledVolume, TileRecipe
from dendsam_deploy.volume.open import open_labels, open_volume
from dendsam_deploy.weights import PACKAGED_DETECTOR

DEFAULT_ARCHITECTURE = Path("yolo11n.yaml")
"""What is trained where there are no weights to start from."""

FINEST_STRIDE_PX = 8
"""Cells of YOLO's finest grid; objects much smaller than one are hard to find."""

CANDIDATES_PER_OBJECT = 7
"""Overlapping boxes that YOLO draws around one object, roughly."""


@dataclass(frozen=True, slots=True)
class DetectorTrainingOptions:
    """What to train, and on which slices.

    Parameters
    ----------
    out : Path
        Checkpoint to write.
    start : Path or None
        Checkpoint (``.pt``) or architecture (``.yaml``) to start from. None: the packaged weights.
    from_scratch : bool
        Start from random weights of that architecture, `DEFAULT_ARCHITECTURE` where none is named.
    tile_size_px : int
        Side of the tiles, model px; a multiple of 32.
    slices : (int, int) or None
        Half-open range of slices that may be used, for training and for judging together.
    holdout_fraction : float
        Part of them, the last block, that judges and never trains.
    gap : int
        Slices between the two blocks that serve neither.
    zoom : float or None
        Model px per slice px; None: planned from the size of the objects.
    background_labels : tuple of int
        Labels that are not objects, such as a membrane class.
    voxel_size_nm : (float, float, float) or None
        Overrides what the file records.
    resume : bool
        Go on with an interrupted training of the same settings, if there is one.
    schedule : DetectorSchedule
        Length, batch and rate.
    """

    out: Path
    start: Path | None = None
    from_scratch: bool = False
    tile_size_px: int = 384
    slices: tuple[int, int] | None = None
    holdout_fraction: float = 0.15
    gap: int = 2
    zoom: float | None = None
    background_labels: tuple[int, ...] = ()
    voxel_size_nm: tuple[float, float, float] | None = None
    resume: bool = True
    schedule: DetectorSchedule = field(default_factory=DetectorSchedule)

    def __post_init__(self) -> None:
        if self.tile_size_px < 64 or self.tile_size_px % 32:
            raise InvalidArgumentError(
                f"tiles of {self.tile_size_px} px do not suit YOLO; choose a multiple of 32 from 64 on"
            )


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
        Model px per slice px.
    model_pixel_size_nm : float or None
        Size of a model pixel, where the volume records its voxel size.
    train_slices, held_out_slices : (int, int)
        Half-open ranges.
    scores : HeldOutScores
        Of the written checkpoint.
    boxes : BoxStatistics
        What the training tiles hold.
    epochs : int
        Epochs trained.
    seconds : float
        Time of this run and, if it was resumed, of the earlier ones.
    resumed : bool
        Whether an interrupted training was continued.
    warnings : tuple of str
        Where the data and the detector do not go well together.
    """

    out: str
    architecture: str
    zoom: float
    model_pixel_size_nm: float | None
    train_slices: tuple[int, int]
    held_out_slices: tuple[int, int]
    scores: HeldOutScores
    boxes: BoxStatistics
    epochs: int
    seconds: float
    resumed: bool
    warnings: tuple[str, ...]

    def to_document(self) -> dict[str, Any]:
        """Return the result as plain values that JSON knows."""
        document: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return document


@dataclass(frozen=True, slots=True)
class _TrainingSet:
    """The tiles on disk and where they come from."""

    train_slices: range
    held_out_slices: range
    zoom: float
    model_pixel_size_nm: float | None
    boxes: BoxStatistics


def finetune_detector(
    volume_path: Path, labels_path: Path, options: DetectorTrainingOptions, progress: ProgressCallback = no_progress
) -> DetectorTrainingResult:
    """Train a detector on a labelled volume and write the best checkpoint.

    Parameters
    ----------
    volume_path, labels_path : Path
        Image and instance labels of the same shape.
    options : DetectorTrainingOptions
        See there.
    progress : callable
        Told about every batch.

    Raises
    ------
    InvalidArgumentError, MissingCapabilityError, VolumeError, CheckpointError, UnsafeFileError, StorageError
        As the classes say; nothing is written then but the folder to resume from.
    """
    started = time.monotonic()
    check_device(options.schedule.device)
    start = _starting_detector(options)
    settings = dataclasses.asdict(options) | {"out": "", "resume": "", "start": start.sha256 or start.architecture}
    folder = ResumeFolder(options.out, settings | {"volume": volume_path, "labels": labels_path})
    earlier_s = folder.open(resume=options.resume)
    started -= earlier_s
    try:
        tiles = _write_training_set(volume_path, labels_path, options, folder.path)
    except DendsamError:
        if not earlier_s:
            folder.remove()
        raise
    plan = LoopPlan(
        folder=folder.path,
        tile_size_px=options.tile_size_px,
        most_boxes=tiles.boxes.most_per_tile,
        from_scratch=options.from_scratch,
        schedule=options.schedule,
        elapsed_s=time.monotonic() - started,
    )
    trained = train_detector(start, plan, progress, folder.note)
    result = DetectorTrainingResult(
        out=str(options.out),
        architecture=start.architecture,
        zoom=tiles.zoom,
        model_pixel_size_nm=tiles.model_pixel_size_nm,
        train_slices=(tiles.train_slices.start, tiles.train_slices.stop),
        held_out_slices=(tiles.held_out_slices.start, tiles.held_out_slices.stop),
        scores=trained.scores,
        boxes=tiles.boxes,
        epochs=trained.epochs,
        seconds=time.monotonic() - started,
        resumed=trained.resumed,
        warnings=box_warnings(tiles.boxes, options.tile_size_px),
    )
    best = load_detector(plan.best)
    origin = {"volume": Path(volume_path).name, "labels": Path(labels_path).name, "seed": options.schedule.seed}
    summary = origin | result.to_document() | {"out": options.out.name}
    threshold = trained.scores.score_threshold
    record = DetectorRecord(options.tile_size_px, tiles.model_pixel_size_nm, tiles.zoom, threshold, summary)
    save_detector(options.out, best.network, record)
    folder.remove()
    return result


def box_warnings(boxes: BoxStatistics, tile_size_px: int) -> tuple[str, ...]:
    """Say where the objects go beyond what a detector can return or see.

    Parameters
    ----------
    boxes : BoxStatistics
        What the training tiles hold.
    tile_size_px : int
        Side of the tiles.
    """
    found = []
    grids = sum((tile_size_px // (FINEST_STRIDE_PX * step)) ** 2 for step in (1, 2, 4))
    candidates = candidate_count(tile_size_px, grids)
    if CANDIDATES_PER_OBJECT * boxes.most_per_tile > candidates:
        found.append(
            f"up to {boxes.most_per_tile} objects on a tile, and the deployed graph returns {candidates} overlapping "
            "candidates: choose a larger zoom, which puts fewer objects on a tile"
        )
    if boxes.short_side_px[0] < FINEST_STRIDE_PX:
        found.append(
            f"1 box in 20 is narrower than {boxes.short_side_px[0]:.0f} px, and the detector's finest cells are "
            f"{FINEST_STRIDE_PX} px: such objects are found less surely; a larger zoom helps"
        )
    return tuple(found)


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
    volume_path: Path, labels_path: Path, options: DetectorTrainingOptions, folder: Path
) -> _TrainingSet:
    """Cut the tiles to train on and those to judge by."""
    schedule = options.schedule
    with ExitStack() as stack:
        image = stack.enter_context(open_volume(volume_path, options.voxel_size_nm))
        labels = stack.enter_context(open_labels(labels_path))
        train, held_out = split_blocks(image.info.shape_zyx[0], options.holdout_fraction, options.gap, options.slices)
        if not held_out:
            raise InvalidArgumentError("training needs at least two slices, one of them held out; give more slices")
        learn = LabelledVolume(image, labels, train, options.background_labels)
        judge = LabelledVolume(image, labels, held_out, options.background_labels)
        areas = learn.object_areas()
        if not len(areas) or not len(judge.object_areas()):
            raise VolumeError(f"{labels_path}: no object of 25 px or more in the chosen slices; choose other slices")
        zoom = options.zoom or plan_zoom(areas)
        recipe = TileRecipe(options.tile_size_px, zoom)
        least = least_area_px(recipe)
        boxes = write_tiles(folder, "train", training_tiles(learn, recipe, schedule.tile_count, schedule.seed), least)
        write_tiles(folder, "val", held_out_tiles(judge, recipe, schedule.judge_tiles), least)
        voxel_size = image.info.voxel_size_nm
    return _TrainingSet(train, held_out, zoom, None if voxel_size is None else voxel_size[1] / zoom, boxes)

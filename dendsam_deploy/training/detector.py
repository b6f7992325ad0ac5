"""Fine-tuning of the YOLO detector on boxes derived from labelled slices, by ultralytics' own training.

The tiles have the size, scale and padding of deployment. Sections are split into contiguous blocks, and the checkpoint
that detects the held-out block best is kept. An interrupted training goes on where it was.
"""

from __future__ import annotations

import dataclasses
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dendsam_deploy.durable import prepare_place
from dendsam_deploy.errors import DendsamError
from dendsam_deploy.models.detector import (
    DetectorRecord,
    YoloDetector,
    check_description,
    load_detector,
    save_detector,
)
from dendsam_deploy.models.detector_graph import candidate_count
from dendsam_deploy.progress import ProgressCallback, no_progress
from dendsam_deploy.training.detector_loop import (
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
from dendsam_deploy.training.resume import ResumeFolder, training_fingerprint
from dendsam_deploy.training.source import TrainingSource, hulls, judged_volumes, open_sources, recorded_scale
from dendsam_deploy.training.volume_list import training_volumes
from dendsam_deploy.weights import PACKAGED_DETECTOR

if TYPE_CHECKING:
    from dendsam_deploy.training.options import DetectorSchedule, DetectorTrainingOptions

DEFAULT_ARCHITECTURE = Path("yolo11n.yaml")
"""What is trained where there are no weights to start from."""

FINEST_STRIDE_PX = 8
"""Cells of YOLO's finest grid; objects much smaller than one are hard to find."""

CANDIDATES_PER_OBJECT = 7
"""Overlapping boxes that YOLO draws around one object, roughly."""


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


def finetune_detector(
    volume_path: Path | None,
    labels_path: Path | None,
    options: DetectorTrainingOptions,
    progress: ProgressCallback = no_progress,
) -> DetectorTrainingResult:
    """Train a detector on a labelled volume and write the best checkpoint.

    Parameters
    ----------
    volume_path, labels_path : Path or None
        Image and instance labels of the same shape; None where `options.data` names what to train on.
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
    volumes = training_volumes(volume_path, labels_path, options.data)
    check_device(options.schedule.device)
    prepare_place(options.out)
    start = _starting_detector(options)
    digest = start.sha256 or start.architecture
    folder = ResumeFolder(options.out, training_fingerprint(options, volumes, digest))
    earlier_s = folder.open(resume=options.resume)
    started -= earlier_s
    try:
        with open_sources(volumes, options, options.tile_size_px) as sources:
            boxes = _write_training_set(sources[0], options.schedule, folder.path)
    except DendsamError:
        if not earlier_s:
            folder.remove()
        raise
    plan = LoopPlan(
        folder=folder.path,
        tile_size_px=options.tile_size_px,
        most_boxes=boxes.most_per_tile,
        from_scratch=options.from_scratch,
        schedule=options.schedule,
        elapsed_s=time.monotonic() - started,
    )
    trained = train_detector(start, plan, progress, folder.note)
    train_slices, held_out_slices = hulls(sources)
    zoom, model_pixel_size_nm = recorded_scale(sources)
    result = DetectorTrainingResult(
        out=str(options.out),
        architecture=start.architecture,
        zoom=zoom,
        model_pixel_size_nm=model_pixel_size_nm,
        train_slices=train_slices,
        held_out_slices=held_out_slices,
        scores=trained.scores,
        boxes=boxes,
        epochs=trained.epochs,
        seconds=time.monotonic() - started,
        resumed=trained.resumed,
        warnings=box_warnings(boxes, options.tile_size_px),
    )
    best = load_detector(plan.best)
    origin = {
        "volume": ", ".join(entry.volume.name for entry in volumes),
        "labels": ", ".join(entry.labels.name for entry in volumes),
        "seed": options.schedule.seed,
    }
    summary = origin | result.to_document() | {"out": options.out.name}
    threshold = trained.scores.score_threshold
    record = DetectorRecord(options.tile_size_px, result.model_pixel_size_nm, result.zoom, threshold, summary)
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


def _write_training_set(source: TrainingSource, schedule: DetectorSchedule, folder: Path) -> BoxStatistics:
    """Cut the tiles to train on and those to judge by; say what the former hold."""
    recipe, least = source.recipe, least_area_px(source.recipe)
    tiles = training_tiles(source.train, recipe, schedule.tile_count, schedule.seed)
    boxes = write_tiles(folder, "train", tiles, least)
    for judge, held_out in judged_volumes([source]):
        write_tiles(folder, "val", held_out_tiles(held_out, judge.recipe, schedule.judge_tiles), least)
    return boxes

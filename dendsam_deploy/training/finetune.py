"""`finetune sam`: from a labelled volume on disk to a checkpoint on disk, resumable."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dendsam_deploy.errors import CheckpointError, InvalidArgumentError, StorageError, VolumeError
from dendsam_deploy.models.sam import MODEL_TYPES, ModelType, build_sam, initialise
from dendsam_deploy.models.weights import TrainingRecord, load_sam, read_tensors, save_sam, write_tensors
from dendsam_deploy.progress import ProgressCallback, no_progress
from dendsam_deploy.training.batches import TrainingSource
from dendsam_deploy.training.boxes import plan_zoom, split_blocks
from dendsam_deploy.training.sam import SamTrainer, SamTrainingOptions, TrainingState
from dendsam_deploy.training.samples import MIN_OBJECT_PX, LabelledVolume, TileRecipe
from dendsam_deploy.volume.open import open_labels, open_volume
from dendsam_deploy.weights import PACKAGED_SAM

if TYPE_CHECKING:
    from torch import nn

    from dendsam_deploy.volume.volume import VolumeReader


@dataclass(frozen=True, slots=True)
class FinetuneSamOptions:
    """What to fine-tune, on which slices, and for how long.

    Parameters
    ----------
    out : Path
        Checkpoint to write.
    model_type : str
        Architecture. ``tiny`` starts from the packaged weights unless `start` says otherwise.
    start : Path or None
        Checkpoint to start from; needed for the official architectures.
    image_size : int or None
        Side of the model's input, px; None: that of the starting weights.
    from_scratch : bool
        Start from random weights.
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
        Go on with an interrupted run of the same settings, if there is one.
    schedule : SamTrainingOptions
        Length, batch and loss.
    """

    out: Path
    model_type: ModelType = "tiny"
    start: Path | None = None
    image_size: int | None = None
    from_scratch: bool = False
    slices: tuple[int, int] | None = None
    holdout_fraction: float = 0.15
    gap: int = 2
    zoom: float | None = None
    background_labels: tuple[int, ...] = ()
    voxel_size_nm: tuple[float, float, float] | None = None
    resume: bool = True
    schedule: SamTrainingOptions = field(default_factory=SamTrainingOptions)

    def __post_init__(self) -> None:
        if self.model_type not in MODEL_TYPES:
            raise InvalidArgumentError(
                f"unknown model type {self.model_type!r}; choose one of {', '.join(MODEL_TYPES)}"
            )
        if self.from_scratch and self.start is not None:
            raise InvalidArgumentError("training starts from a checkpoint or from scratch, not both; give one of them")
        if self.zoom is not None and not 0 < self.zoom < math.inf:
            raise InvalidArgumentError(f"the zoom is {self.zoom}, expected a positive number of model px per slice px")


@dataclass(frozen=True, slots=True)
class FinetunedSam:
    """Result of a fine-tuning; IoU is the mean over held-out objects prompted by their exact boxes."""

    out: str
    model_type: ModelType
    zoom: float
    model_pixel_size_nm: float | None
    train_slices: tuple[int, int]
    held_out_slices: tuple[int, int]
    first_held_out_iou: float
    held_out_iou: float
    steps: int
    seconds: float
    resumed: bool
    history: tuple[tuple[int, float, float], ...]

    def to_document(self) -> dict[str, Any]:
        """Return the result as plain values."""
        return dataclasses.asdict(self)


def finetune_sam(
    volume_path: Path, labels_path: Path, options: FinetuneSamOptions, progress: ProgressCallback = no_progress
) -> FinetunedSam:
    """Fine-tune a SAM on a labelled volume and write the best checkpoint.

    Parameters
    ----------
    volume_path, labels_path : Path
        Image and instance labels of the same shape.
    options : FinetuneSamOptions
        See there.
    progress : callable
        Told about every step.

    Raises
    ------
    InvalidArgumentError, VolumeError, CheckpointError, StorageError
        As the classes say; nothing is written then but the state to resume from.
    """
    _prepare_place(options.out)
    torch.manual_seed(options.schedule.seed)
    sam, image_size = _starting_model(options)
    with ExitStack() as stack:
        image = stack.enter_context(open_volume(volume_path, options.voxel_size_nm))
        labels = stack.enter_context(open_labels(labels_path))
        source = _training_source(image, labels, options, image_size)
        saved = _SavedState(options, f"{image.info}|{labels.info}|{source.recipe}")
        state = saved.load() if options.resume else None
        trainer = SamTrainer(sam, [source], options.schedule, with_hints=options.model_type == "tiny")
        trained = trainer.run(progress, state, saved.store)
        voxel_size = image.info.voxel_size_nm
    zoom, train, held_out = source.recipe.zoom, source.train.slices, source.held_out.slices
    result = FinetunedSam(
        out=str(options.out),
        model_type=options.model_type,
        zoom=zoom,
        model_pixel_size_nm=None if voxel_size is None else voxel_size[1] / zoom,
        train_slices=(train.start, train.stop),
        held_out_slices=(held_out.start, held_out.stop),
        first_held_out_iou=trained.first_held_out_iou,
        held_out_iou=trained.held_out_iou,
        steps=trained.steps,
        seconds=trained.seconds,
        resumed=state is not None,
        history=tuple((entry.step, entry.elapsed_s, entry.held_out_iou) for entry in trained.history),
    )
    data = {"volume": Path(volume_path).name, "labels": Path(labels_path).name, "seed": options.schedule.seed}
    save_sam(options.out, trained.state, _record(result, image_size, data))
    saved.remove()
    return result


def _prepare_place(out: Path) -> None:
    """Find out before the training, not behind it, that its result cannot be written."""
    if out.is_dir():
        raise InvalidArgumentError(f"{out}: is a folder; name the checkpoint file to write")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{out.parent}: cannot be made ({error.strerror}); choose another place") from error


def _starting_model(options: FinetuneSamOptions) -> tuple[nn.Module, int]:
    """Return the model to train and the side of its input, px."""
    if options.from_scratch:
        sam = build_sam(options.model_type, options.image_size)
        initialise(sam, torch.Generator().manual_seed(options.schedule.seed))
        return sam, int(sam.image_encoder.img_size)
    start = options.start or (PACKAGED_SAM if options.model_type == "tiny" else None)
    if start is None:
        raise InvalidArgumentError(
            f"fine-tuning {options.model_type} needs weights to start from: give a SAM checkpoint with --start, "
            "or ask for random weights with --from-scratch"
        )
    loaded = load_sam(start, options.image_size)
    if loaded.record.model_type != options.model_type:
        raise CheckpointError(
            f"{start}: holds a {loaded.record.model_type}, but {options.model_type} was asked for; "
            "name the type of the file"
        )
    return loaded.sam, loaded.record.image_size


def _training_source(
    image: VolumeReader, labels: VolumeReader, options: FinetuneSamOptions, tile_size_px: int
) -> TrainingSource:
    """Divide a volume into slices to learn from and slices to judge by, and choose the zoom."""
    train, held_out = split_blocks(image.info.shape_zyx[0], options.holdout_fraction, options.gap, options.slices)
    if not held_out:
        raise InvalidArgumentError("training needs at least two slices, one of them held out; give more slices")
    learn = LabelledVolume(image, labels, train, options.background_labels)
    judge = LabelledVolume(image, labels, held_out, options.background_labels)
    areas = learn.object_areas()
    for block, found in ((train, areas), (held_out, judge.object_areas())):
        if not len(found):
            raise VolumeError(
                f"{labels.info.source}: no object of {MIN_OBJECT_PX} px or more in slices {block.start}:{block.stop}; "
                "choose others with slices"
            )
    return TrainingSource(learn, judge, TileRecipe(tile_size_px, options.zoom or plan_zoom(areas)))


def _record(result: FinetunedSam, image_size: int, data: dict[str, Any]) -> TrainingRecord:
    """Return what the checkpoint says about its training."""
    summary = data | {
        "train_slices": list(result.train_slices),
        "held_out_slices": list(result.held_out_slices),
        "held_out_iou": result.held_out_iou,
        "steps": result.steps,
        "seconds": result.seconds,
    }
    return TrainingRecord(result.model_type, image_size, result.model_pixel_size_nm, result.zoom, summary)


class _SavedState:
    """The file beside the checkpoint from which an interrupted run goes on; bound to the run's settings."""

    def __init__(self, options: FinetuneSamOptions, data: str) -> None:
        self.path = options.out.with_name(f".{options.out.name}.resume")
        settings = dataclasses.asdict(options) | {"resume": None, "out": None, "data": data}
        self.settings = hashlib.sha256(json.dumps(settings, default=str, sort_keys=True).encode()).hexdigest()

    def load(self) -> TrainingState | None:
        """Return where the run stopped, or None if there is nothing to go on from.

        Raises
        ------
        CheckpointError
            If the file belongs to other settings or data.
        """
        if not self.path.exists():
            return None
        try:
            content = read_tensors(self.path)
            settings, state = content["settings"], TrainingState(*content["state"])
        except (CheckpointError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{self.path}: the state of an interrupted training is damaged; start anew with --no-resume"
            ) from error
        if settings != self.settings:
            raise CheckpointError(
                f"{self.path}: left by an interrupted training with other settings or data; "
                "repeat those to go on, or start anew with --no-resume"
            )
        return state

    def store(self, state: TrainingState) -> None:
        """Replace the file."""
        write_tensors(self.path, {"settings": self.settings, "state": list(state)})

    def remove(self) -> None:
        """Forget the run: it is finished."""
        self.path.unlink(missing_ok=True)

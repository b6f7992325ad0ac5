"""`finetune sam`: from a labelled volume on disk to a checkpoint on disk, resumable."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from dendsam_deploy.durable import prepare_place
from dendsam_deploy.errors import CheckpointError, InvalidArgumentError
from dendsam_deploy.models.sam import build_sam, initialise
from dendsam_deploy.models.weights import TrainingRecord, load_sam, save_sam
from dendsam_deploy.progress import ProgressCallback, no_progress
from dendsam_deploy.training.resume import ResumeFile, training_fingerprint
from dendsam_deploy.training.sam import SamTrainer, TrainingState
from dendsam_deploy.training.source import hulls, open_sources, recorded_scale
from dendsam_deploy.training.volume_list import training_volumes
from dendsam_deploy.weights import PACKAGED_SAM

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from dendsam_deploy.models.architectures import ModelType
    from dendsam_deploy.training.sam_options import FinetuneSamOptions


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
    volume_path: Path | None,
    labels_path: Path | None,
    options: FinetuneSamOptions,
    progress: ProgressCallback = no_progress,
) -> FinetunedSam:
    """Fine-tune a SAM on a labelled volume and write the best checkpoint.

    Parameters
    ----------
    volume_path, labels_path : Path or None
        Image and instance labels of the same shape; None where `options.data` names what to train on.
    options : FinetuneSamOptions
        See there.
    progress : callable
        Told about every step.

    Raises
    ------
    InvalidArgumentError, VolumeError, CheckpointError, StorageError
        As the classes say; nothing is written then but the state to resume from.
    """
    volumes = training_volumes(volume_path, labels_path, options.data)
    prepare_place(options.out)
    torch.manual_seed(options.schedule.seed)
    sam, image_size, digest = _starting_model(options)
    with open_sources(volumes, options, image_size) as sources:
        saved = ResumeFile(options.out, training_fingerprint(options, volumes, digest))
        state = saved.load(TrainingState) if options.resume else None
        trainer = SamTrainer(sam, sources, options.schedule, with_hints=options.model_type == "tiny")
        trained = trainer.run(progress, state, saved.store)
    train_slices, held_out_slices = hulls(sources)
    zoom, model_pixel_size_nm = recorded_scale(sources)
    result = FinetunedSam(
        out=str(options.out),
        model_type=options.model_type,
        zoom=zoom,
        model_pixel_size_nm=model_pixel_size_nm,
        train_slices=train_slices,
        held_out_slices=held_out_slices,
        first_held_out_iou=trained.first_held_out_iou,
        held_out_iou=trained.held_out_iou,
        steps=trained.steps,
        seconds=trained.seconds,
        resumed=state is not None,
        history=tuple((entry.step, entry.elapsed_s, entry.held_out_iou) for entry in trained.history),
    )
    data = {
        "volume": ", ".join(entry.volume.name for entry in volumes),
        "labels": ", ".join(entry.labels.name for entry in volumes),
        "seed": options.schedule.seed,
    }
    save_sam(options.out, trained.state, _record(result, image_size, data))
    saved.remove()
    return result


def _starting_model(options: FinetuneSamOptions) -> tuple[nn.Module, int, str]:
    """Return the model to train, the side of its input in px, and the digest of the file that it comes from."""
    if options.from_scratch:
        sam = build_sam(options.model_type, options.image_size)
        initialise(sam, torch.Generator().manual_seed(options.schedule.seed))
        return sam, int(sam.image_encoder.img_size), ""
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
    return loaded.sam, loaded.record.image_size, loaded.sha256


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

"""Reads and writes SAM checkpoints: tensors and plain values only, never code.

Two kinds are read: a plain SAM state dict (``image_encoder.*``, ``prompt_encoder.*``, ``mask_decoder.*``), as published for SAM, MobileSAM and DendriteSAM, and
this program's own file, ``{"model_state": state dict, "dendsam": record}``, which also knows how it was trained.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import pickle
import zipfile
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from dendsam_deploy.errors import CheckpointError, StorageError
from dendsam_deploy.models.sam import ENCODER_SHAPES, MODEL_TYPES, ModelType, build_sam, default_image_size

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from segment_anything.modeling import Sam
    from torch import Tensor

RECORD_KEY = "dendsam"
STATE_KEY = "model_state"
PARTS = ("image_encoder.", "prompt_encoder.", "mask_decoder.")


@dataclass(frozen=True, slots=True)
class TrainingRecord:
    """How a checkpoint of ours came about.

    Parameters
    ----------
    model_type : str
        One of `models.sam.MODEL_TYPES`.
    image_size : int
        Side of the input, px.
    model_pixel_size_nm : float or None
        Size of a model pixel in training, where the training volume recorded its voxel size.
    zoom : float or None
        Model px per slice px of the training volume.
    summary : dict
        Plain values about the training: data, sections used and held out, steps, scores.
    """

    model_type: ModelType
    image_size: int
    model_pixel_size_nm: float | None = None
    zoom: float | None = None
    summary: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class LoadedSam:
    """A SAM with the weights of a checkpoint, in evaluation mode, and what the checkpoint says about itself."""

    sam: Sam
    record: TrainingRecord
    sha256: str


def load_sam(path: Path, image_size: int | None = None) -> LoadedSam:
    """Build the SAM that a checkpoint holds.

    Parameters
    ----------
    path : Path
        A ``.pt`` or ``.pth`` file.
    image_size : int, optional
        Side of the input for which to build the model. Other than the checkpoint's own, its position tables are interpolated.

    Raises
    ------
    CheckpointError
        If the file is missing, cut off, holds other objects than tensors, or is not a SAM.
    """
    content = read_tensors(path)
    state, record = _state_and_record(content, path)
    if record is None:
        model_type, own_size = _recognise(state, path)
        record = TrainingRecord(model_type, own_size)
    if image_size is not None and image_size != record.image_size:
        record = dataclasses.replace(record, image_size=image_size)
    sam = build_sam(record.model_type, record.image_size)
    state = _fit_positions(state, sam)
    try:
        problems = sam.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise CheckpointError(f"{path}: tensors do not fit {record.model_type}: {_one_line(error)}") from error
    if problems.missing_keys or problems.unexpected_keys:
        missing, extra = problems.missing_keys, problems.unexpected_keys
        raise CheckpointError(
            f"{path}: not a complete {record.model_type} checkpoint: {len(missing)} tensors missing "
            f"({', '.join(missing[:2]) or 'none'}), {len(extra)} unknown ({', '.join(extra[:2]) or 'none'})"
        )
    return LoadedSam(sam.float().eval(), record, sha256_of(path))


def save_sam(path: Path, state: Mapping[str, Tensor], record: TrainingRecord) -> None:
    """Write a checkpoint of ours under a temporary name and rename it into place.

    Raises
    ------
    StorageError
        If the file system refuses.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            torch.save({STATE_KEY: dict(state), RECORD_KEY: dataclasses.asdict(record)}, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise StorageError(f"{path}: cannot write the checkpoint ({error.strerror or error}); free space or choose another place") from error


def read_tensors(path: Path) -> dict[str, Any]:
    """Read a checkpoint by torch's restricted unpickler: tensors and plain containers, nothing that runs.

    Raises
    ------
    CheckpointError
        If the file is missing, empty, cut off, or needs more than that.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; give the path of a SAM checkpoint (.pt or .pth)")
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path}: the file is empty; download or copy it again")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if _starts_like_zip(path) and zipfile.is_zipfile(path):
            raise CheckpointError(
                f"{path}: holds Python objects besides tensors, which are not loaded; save its state dict alone"
            ) from error
        raise CheckpointError(f"{path}: not a torch checkpoint; give a .pt or .pth file with a SAM state dict") from error
    except (RuntimeError, EOFError, KeyError, ValueError, OSError, zipfile.BadZipFile) as error:
        if _starts_like_zip(path):
            raise CheckpointError(
                f"{path}: the checkpoint is cut off or damaged ({path.stat().st_size:,} bytes); download or copy it again"
            ) from error
        raise CheckpointError(f"{path}: not a torch checkpoint; give a .pt or .pth file with a SAM state dict") from error
    if not isinstance(content, dict) or not content:
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, expected a state dict of tensors")
    return content


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _starts_like_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _state_and_record(content: dict[str, Any], path: Path) -> tuple[dict[str, Tensor], TrainingRecord | None]:
    """Separate the tensors from our own record, if the file has one."""
    if RECORD_KEY not in content:
        state = {key: value for key, value in content.items() if isinstance(value, torch.Tensor)}
        return state, None
    raw, state = content[RECORD_KEY], content.get(STATE_KEY)
    known = {entry.name for entry in dataclasses.fields(TrainingRecord)}
    if not isinstance(raw, dict) or raw.keys() - known or not isinstance(state, dict):
        raise CheckpointError(f"{path}: written by another version of dendsam-deploy; its record cannot be read")
    record = TrainingRecord(**raw)
    if record.model_type not in MODEL_TYPES:
        raise CheckpointError(f"{path}: model type {record.model_type!r}, expected one of {', '.join(MODEL_TYPES)}")
    return {key: value.float() if value.is_floating_point() else value for key, value in state.items()}, record


def _recognise(state: Mapping[str, Tensor], path: Path) -> tuple[ModelType, int]:
    """Tell the model type and image size of a plain state dict from its tensors."""
    found = [part.rstrip(".") for part in PARTS if any(key.startswith(part) for key in state)]
    if len(found) < len(PARTS):
        present = ", ".join(found) or (f"{next(iter(state))!r} and others" if state else "no tensors")
        raise CheckpointError(f"{path}: not a SAM checkpoint: expected image_encoder, prompt_encoder and mask_decoder, found {present}")
    patches = state.get("image_encoder.patch_embed.proj.weight")
    if patches is None:
        return "vit_t", default_image_size("vit_t")
    width = patches.shape[0]
    model_type = next((name for name, shape in ENCODER_SHAPES.items() if shape.width == width), None)
    if model_type is None:
        known = ", ".join(f"{shape.width} ({name})" for name, shape in ENCODER_SHAPES.items())
        raise CheckpointError(f"{path}: its patch embedding is {width} wide, expected one of {known}")
    position = state.get("image_encoder.pos_embed")
    grid = position.shape[1] if position is not None and position.ndim == 4 else 64
    return model_type, grid * patches.shape[-1]


def _fit_positions(state: dict[str, Tensor], sam: Sam) -> dict[str, Tensor]:
    """Interpolate absolute and relative position tables whose length belongs to another image size."""
    fitted = dict(state)
    for key, target in sam.state_dict().items():
        source = fitted.get(key)
        if source is None or source.shape == target.shape:
            continue
        if key.endswith("pos_embed") and source.ndim == 4:
            grid = functional.interpolate(
                source.float().permute(0, 3, 1, 2), target.shape[1:3], mode="bicubic", align_corners=False, antialias=True
            )
            fitted[key] = grid.permute(0, 2, 3, 1)
        elif key.endswith(("rel_pos_h", "rel_pos_w")) and source.ndim == 2 and source.shape[1] == target.shape[1]:
            # As segment_anything's get_rel_pos does on the fly.
            fitted[key] = functional.interpolate(source.float().T[None], target.shape[0], mode="linear")[0].T
    return fitted


def _one_line(error: Exception) -> str:
    """Return the most telling line of a multi-line message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[1] if len(lines) > 1 else lines[0]

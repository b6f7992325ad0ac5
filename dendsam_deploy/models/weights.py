"""Reads and writes SAM checkpoints: tensors and plain values only, never code.

Two kinds are read: a plain SAM state dict (``image_encoder.*``, ``prompt_encoder.*``, ``mask_decoder.*``), as published
for SAM, MobileSAM and DendriteSAM, and this program's own file, ``{"model_state": state dict, "dendsam": record}``,
which also knows how it was trained.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import pickle
import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from dendsam_deploy.durable import make_folder, published
from dendsam_deploy.errors import CheckpointError, InvalidArgumentError, StorageError, UnsafeFileError
from dendsam_deploy.models.architectures import ENCODER_SHAPES, MODEL_TYPES, ModelType, default_image_size
from dendsam_deploy.models.pickled_names import dangerous_names, pickled_names
from dendsam_deploy.models.sam import build_sam

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from segment_anything.modeling import Sam
    from torch import Tensor

RECORD_KEY = "dendsam"
STATE_KEY = "model_state"
PARTS = ("image_encoder", "prompt_encoder", "mask_decoder")

# What torch's restricted unpickler lets through of a damaged or foreign file.
_LOADING_ERRORS = (
    RuntimeError,
    EOFError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    AssertionError,
    ArithmeticError,
    MemoryError,
    OSError,
)


@dataclass(frozen=True, slots=True)
class TrainingRecord:
    """How a checkpoint of ours came about.

    Parameters
    ----------
    model_type : str
        One of `models.architectures.MODEL_TYPES`.
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
        Side of the input for which to build the model, px. Other than the checkpoint's own, its position tables are
        interpolated.

    Raises
    ------
    CheckpointError
        If the file is missing, cut off, holds other objects than tensors, or is not a SAM.
    InvalidArgumentError
        If `image_size` is impossible.
    """
    state, record = _state_and_record(read_tensors(path), path)
    if record is None:
        record = TrainingRecord(*_recognise(state, path))
    sam = _build(record, image_size, path)
    try:
        problems = sam.load_state_dict(_fit_positions(state, sam), strict=False)
    except RuntimeError as error:
        raise CheckpointError(f"{path}: tensors do not fit {record.model_type}: {_one_line(error)}") from error
    if problems.missing_keys or problems.unexpected_keys:
        missing, extra = problems.missing_keys, problems.unexpected_keys
        raise CheckpointError(
            f"{path}: not a complete {record.model_type} checkpoint: {len(missing)} tensors missing "
            f"({', '.join(missing[:2]) or 'none'}), {len(extra)} unknown ({', '.join(extra[:2]) or 'none'})"
        )
    _check_finite(sam, path)
    record = dataclasses.replace(record, image_size=int(sam.image_encoder.img_size))
    return LoadedSam(sam.eval(), record, sha256_of(path))


def save_sam(path: Path, state: Mapping[str, Tensor], record: TrainingRecord) -> None:
    """Write a checkpoint of ours.

    Raises
    ------
    StorageError
        If the file system refuses; an older file of this name is left as it was.
    """
    write_tensors(path, {STATE_KEY: dict(state), RECORD_KEY: dataclasses.asdict(record)})


def read_tensors(path: Path) -> dict[str, Any]:
    """Read a checkpoint by torch's restricted unpickler: tensors and plain containers, nothing that runs.

    Raises
    ------
    CheckpointError
        If the file is missing, empty, cut off, or needs more than that.
    """
    if not path.is_file():
        found = "is a folder" if path.is_dir() else "no such file"
        raise CheckpointError(f"{path}: {found}; give the path of a SAM checkpoint (.pt or .pth)")
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            is_archive = file.read(4) == b"PK\x03\x04"
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error
    if size == 0:
        raise CheckpointError(f"{path}: the file is empty; download or copy it again")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damaged files, torch warns before it fails
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        foreign = _foreign_names(path)
        if dangerous := dangerous_names(foreign):
            raise UnsafeFileError(
                f"{path}: loading it would call {', '.join(dangerous[:2])}, which no weights need; "
                "it was not loaded: do not trust where it comes from"
            ) from error
        if foreign:
            raise CheckpointError(
                f"{path}: holds Python objects besides tensors ({', '.join(foreign[:2])}), which are never loaded; "
                "save its state dict alone"
            ) from error
        raise _unreadable(path, is_archive) from error
    except _LOADING_ERRORS as error:
        raise _unreadable(path, is_archive) from error
    if not isinstance(content, dict) or not content:
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, expected a state dict of tensors")
    return content


def write_tensors(path: Path, content: Mapping[str, Any]) -> None:
    """Write tensors and plain values under a temporary name and rename the file into place.

    Raises
    ------
    StorageError
        If the file system refuses; an older file of this name is left as it was.
    """
    save_with_torch(path, dict(content))


def save_with_torch(path: Path, content: object) -> None:
    """Write what torch pickles, whole or not at all.

    Raises
    ------
    StorageError
        If the file system refuses; an older file of this name is left as it was.
    """
    make_folder(path.parent)
    try:
        with published(path) as file:
            torch.save(content, file)
    except RuntimeError as error:  # torch covers a failed write by a RuntimeError of its own
        raise StorageError(
            f"{path}: cannot be written ({_refusal(error)}); free space there or choose another place"
        ) from error


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _unreadable(path: Path, is_archive: bool) -> CheckpointError:
    """Return the error for a file that torch cannot read."""
    if is_archive:
        size = path.stat().st_size
        return CheckpointError(f"{path}: cut off or damaged ({size:,} bytes); download or copy it again")
    return CheckpointError(f"{path}: not a torch checkpoint; give a .pt or .pth file with a SAM state dict")


def _foreign_names(path: Path) -> list[str]:
    """Return the names that a checkpoint would import and that do not belong to tensors."""
    try:
        return sorted(name for name in pickled_names(path) if not name.startswith(("torch.", "torch_", "collections.")))
    except CheckpointError:
        return []


def _state_and_record(content: dict[str, Any], path: Path) -> tuple[dict[str, Tensor], TrainingRecord | None]:
    """Separate the tensors from our own record, if the file has one."""
    tensors, record = content, None
    if RECORD_KEY in content:
        record = _checked_record(content[RECORD_KEY], path)
        tensors = content.get(STATE_KEY, {})
    if isinstance(tensors, dict):
        state = {key: value for key, value in tensors.items() if isinstance(key, str) and torch.is_tensor(value)}
        if state:
            return state, record
    names = ", ".join(str(key) for key in list(content)[:3])
    raise CheckpointError(f"{path}: holds {names}, expected the tensors {', '.join(f'{part}.*' for part in PARTS)}")


def _checked_record(raw: object, path: Path) -> TrainingRecord:
    """Rebuild our own record from a file."""
    known = {entry.name for entry in dataclasses.fields(TrainingRecord)}
    if isinstance(raw, dict) and {"model_type", "image_size"} <= raw.keys() <= known:
        record = TrainingRecord(**raw)
        numbers = (record.model_pixel_size_nm, record.zoom)
        if (
            record.model_type in MODEL_TYPES
            and isinstance(record.image_size, int)
            and isinstance(record.summary, dict)
            and all(n is None or (isinstance(n, (int, float)) and math.isfinite(n) and n > 0) for n in numbers)
        ):
            return record
    raise CheckpointError(f"{path}: written by another version of dendsam-deploy: its record {raw!r:.80} is unknown")


def _recognise(state: Mapping[str, Tensor], path: Path) -> tuple[ModelType, int]:
    """Tell the model type and image size of a plain state dict from its tensors."""
    found = [part for part in PARTS if any(key.startswith(f"{part}.") for key in state)]
    if len(found) < len(PARTS):
        present = ", ".join(found) or f"{next(iter(state))} and others"
        raise CheckpointError(f"{path}: not a SAM checkpoint: expected {', '.join(PARTS)}, found {present}")
    patches = state.get("image_encoder.patch_embed.proj.weight")
    if patches is None:
        return "vit_t", default_image_size("vit_t")
    width = patches.shape[0] if patches.ndim == 4 else 0
    model_type = next((name for name, shape in ENCODER_SHAPES.items() if shape.width == width), None)
    if model_type is None:
        known = ", ".join(f"{shape.width} ({name})" for name, shape in ENCODER_SHAPES.items())
        raise CheckpointError(f"{path}: its patch embedding is {width} wide, expected one of {known}")
    position = state.get("image_encoder.pos_embed")
    grid = position.shape[1] if position is not None and position.ndim == 4 else 64
    return model_type, grid * patches.shape[-1]


def _build(record: TrainingRecord, image_size: int | None, path: Path) -> Sam:
    """Build the model of a record, for another image size if one is wished."""
    if image_size is not None:
        return build_sam(record.model_type, image_size)
    try:
        return build_sam(record.model_type, record.image_size)
    except InvalidArgumentError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _fit_positions(state: dict[str, Tensor], sam: Sam) -> dict[str, Tensor]:
    """Interpolate absolute and relative position tables whose length belongs to another image size."""
    fitted = dict(state)
    for key, target in sam.state_dict().items():
        source = fitted.get(key)
        if source is None or source.shape == target.shape:
            continue
        if key.endswith("pos_embed") and source.ndim == 4:
            table = source.float().permute(0, 3, 1, 2)
            table = functional.interpolate(table, target.shape[1:3], mode="bicubic", antialias=True)
            fitted[key] = table.permute(0, 2, 3, 1)
        elif key.endswith(("rel_pos_h", "rel_pos_w")) and source.ndim == 2 and source.shape[1] == target.shape[1]:
            # As segment_anything's get_rel_pos does on the fly.
            fitted[key] = functional.interpolate(source.float().T[None], target.shape[0], mode="linear")[0].T
    return fitted


def _check_finite(sam: Sam, path: Path) -> None:
    """Raise if a training that diverged left no numbers behind."""
    for name, tensor in sam.state_dict().items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise CheckpointError(f"{path}: {name} holds NaN or infinite values; use a checkpoint from before that")


def _refusal(error: BaseException) -> str:
    """Return what the file system said, if it is at the bottom of an error."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__context__
    return _one_line(error)


def _one_line(error: BaseException) -> str:
    """Return the most telling line of a multi-line message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[1] if len(lines) > 1 else lines[0]

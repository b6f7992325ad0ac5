"""Builds the SAM that a checkpoint holds, and writes checkpoints: tensors and plain values only, never code.

Every kind of `models.checkpoint_kinds` is read, with low-rank adapters merged. What is written is this program's own
file, ``{"model_state": state dict, "dendsam": record}``, which also knows how it was trained.
"""

from __future__ import annotations

import dataclasses
import pickle
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional

from dendsam_deploy.durable import make_folder, published
from dendsam_deploy.errors import CheckpointError, InvalidArgumentError, StorageError
from dendsam_deploy.models.adapters import AdapterFacts, is_adapter, merge_adapters, plain_name
from dendsam_deploy.models.checkpoint_kinds import (
    NORMALISATION,
    RECORD_KEY,
    STATE_KEY,
    Layout,
    SamFile,
    open_sam_file,
)
from dendsam_deploy.models.pickled_names import check_names
from dendsam_deploy.models.sam import build_sam
from dendsam_deploy.models.tensor_file import pickled_names, sha256_of
from dendsam_deploy.models.training_record import TrainingRecord

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from segment_anything.modeling import Sam
    from torch import Tensor

    from dendsam_deploy.models.tensor_file import TensorFile

__all__ = [
    "RECORD_KEY",
    "STATE_KEY",
    "LoadedSam",
    "TrainingRecord",
    "load_sam",
    "read_tensors",
    "save_sam",
    "save_with_torch",
    "sha256_of",
    "write_tensors",
]

_LARGEST_TENSOR = 1 << 27
"""Elements. The largest tensor of ViT-H at 4096 px, its position table, has 84 million."""

# What torch's restricted unpickler lets through of a damaged or foreign file.
_LOADING_ERRORS = (
    *(RuntimeError, EOFError, LookupError, ValueError, TypeError, AttributeError, AssertionError, ArithmeticError),
    *(MemoryError, OSError, pickle.UnpicklingError),
)


@dataclass(frozen=True, slots=True)
class LoadedSam:
    """A SAM with the weights of a checkpoint, in evaluation mode, and what the checkpoint says about itself.

    Parameters
    ----------
    sam : Sam
        Adapters are merged into its weights.
    record : TrainingRecord
        This program's own, or what the tensors tell.
    sha256 : str
        Digest of the file.
    layout : str
        What kind of file it is, a key of `models.checkpoint_kinds.LAYOUTS`.
    adapters : AdapterFacts or None
        The adapters that were merged.
    base_sha256 : str
        Digest of the file that the prompt encoder and the mask decoder are from, where the first one has none.
    """

    sam: Sam
    record: TrainingRecord
    sha256: str
    layout: Layout = "plain"
    adapters: AdapterFacts | None = None
    base_sha256: str = ""


def load_sam(path: Path, image_size: int | None = None, base: Path | None = None) -> LoadedSam:
    """Build the SAM that a checkpoint holds.

    Parameters
    ----------
    path : Path
        A ``.pt`` or ``.pth`` file of any kind in `models.checkpoint_kinds`.
    image_size : int, optional
        Side of the input for which to build the model, px. Other than the checkpoint's own, its position tables are
        interpolated.
    base : Path, optional
        A whole SAM of the same type, for a checkpoint that has an image encoder only: prompt encoder and mask decoder
        are taken from it. They do not know that encoder yet, so the model is one to start a training from.

    Raises
    ------
    CheckpointError
        If the file is missing, cut off, damaged, or not a SAM, or a `base` does not fit it.
    InvalidArgumentError
        If `image_size` is impossible, or a `base` is given for a whole SAM.
    UnsafeFileError
        If the file was made to run code where it is opened carelessly.
    """
    with open_sam_file(path) as (file, found):
        record = found.training_record(path)
        sam = _build(record, image_size, path)
        _check_completeness(found, sam, record, path)
        bottom = _base(found, record, base, path)
        state = _read(file, found)
    if bottom is not None:
        state = bottom.sam.state_dict() | state
    sam.load_state_dict(_fit_positions(state, sam))
    _check_finite(sam, path)
    record = dataclasses.replace(record, image_size=int(sam.image_encoder.img_size))
    base_sha256 = "" if bottom is None else bottom.sha256
    return LoadedSam(sam.eval(), record, sha256_of(path), found.layout, found.adapters, base_sha256)


def save_sam(path: Path, state: Mapping[str, Tensor], record: TrainingRecord) -> None:
    """Write a checkpoint of ours.

    Raises
    ------
    StorageError
        If the file system refuses; an older file of this name is left as it was.
    """
    write_tensors(path, {STATE_KEY: dict(state), RECORD_KEY: dataclasses.asdict(record)})


def read_tensors(path: Path) -> dict[str, Any]:
    """Read tensors and plain containers that `write_tensors` wrote, by torch's restricted unpickler.

    Raises
    ------
    CheckpointError
        If the file is missing, empty, cut off, or needs more than that.
    UnsafeFileError
        If the file was made to run code where it is opened carelessly.
    """
    names = pickled_names(path)
    check_names(path, names)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damaged files, torch warns before it fails
            content = torch.load(path, map_location="cpu", weights_only=True)
    except _LOADING_ERRORS as error:
        raise CheckpointError(
            f"{path}: damaged, or more than tensors and plain values ({_one_line(error):.100}); write it again"
        ) from error
    if not isinstance(content, dict) or not content:
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, expected a dict of tensors")
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


def _build(record: TrainingRecord, image_size: int | None, path: Path) -> Sam:
    """Build the model of a record, for another image size if one is wished."""
    if image_size is not None:
        return build_sam(record.model_type, image_size)
    try:
        return build_sam(record.model_type, record.image_size)
    except InvalidArgumentError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _check_completeness(found: SamFile, sam: Sam, record: TrainingRecord, path: Path) -> None:
    """Compare the names and shapes of a file with those of the model, before any of its tensors is read."""
    needed = {key: value.shape for key, value in sam.state_dict().items()}
    if found.layout == "unetr":
        needed = {key: shape for key, shape in needed.items() if key.startswith("image_encoder.")}
    present = {plain_name(key): tensor.shape for key, tensor in found.tensors.items() if not is_adapter(key)}
    missing, extra = [key for key in needed if key not in present], [key for key in present if key not in needed]
    if missing or extra:
        raise CheckpointError(
            f"{path}: not a complete {record.model_type} checkpoint: {len(missing)} tensors missing "
            f"({', '.join(missing[:2]) or 'none'}), {len(extra)} unknown ({', '.join(extra[:2]) or 'none'})"
        )
    for key, shape in present.items():
        if shape != tuple(needed[key]) and not _is_position(key, shape, tuple(needed[key])):
            raise CheckpointError(
                f"{path}: tensors do not fit {record.model_type}: size mismatch for {key}: found {shape}, "
                f"expected {tuple(needed[key])}"
            )
    for key, tensor in found.tensors.items():
        if tensor.size > _LARGEST_TENSOR:
            raise CheckpointError(f"{path}: {key} has {tensor.size:,} elements, expected at most {_LARGEST_TENSOR:,}")


def _is_position(key: str, found: tuple[int, ...], needed: tuple[int, ...]) -> bool:
    """Tell whether a tensor is a table of positions that only belongs to another image size."""
    is_table = key.endswith("pos_embed") and len(found) == 4
    is_relative = key.endswith(("rel_pos_h", "rel_pos_w")) and len(found) == 2
    return (is_table or is_relative) and found[-1] == needed[-1] and all(found)


def _base(found: SamFile, record: TrainingRecord, base: Path | None, path: Path) -> LoadedSam | None:
    """Load the SAM that completes an image encoder."""
    if found.layout != "unetr":
        if base is not None:
            raise InvalidArgumentError(f"{path} is a whole SAM and takes nothing from {base}; leave that out")
        return None
    if base is None:
        raise CheckpointError(
            f"{path}: holds the image encoder of a UNETR ({record.model_type}), but neither SAM's prompt encoder nor "
            "its mask decoder, so it cannot answer prompts; train it together with those of a whole SAM: "
            "finetune sam --start THIS --start-base SAM.pth"
        )
    loaded = load_sam(base)
    if loaded.record.model_type != record.model_type:
        raise CheckpointError(
            f"{base}: holds a {loaded.record.model_type}, but the encoder of {path} is a {record.model_type}; "
            "give a SAM of that type"
        )
    return loaded


def _read(file: TensorFile, found: SamFile) -> dict[str, Tensor]:
    """Read the tensors, adapters merged."""
    for key, tensor in found.normalisation.items():
        values = file.array(tensor).ravel() if tensor.size == 3 else np.zeros(3)
        if not np.allclose(values, NORMALISATION[key], atol=1e-2):
            raise CheckpointError(
                f"{file.path}: normalises images by another {key} than SAM ({values}); its graphs would differ"
            )
    arrays = {key: file.array(tensor) for key, tensor in found.tensors.items()}
    try:
        merged = merge_adapters(arrays)
    except CheckpointError as error:
        raise CheckpointError(f"{file.path}: {error}") from error
    return {key: torch.from_numpy(value) for key, value in merged.items()}


def _fit_positions(state: dict[str, Tensor], sam: Sam) -> dict[str, Tensor]:
    """Interpolate absolute and relative position tables whose length belongs to another image size."""
    fitted = dict(state)
    for key, target in sam.state_dict().items():
        source = fitted.get(key)
        if source is None or source.shape == target.shape:
            continue
        if key.endswith("pos_embed"):
            table = source.float().permute(0, 3, 1, 2)
            table = functional.interpolate(table, target.shape[1:3], mode="bicubic", antialias=True)
            fitted[key] = table.permute(0, 2, 3, 1)
        else:  # relative ones, as segment_anything's get_rel_pos does on the fly
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

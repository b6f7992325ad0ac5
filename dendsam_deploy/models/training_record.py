"""What a SAM checkpoint of this program says about its training; read without torch."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dendsam_deploy.errors import CheckpointError
from dendsam_deploy.models.architectures import MODEL_TYPES, ModelType
from dendsam_deploy.models.plain_values import PlainValues

if TYPE_CHECKING:
    from pathlib import Path


_LARGEST_SIZE_PX = 1 << 20


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


def checked_record(raw: object, path: Path) -> TrainingRecord:
    """Rebuild the record of a file.

    Raises
    ------
    CheckpointError
        If it is not one that this version writes.
    """
    known = {entry.name for entry in dataclasses.fields(TrainingRecord)}
    if isinstance(raw, dict) and {"model_type", "image_size"} <= raw.keys() <= known:
        record = TrainingRecord(**PlainValues().of(raw))
        numbers = (record.model_pixel_size_nm, record.zoom)
        if (
            record.model_type in MODEL_TYPES
            and isinstance(record.image_size, int)
            and 0 < record.image_size < _LARGEST_SIZE_PX
            and isinstance(record.summary, dict)
            and all(n is None or (isinstance(n, (int, float)) and math.isfinite(n) and n > 0) for n in numbers)
        ):
            return record
    raise CheckpointError(f"{path}: written by another version of dendsam-deploy: its record is unknown")

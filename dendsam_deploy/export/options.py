"""What an export is asked for; known without loading torch, so that help pages are quick."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dendsam_deploy.bundle.manifest import Thresholds

if TYPE_CHECKING:
    from pathlib import Path

    from dendsam_deploy.bundle.manifest import AttentionForm, Precision

DEFAULT_THRESHOLDS = Thresholds(detection_score=0.25, nms_iou=0.6, mask_logit=0.0, min_area_px=25)
"""Until a validation volume says better; labels under 25 px were left out of training as well."""


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """What to export, and as what.

    Parameters
    ----------
    sam : Path
        SAM checkpoint.
    out : Path
        The bundle's folder, such as ``exports/ca1``.
    detector : Path or None
        Ultralytics checkpoint or description (``.pt``, ``.yaml``), or a detector in ONNX. None: boxes are given later.
    name : str or None
        Name of the bundle; None takes that of its folder.
    image_size_px : int or None
        Side of the model's input; None takes the checkpoint's own.
    overlap_px : int or None
        Least overlap of neighbouring tiles; None takes 128, or a third of the side where that is less.
    model_pixel_size_nm, zoom : float or None
        Scale of the training images, where the checkpoint does not record it or records it wrongly.
    precisions : tuple of str
        What to export besides fp32: ``fp16``, ``bf16``, ``int8``. One that fails its proof is replaced by the next on
        the ladder, see `precision.LADDER`.
    attention : str or None
        How the fp32 encoder computes relative position, ``added`` or ``widened``; None takes the faster one here.
    thresholds : Thresholds or None
        What `segment` uses by default. None takes `DEFAULT_THRESHOLDS`, with the score that the detector's training
        found best, where it recorded one.
    margin_fraction, margin_px : float
        Margin of the decoder's region around a box: a fraction of the box's longer side, and tile px on top.
    reference_volume : Path or None
        Volume whose sections the graphs are compared on; None takes a phantom.
    licence : str
        Licence of the weights.
    points : bool
        Whether the decoder for points is written, which `compare` needs for clicks and for the grid, and `segment` not.
    overwrite : bool
        Whether an existing bundle may be replaced.
    """

    sam: Path
    out: Path
    detector: Path | None = None
    name: str | None = None
    image_size_px: int | None = None
    overlap_px: int | None = None
    model_pixel_size_nm: float | None = None
    zoom: float | None = None
    precisions: tuple[Precision, ...] = ()
    attention: AttentionForm | None = None
    thresholds: Thresholds | None = None
    margin_fraction: float = 0.25
    margin_px: float = 16.0
    reference_volume: Path | None = None
    licence: str = "not stated"
    points: bool = True
    overwrite: bool = False

"""What `pseudo-label` is asked for; known without loading a graph."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from dendsam_deploy.errors import InvalidArgumentError
from dendsam_deploy.evaluate.mask_choice import MaskCriteria
from dendsam_deploy.evaluate.mask_table import JudgingOptions
from dendsam_deploy.pipeline.stability import JitterOptions

if TYPE_CHECKING:
    from pathlib import Path

    from dendsam_deploy.pipeline.finish import LabelFormat
    from dendsam_deploy.pipeline.interchange import OtherFormat
    from dendsam_deploy.volume.boxes import BoxSource

DEFAULT_PRECISION = 0.9
"""Wanted where there is truth and nothing else is said."""


@dataclass(frozen=True, slots=True)
class PseudoLabelOptions:
    """How pseudo-labels are made; None takes what the bundle's manifest or the volume says.

    Parameters
    ----------
    out : Path
        Folder of the result; a name that ends with ``.tif`` is that of the labels, and the rest lies beside it in a
        folder ``NAME.pseudo``.
    slices : (int, int) or None
        Slices to look at, half-open; None takes all.
    kept_slices : tuple of int
        Slices among them that get labels; empty: all. The others serve their neighbours and the choice of thresholds.
    detection_score, nms_iou, min_area_px, zoom, voxel_size_nm, boxes
        As in `SegmentOptions`.
    format : {"tif", "ome-zarr"} or None
        Format of the labels; None takes that of the volume.
    least_score, least_predicted_iou, least_stability, least_agreement : float or None
        Least values of a mask that is kept, see `MaskCriteria`, whose defaults hold for None where there is no truth to
        choose them by.
    jitter_repeats, jitter_fraction, seed
        How wrong boxes are drawn to measure the stability, see `JitterOptions`.
    truth : Path or None
        Labels of the volume, or of some of its slices, to choose the thresholds by.
    truth_slices : (int, int) or None
        Slices whose truth is complete; None takes those that show an object of it.
    precision : float or None
        Wanted part of right masks among those that are kept; None wants `DEFAULT_PRECISION` where there is truth.
    right_iou, background_labels, sparse_truth
        When a mask is right, see `JudgingOptions`.
    also : tuple of {"coco", "yolo", "roi"}
        Formats of other programs in which the kept masks are written, too.
    restart : bool
        Discard the masks of an earlier run in the same folder instead of resuming it.
    """

    out: Path
    slices: tuple[int, int] | None = None
    kept_slices: tuple[int, ...] = ()
    detection_score: float | None = None
    nms_iou: float | None = None
    min_area_px: float | None = None
    zoom: float | None = None
    voxel_size_nm: tuple[float, float, float] | None = None
    boxes: BoxSource | None = None
    format: LabelFormat | None = None
    least_score: float | None = None
    least_predicted_iou: float | None = None
    least_stability: float | None = None
    least_agreement: float | None = None
    jitter_repeats: int = JitterOptions().repeats
    jitter_fraction: float = JitterOptions().fraction
    seed: int = 0
    truth: Path | None = None
    truth_slices: tuple[int, int] | None = None
    precision: float | None = None
    right_iou: float = JudgingOptions().right_iou
    background_labels: tuple[int, ...] = ()
    sparse_truth: bool = False
    also: tuple[OtherFormat, ...] = ()
    restart: bool = False

    def __post_init__(self) -> None:
        if self.truth is None and (self.precision is not None or self.truth_slices is not None):
            raise InvalidArgumentError("a precision is measured on labelled slices: give their labels as truth, too")
        if self.precision is not None and not 0 < self.precision <= 1:
            raise InvalidArgumentError(f"the wanted precision is {self.precision}, expected more than 0 and at most 1")
        if self.format not in (None, "tif") and self.out.suffix.lower() in (".tif", ".tiff"):
            raise InvalidArgumentError(f"{self.out}: the name is that of a TIFF; drop the suffix, or write a TIFF")
        MaskCriteria(**self.given_thresholds())
        self.judging()
        self.jitter()

    def given_thresholds(self) -> dict[str, float]:
        """Return the thresholds that were given, by the names that they have in `MaskCriteria`."""
        given = {field.name: getattr(self, f"least_{field.name}") for field in fields(MaskCriteria)}
        return {name: value for name, value in given.items() if value is not None}

    def judging(self) -> JudgingOptions:
        """Return when a mask is right."""
        return JudgingOptions(self.right_iou, self.background_labels, self.sparse_truth)

    def jitter(self) -> JitterOptions:
        """Return how wrong boxes are drawn."""
        return JitterOptions(self.jitter_repeats, self.jitter_fraction, self.seed)

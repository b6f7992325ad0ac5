"""The files of a folder of pseudo-labels: the labels, every mask with its provenance, and what to look at first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dendsam_deploy.durable import published
from dendsam_deploy.pipeline.pieces import paint_instances
from dendsam_deploy.pipeline.tables import csv_bytes
from dendsam_deploy.progress import Progress
from dendsam_deploy.volume.exported_masks import SliceMasks
from dendsam_deploy.volume.imagej_rois import NamedMask, write_named_rois
from dendsam_deploy.volume.labels import create_labels, smallest_label_dtype
from dendsam_deploy.volume.volume import LabelVolumeSpec

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    from dendsam_deploy.evaluate.mask_choice import MaskCriteria
    from dendsam_deploy.evaluate.mask_table import MaskTable
    from dendsam_deploy.pipeline.finish import LabelFormat
    from dendsam_deploy.pipeline.scored_masks import ScoredVolume
    from dendsam_deploy.progress import ProgressCallback
    from dendsam_deploy.volume.volume import VolumeInfo

MASKS_FILE = "masks.csv"
REVIEW_FILE = "review.csv"
REVIEW_ROIS_FILE = "review-rois.zip"
REVIEW_PAGE = "review.html"
RUN_FOLDER = "masks"
"""Folder of the run that made the masks: its journal and one file for each slice."""

MASK_COLUMNS = (
    "z", "id", "label", "x0", "y0", "x1", "y1", "area_px", "score", "predicted_iou", "stability", "agreement",
    "agreement_below", "agreement_above", "margin", "truth_iou", "kept", "why_not", "bundle_sha256", "thresholds",
)  # fmt: skip
"""``z`` counts slices of the input, ``id`` is the 3-D object and the value in the labels, ``label`` the number within
the slice; boxes in px. ``margin`` tells how far a mask is from the other side. Cells of what is not known are empty."""

REVIEW_COLUMNS = ("rank", *MASK_COLUMNS)

REVIEWED = 200
"""Kept masks that are listed for review, and as many of those that were not kept."""


@dataclass(frozen=True, slots=True)
class ChosenMasks:
    """All masks of a volume and which are kept.

    Parameters
    ----------
    table : MaskTable
        The masks.
    scored : ScoredVolume
        Where their pixels are.
    criteria : MaskCriteria
        What kept them.
    kept : ndarray, shape (N,), bool
        Which masks are kept.
    ids : ndarray, shape (N,), int64
        Their values in the labels.
    truth_iou : ndarray, shape (N,), float64
        IoU with the truth; NaN where it is not known.
    right_iou : float
        From which such a mask is right. Wrong ones are not kept, whatever else speaks for them.
    bundle_sha256 : str
        What made them.
    refusal : str
        Why a mask is not kept although it meets the criteria.
    """

    table: MaskTable
    scored: ScoredVolume
    criteria: MaskCriteria
    kept: NDArray[np.bool_]
    ids: NDArray[np.int64]
    truth_iou: NDArray[np.float64]
    right_iou: float
    bundle_sha256: str
    refusal: str = ""

    @property
    def margins(self) -> NDArray[np.float64]:
        """How far each mask is from the other side, see `MaskCriteria.margins`."""
        return self.criteria.margins(self.table.qualities)

    def review_order(self) -> NDArray[np.intp]:
        """Return the rows to look at: the kept ones, worst first, then those nearest to being kept.

        A wrong mask that is kept teaches an error, so these come first; among the others the near misses are where a
        look can gain most.
        """
        margins = self.margins
        order = np.lexsort((self.table.label, self.table.z, margins))
        kept = order[self.kept[order]][:REVIEWED]
        others = np.lexsort((self.table.label, self.table.z, -margins))
        return np.concatenate([kept, others[~self.kept[others]][:REVIEWED]])


def write_pseudo_labels(
    path: Path, masks: ChosenMasks, info: VolumeInfo, label_format: LabelFormat, progress: ProgressCallback
) -> None:
    """Write the kept masks as labels of the whole volume; slices that were not looked at are 0.

    Raises
    ------
    StorageError
        Where the file system refuses; an older file of that name stays then.
    """
    depth, height, width = info.shape_zyx
    largest = int(masks.ids[masks.kept].max(initial=0))
    spec = LabelVolumeSpec(info.shape_zyx, smallest_label_dtype(largest), info.voxel_size_nm, label_format)
    nothing = np.zeros((height, width), np.uint32)
    with create_labels(path, spec) as labels:
        for z in range(depth):
            progress(Progress("publish", z, depth))
            rows = masks.table.rows_of(z)
            if masks.kept[rows].any():
                values = np.where(masks.kept[rows], masks.ids[rows], 0).astype(np.uint32)
                labels.write(z, paint_instances(masks.scored.load(z).instances, values, (height, width)))
            else:
                labels.write(z, nothing)
    progress(Progress("publish", depth, depth))


def kept_masks(masks: ChosenMasks, shape_zyx: tuple[int, int, int]) -> Iterator[SliceMasks]:
    """Yield the kept masks of each slice that was looked at, for other programs, with score times predicted IoU.

    Parameters
    ----------
    masks : ChosenMasks
        All masks.
    shape_zyx : (int, int, int)
        Shape of the volume.
    """
    table = masks.table
    for z in masks.scored.slices:
        rows = np.arange(len(table))[table.rows_of(z)]
        rows = rows[masks.kept[rows]]
        found = masks.scored.load(z).instances
        place = {label: row for row, label in enumerate(found.ids.tolist())}
        yield SliceMasks(
            z,
            (shape_zyx[1], shape_zyx[2]),
            tuple(found.run_lengths[place[label]] for label in table.label[rows].tolist()),
            masks.ids[rows],
            table.qualities[rows, 0] * table.qualities[rows, 1],
        )


def write_mask_tables(folder: Path, masks: ChosenMasks) -> None:
    """Write the table of all masks, the review list and its ROIs.

    Raises
    ------
    StorageError
        Where the file system refuses.
    """
    margins = masks.margins
    with published(folder / MASKS_FILE) as stream:
        stream.write(csv_bytes([MASK_COLUMNS]))
        for row in range(len(masks.table)):
            stream.write(csv_bytes([_row(masks, row, float(margins[row]))]))
    order = masks.review_order()
    with published(folder / REVIEW_FILE) as stream:
        rows = ((rank, *_row(masks, row, float(margins[row]))) for rank, row in enumerate(order.tolist(), start=1))
        stream.write(csv_bytes([REVIEW_COLUMNS, *rows]))
    write_named_rois(folder / REVIEW_ROIS_FILE, _review_rois(masks, order))


def _review_rois(masks: ChosenMasks, order: NDArray[np.intp]) -> Iterator[NamedMask]:
    """Yield the masks to review in their order, the rank first in their names; each slice is read once."""
    table = masks.table
    wanted: dict[int, dict[int, NamedMask]] = {}
    for z in np.unique(table.z[order]).tolist():
        found = masks.scored.load(z).instances
        place = {label: row for row, label in enumerate(found.ids.tolist())}
        wanted[z] = {
            row: NamedMask(
                f"{rank:04d}-{'kept' if masks.kept[row] else 'left'}-z{z:04d}-{masks.ids[row]:05d}",
                z,
                found.run_lengths[place[int(table.label[row])]],
            )
            for rank, row in enumerate(order.tolist(), start=1)
            if table.z[row] == z
        }
    for row in order.tolist():
        yield wanted[int(table.z[row])][row]


def _row(masks: ChosenMasks, row: int, margin: float) -> tuple[object, ...]:
    """Return the row of `MASK_COLUMNS` of one mask."""
    table = masks.table
    quality = table.qualities[row].tolist()
    why_not = ""
    if not masks.kept[row]:
        iou = float(masks.truth_iou[row])
        is_wrong = f"IoU {iou:.2f} with the truth" if iou < masks.right_iou else ""
        why_not = masks.criteria.shortcomings(quality) or is_wrong or masks.refusal
    return (
        int(table.z[row]),
        int(masks.ids[row]),
        int(table.label[row]),
        *(f"{edge:.2f}" for edge in table.boxes_xyxy[row].tolist()),
        int(table.area_px[row]),
        *map(_number, quality),
        _number(table.below[row]),
        _number(table.above[row]),
        f"{margin:.4f}",
        _number(masks.truth_iou[row]),
        "yes" if masks.kept[row] else "no",
        why_not,
        masks.bundle_sha256,
        str(masks.criteria),
    )


def _number(value: float) -> str:
    """Write a number; nothing where there is none."""
    return "" if np.isnan(value) else f"{value:.4f}"

"""The objects that came out worst, each cut out of its micrograph with the outlines of truth and segmentation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dendsam_deploy.errors import VolumeError
from dendsam_deploy.evaluate.segmentation import find_segmentation
from dendsam_deploy.geometry import Window
from dendsam_deploy.report.overlays import PALETTE, outlines
from dendsam_deploy.volume.intensity import to_uint8
from dendsam_deploy.volume.open import open_labels, open_volume
from dendsam_deploy.volume.raster import encode_png, resize_bilinear

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from dendsam_deploy.evaluate.score_report import ObjectRow, ScoreReport

SHOWN = 12
"""Objects on a page."""

TRUTH_COLOUR, SEGMENT_COLOUR = PALETTE[2], PALETTE[5]

_SIDE_PX = 220
"""Side of a picture."""

_SMALLEST_PX, _LARGEST_PX = 48, 600
"""Sides of what is shown, slice px."""


@dataclass(frozen=True, slots=True)
class ObjectPicture:
    """One object of the truth, how it was found, and its picture as a PNG file; `side_px` slice px are shown."""

    row: ObjectRow
    png: bytes
    side_px: int


def worst_objects(report: ScoreReport, count: int = SHOWN) -> tuple[ObjectRow, ...]:
    """Choose the objects of the truth that cost most: size times the part of the union that is not shared.

    Where labels hold for one slice only, profiles of labels that were not chosen yet go before further ones of the same
    label, which are mostly the same dendrite a section further.
    """
    ranked = [row for row in sorted(report.per_object, key=_by_cost) if row.iou < 1]
    first = {row.truth_id: row for row in reversed(ranked)}
    others = [row for row in ranked if first[row.truth_id] is not row]
    chosen = [*(row for row in ranked if first[row.truth_id] is row), *others][:count]
    return tuple(sorted(chosen, key=_by_cost))


def _by_cost(row: ObjectRow) -> tuple[float, int, int]:
    """Return a key that puts the objects that cost most first."""
    return -(1 - row.iou) * row.voxels, row.shown_z, row.truth_id


def draw_worst_objects(report: ScoreReport, volume: Path, truth: Path, labels: Path) -> tuple[ObjectPicture, ...]:
    """Draw the worst objects in the slices in which they are largest.

    Parameters
    ----------
    report : ScoreReport
        The scores.
    volume : Path
        The micrographs, of the shape of the truth.
    truth, labels : Path
        As they were given to `evaluate_labels`.

    Raises
    ------
    VolumeError
        The volume cannot be read, or shows other voxels than the truth.
    """
    pictures = []
    first = report.options.first_slice or 0
    path = find_segmentation(labels).path
    with open_volume(volume) as raw, open_labels(truth) as wanted, open_labels(path) as found:
        if raw.info.shape_zyx != wanted.info.shape_zyx:
            shapes = (" x ".join(map(str, reader.info.shape_zyx)) for reader in (raw, wanted))
            raise VolumeError("{}: {} voxels (z, y, x), but the truth has {}; give its volume".format(volume, *shapes))
        for row in worst_objects(report):
            z = row.shown_z
            image = to_uint8(raw.read(z), f"{volume}: slice {z}")
            is_object = wanted.read(z) == row.truth_id
            pictures.append(draw_object(row, image, is_object, found.read(z - first).astype(np.uint32)))
    return tuple(pictures)


def draw_object(
    row: ObjectRow, image: NDArray[np.uint8], truth: NDArray[np.bool_], labels: NDArray[np.uint32]
) -> ObjectPicture:
    """Cut an object out and outline it.

    Parameters
    ----------
    row : ObjectRow
        The object.
    image : ndarray, shape (Y, X), uint8
        Its slice.
    truth : ndarray, shape (Y, X), bool
        Its pixels.
    labels : ndarray, shape (Y, X), uint32
        The segmentation of that slice; its best segment is drawn solid, others that meet the object thinner.
    """
    window = _around(truth)
    truth, labels, image = truth[window.slices], labels[window.slices], image[window.slices]
    factor = max(1, round(_SIDE_PX / max(image.shape)))
    shape = image.shape[0] * factor, image.shape[1] * factor
    grey = resize_bilinear(np.ascontiguousarray(image), shape) if factor > 1 else image
    colour = np.repeat(grey[:, :, None], 3, axis=2)
    meeting = np.where(np.isin(labels, np.unique(labels[truth])), labels, 0)
    large_truth, large_labels = (
        np.repeat(np.repeat(array, factor, 0), factor, 1) for array in (truth.astype(np.uint32), meeting)
    )
    others = outlines(large_labels) & (large_labels != (row.segment_id or 0))
    colour[others] = (colour[others] + SEGMENT_COLOUR) // 2
    colour[_thick(outlines((large_labels == (row.segment_id or -1)).astype(np.uint32)))] = SEGMENT_COLOUR
    colour[_thick(outlines(large_truth))] = TRUTH_COLOUR
    return ObjectPicture(row, encode_png(colour), max(window.height, window.width))


def _around(mask: NDArray[np.bool_]) -> Window:
    """Return a square window around a mask, with some tissue around it, inside the slice as far as it goes."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return Window(0, 0, _SMALLEST_PX, _SMALLEST_PX).clipped((mask.shape[0], mask.shape[1]))
    height, width = int(rows[-1] - rows[0]) + 1, int(columns[-1] - columns[0]) + 1
    side = int(np.clip(1.6 * max(height, width), _SMALLEST_PX, max(_LARGEST_PX, height, width)))
    y0, x0 = int(rows[0]) + height // 2 - side // 2, int(columns[0]) + width // 2 - side // 2
    return Window(y0, x0, side, side).clipped((mask.shape[0], mask.shape[1]))


def _thick(line: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Widen a line by a pixel to the right and below, so that it is seen on a screen."""
    wide = line.copy()
    wide[1:] |= line[:-1]
    wide[:, 1:] |= line[:, :-1]
    return wide

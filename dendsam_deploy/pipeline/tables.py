"""The two tables of a run: what was found in each slice, and the 3-D objects it adds up to."""

from __future__ import annotations

import csv
import io
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from dendsam_deploy.instances import Instances

DETECTION_COLUMNS = (
    "z", "id", "label", "x0", "y0", "x1", "y1", "score", "predicted_iou", "area_px", "link_confidence",
)  # fmt: skip
"""``z`` counts slices of the input, ``id`` is the 3-D object, ``label`` its number within the slice; boxes in px."""

INSTANCE_COLUMNS = (
    "id", "z_first", "z_last", "slices", "voxels", "volume_um3", "centroid_z", "centroid_y", "centroid_x",
    "x0", "y0", "x1", "y1", "mean_score", "mean_predicted_iou", "mean_link_confidence",
)  # fmt: skip
"""``volume_um3`` is empty where the voxel size is unknown; centroids are in px; means are weighted by area."""


@dataclass(frozen=True, slots=True)
class LinkedSlice:
    """The objects of one slice with their place in the volume.

    Parameters
    ----------
    z : int
        Slice of the input volume.
    instances : Instances
        The objects.
    ids : ndarray, shape (N,), uint32
        3-D object of each.
    link_confidence : ndarray, shape (N,), float32
        Confidence of its best link to another slice; 0 where it has none.
    """

    z: int
    instances: Instances
    ids: NDArray[np.uint32]
    link_confidence: NDArray[np.float32]


def csv_bytes(rows: Iterable[Iterable[object]]) -> bytes:
    """Return rows as CSV with plain line ends."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()


def detection_rows(linked: LinkedSlice) -> list[tuple[object, ...]]:
    """Return one row of `DETECTION_COLUMNS` for each object of a slice."""
    found = linked.instances
    columns = zip(
        linked.ids.tolist(),
        found.ids.tolist(),
        found.boxes_xyxy.tolist(),
        found.scores.tolist(),
        found.predicted_iou.tolist(),
        found.areas_px.tolist(),
        linked.link_confidence.tolist(),
        strict=True,
    )
    return [
        (linked.z, id_3d, label, *(f"{c:.2f}" for c in box), f"{score:.4f}", f"{iou:.4f}", area, f"{link:.4f}")
        for id_3d, label, box, score, iou, area, link in columns
    ]


class ObjectTable:
    """Adds up 3-D objects while slices stream past; it grows with the objects and not with the volume.

    Parameters
    ----------
    object_count : int
        Number of 3-D objects; their ids are 1 to this.
    """

    def __init__(self, object_count: int) -> None:
        size = object_count + 1
        self._slices = np.zeros(size, np.int64)
        self._voxels = np.zeros(size, np.int64)
        self._z_first = np.full(size, np.iinfo(np.int64).max)
        self._z_last = np.full(size, -1)
        self._moments_zyx = np.zeros((size, 3))
        self._upper_left = np.full((size, 2), np.iinfo(np.int64).max)
        self._lower_right = np.zeros((size, 2), np.int64)
        self._sums = np.zeros((size, 3))
        self._last_z_counted = np.full(size, -1)

    def add(self, linked: LinkedSlice) -> None:
        """Add the objects of one slice; slices come in ascending z."""
        ids, found = linked.ids.astype(np.int64), linked.instances
        new = np.unique(ids[self._last_z_counted[ids] != linked.z])
        self._slices[new] += 1
        self._last_z_counted[new] = linked.z
        np.minimum.at(self._z_first, ids, linked.z)
        np.maximum.at(self._z_last, ids, linked.z)
        np.add.at(self._voxels, ids, found.areas_px)
        windows = [runs.window for runs in found.run_lengths]
        if windows:
            np.minimum.at(self._upper_left, ids, [(window.y0, window.x0) for window in windows])
            np.maximum.at(self._lower_right, ids, [(window.y1, window.x1) for window in windows])
            centroids = np.array([_centroid_yx(runs.runs) for runs in found.run_lengths])
            centroids += [(window.y0, window.x0) for window in windows]
            places = np.column_stack([np.full(len(ids), linked.z + 0.5), centroids])
            np.add.at(self._moments_zyx, ids, places * found.areas_px[:, None])
            qualities = np.column_stack([found.scores, found.predicted_iou, linked.link_confidence])
            np.add.at(self._sums, ids, qualities * found.areas_px[:, None])

    def rows(self, voxel_size_nm: tuple[float, float, float] | None) -> list[tuple[object, ...]]:
        """Return one row of `INSTANCE_COLUMNS` for each object."""
        voxel_um3 = None if voxel_size_nm is None else math.prod(voxel_size_nm) * 1e-9
        return [self._row(number, voxel_um3) for number in range(1, len(self._slices))]

    def _row(self, number: int, voxel_um3: float | None) -> tuple[object, ...]:
        """Return the row of one object."""
        voxels = int(self._voxels[number])
        (y0, x0), (y1, x1) = self._upper_left[number], self._lower_right[number]
        return (
            number,
            int(self._z_first[number]),
            int(self._z_last[number]),
            int(self._slices[number]),
            voxels,
            "" if voxel_um3 is None else f"{voxels * voxel_um3:.6g}",
            *(f"{value:.2f}" for value in self._moments_zyx[number] / voxels),
            *(int(edge) for edge in (x0, y0, x1, y1)),
            *(f"{value:.4f}" for value in self._sums[number] / voxels),
        )


def _centroid_yx(runs: NDArray[np.int32]) -> tuple[float, float]:
    """Return the centre of mass of runs ``(row, first column, length)``, in px from the corner of their window."""
    row, first, length = runs.astype(np.float64).T
    area = length.sum()
    return float(((row + 0.5) * length).sum() / area), float(((first + length / 2) * length).sum() / area)

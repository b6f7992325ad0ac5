"""The page of a run: what was found, what it looks like, how sure it is, and where the time went."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dendsam_deploy.durable import published
from dendsam_deploy.report.figures import Series, chart_along_z, count_histogram, size_histogram, stage_bars
from dendsam_deploy.report.page import render_page

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from dendsam_deploy.report.overlays import Picture

_LISTED = 10
"""Rows of the tables of large objects and of doubtful links."""

_DOUBTFUL = 0.8
"""A best link of lower probability is listed for a look."""

_BAR_FRACTION = 0.25
"""A scale bar takes at most this part of a picture's width."""


@dataclass(frozen=True, slots=True)
class ProfileColumns:
    """All objects of all slices; the columns have one entry for each.

    Parameters
    ----------
    z : ndarray, shape (N,), int64
        Slice of the volume.
    object_id : ndarray, shape (N,), int64
        3-D object.
    score, predicted_iou, link_confidence : ndarray, shape (N,), float64
        Detection score, predicted IoU of the mask, probability of the best link to another slice (0 without any).
    area_px : ndarray, shape (N,), float64
        Area, slice px.
    """

    z: NDArray[np.int64]
    object_id: NDArray[np.int64]
    score: NDArray[np.float64]
    predicted_iou: NDArray[np.float64]
    link_confidence: NDArray[np.float64]
    area_px: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.z)


@dataclass(frozen=True, slots=True)
class ObjectColumns:
    """All 3-D objects; the columns have one entry for each.

    Parameters
    ----------
    object_id, z_first, z_last, slices, voxels : ndarray, shape (M,), int64
        Id, first and last slice, number of slices in which it appears, number of voxels.
    mean_score, mean_link_confidence : ndarray, shape (M,), float64
        Means over its profiles.
    """

    object_id: NDArray[np.int64]
    z_first: NDArray[np.int64]
    z_last: NDArray[np.int64]
    slices: NDArray[np.int64]
    voxels: NDArray[np.int64]
    mean_score: NDArray[np.float64]
    mean_link_confidence: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.object_id)


@dataclass(frozen=True, slots=True)
class RunReport:
    """Everything that the page of a run shows.

    Parameters
    ----------
    name, source : str
        Short name and path of the volume.
    shape_zyx : (int, int, int)
        Shape of the part that was segmented.
    first_z : int
        Slice of the volume that is slice 0 of the labels.
    voxel_size_nm : (float, float, float) or None
        Voxel size ``(z, y, x)``; without it sizes are shown in pixels, and the page says so.
    bundle, engine, device, precision : str
        What segmented it.
    notices : tuple of str
        What a careful reader has to know first, such as that the bundle is unproven.
    seconds : float
        Duration of the call that completed the run.
    stage_seconds : mapping
        Duration of each stage, summed over slices.
    limiting_stage : str
        The stage that decided the duration.
    profiles : ProfileColumns
        The 2-D objects.
    objects : ObjectColumns
        The 3-D objects.
    pictures : tuple of Picture
        Some slices.
    settings, environment : mapping
        Names and values, as they are to be read.
    """

    name: str
    source: str
    shape_zyx: tuple[int, int, int]
    first_z: int
    voxel_size_nm: tuple[float, float, float] | None
    bundle: str
    engine: str
    device: str
    precision: str
    notices: tuple[str, ...]
    seconds: float
    stage_seconds: Mapping[str, float]
    limiting_stage: str
    profiles: ProfileColumns
    objects: ObjectColumns
    pictures: tuple[Picture, ...]
    settings: Mapping[str, str]
    environment: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class ScaleBar:
    """A bar of a round length; `width_px` in px of a picture."""

    width_px: float
    text: str


def write_run_report(path: Path, report: RunReport) -> None:
    """Write the page of a run, whole or not at all.

    Raises
    ------
    StorageError
        Where the file system refuses.
    """
    with published(path) as stream:
        stream.write(render_run_report(report).encode())


def render_run_report(report: RunReport) -> str:
    """Return the page of a run."""
    profiles, voxel = report.profiles, report.voxel_size_nm
    area_unit = 1.0 if voxel is None else voxel[1] * voxel[2] * 1e-6
    volume_unit = 1.0 if voxel is None else voxel[0] * voxel[1] * voxel[2] * 1e-9
    doubtful = np.flatnonzero((profiles.link_confidence > 0) & (profiles.link_confidence < _DOUBTFUL))
    content = {
        "report": report,
        "area_name": "px" if voxel is None else "µm²",
        "volume_name": "voxels" if voxel is None else "µm³",
        "volume_unit": volume_unit,
        "median_area": float(np.median(profiles.area_px)) * area_unit if len(profiles) else float("nan"),
        "charts": _charts(report, area_unit),
        "scale_bars": [scale_bar(picture, voxel) for picture in report.pictures],
        "largest": _table_rows(report.objects, np.argsort(-report.objects.voxels, kind="stable")[:_LISTED]),
        "single_slice_objects": int((report.objects.slices == 1).sum()),
        "unlinked_profiles": int((profiles.link_confidence == 0).sum()),
        "doubtful_count": len(doubtful),
        "doubtful_limit": _DOUBTFUL,
        "doubtful": _table_rows(profiles, doubtful[np.argsort(-profiles.area_px[doubtful], kind="stable")][:_LISTED]),
        "area_unit": area_unit,
    }
    return render_page("run.html.jinja", content)


def scale_bar(picture: Picture, voxel_size_nm: tuple[float, float, float] | None) -> ScaleBar | None:
    """Return the longest bar of 1, 2 or 5 times a power of ten nm that fits; None where the voxel size is unknown."""
    if voxel_size_nm is None:
        return None
    px_nm = voxel_size_nm[2] * picture.reduction
    longest_nm = picture.width_px * px_nm * _BAR_FRACTION
    decade = 10.0 ** np.floor(np.log10(longest_nm))
    length_nm = float(max(step * decade for step in (1, 2, 5) if step * decade <= longest_nm))
    return ScaleBar(length_nm / px_nm, f"{length_nm / 1000:g} µm" if length_nm >= 1000 else f"{length_nm:g} nm")


def _charts(report: RunReport, area_unit: float) -> dict[str, str]:
    """Draw the charts of the page; what needs objects, or more than one slice, is left out where there are none."""
    profiles, depth = report.profiles, report.shape_zyx[0]
    charts = {"stages": stage_bars(report.stage_seconds, report.limiting_stage)}
    if len(profiles):
        unit = "px" if report.voxel_size_nm is None else "µm²"
        charts["areas"] = size_histogram(profiles.area_px * area_unit, f"area of an object in a slice ({unit})")
    if depth == 1:
        return charts
    row = profiles.z - report.first_z
    counts = np.bincount(row, minlength=depth).astype(np.float64)
    z = report.first_z + np.arange(depth)
    charts["counts"] = chart_along_z(z, [Series("objects", counts)], "objects in the slice")
    if len(profiles):
        columns = {
            "detection score": profiles.score,
            "predicted IoU": profiles.predicted_iou,
            "link confidence": profiles.link_confidence,
        }
        with np.errstate(invalid="ignore"):  # 0 / 0 in slices without objects: a gap in the curve
            means = [Series(name, np.bincount(row, values, depth) / counts) for name, values in columns.items()]
        charts["scores"] = chart_along_z(z, means, "mean over the slice", y_limit=1.05)
        charts["extents"] = count_histogram(report.objects.slices, "slices that a 3-D object spans")
    return charts


def _table_rows(table: ProfileColumns | ObjectColumns, rows: NDArray[np.intp]) -> list[dict[str, float]]:
    """Return some rows of a table with the names of its columns."""
    return [{name: getattr(table, name)[row].item() for name in table.__slots__} for row in rows.tolist()]

"""The page of an evaluation: how good the labels are, where along z they are worst, and which objects were lost."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dendsam_deploy.durable import published
from dendsam_deploy.evaluate.score_report import size_class_document, skeleton_document
from dendsam_deploy.report.figures import Series, chart_along_z, fraction_histogram
from dendsam_deploy.report.figures_estimates import Estimate, estimate_curves
from dendsam_deploy.report.page import count_text, render_page
from dendsam_deploy.report.worst_objects import SEGMENT_COLOUR, TRUTH_COLOUR

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dendsam_deploy.evaluate.score_report import Bounds, ScoreReport
    from dendsam_deploy.metrics.size_classes import SizeClass
    from dendsam_deploy.report.worst_objects import ObjectPicture

_LISTED = 10
"""Rows of the tables of slices and objects that came out worst."""

_LOST_IOU = 0.5
"""An object of the truth whose best segment has a lower IoU counts as lost, as in panoptic quality."""

MEANINGS = {
    "oce": "object-level consistency error; 0 is perfect; blind to objects that are missing or extra",
    "e_gs": "its direction from truth to segmentation",
    "e_sg": "its direction from segmentation to truth",
    "pq": "panoptic quality at an IoU of .5 (SQ × DQ)",
    "sq": "segmentation quality: mean IoU of the matched objects",
    "dq": "detection quality: F1 score of the matches",
    "s_inst": "mean of TP / (TP + FP + FN) over IoU .10 to .90",
    "msa": "mean segmentation accuracy, IoU .50 to .95",
    "sa50": "segmentation accuracy at an IoU of .50",
    "sa75": "segmentation accuracy at an IoU of .75",
    "dice": "Dice coefficient of the foreground",
    "vi_split": "variation of information, bits: objects that were cut; 0 is perfect",
    "vi_merge": "variation of information, bits: objects that were joined; 0 is perfect",
    "arand_error": "adapted Rand error; 0 is perfect",
    "arand_precision": "falls when objects are joined",
    "arand_recall": "falls when objects are cut",
    "erl_um": "expected run length along the skeletons, µm: larger is better",
    "erl_longest_um": "the same for a perfect result",
    "erl_share": "the one over the other",
    "erl_correct_um": "length of the skeletons that was found, µm",
    "erl_split_um": "length of edges between two segments, µm",
    "erl_merged_um": "length in segments that hold several skeletons, µm",
    "erl_omitted_um": "length in background, µm",
}
"""What each score says. Where nothing else is said 1 is perfect."""


def write_scores_report(path: Path, report: ScoreReport, pictures: Sequence[ObjectPicture] = ()) -> None:
    """Write the page of an evaluation, whole or not at all.

    Parameters
    ----------
    path : Path
        The file.
    report : ScoreReport
        The scores.
    pictures : sequence of ObjectPicture
        The worst objects, see `worst_objects.draw_worst_objects`; none where no micrographs are at hand.

    Raises
    ------
    StorageError
        Where the file system refuses.
    """
    with published(path) as stream:
        stream.write(render_scores_report(report, pictures).encode())


def render_scores_report(report: ScoreReport, pictures: Sequence[ObjectPicture] = ()) -> str:
    """Return the page of an evaluation."""
    lost = [row for row in report.per_object if row.iou < _LOST_IOU]
    content = {
        "report": report,
        "labels_name": Path(report.labels).name,
        "truth_name": Path(report.truth).name,
        "rows": _score_rows(report),
        "has_intervals": bool(report.intervals.slices),
        "size_tables": _size_tables(report),
        "pictures": pictures,
        "truth_colour": ", ".join(map(str, TRUTH_COLOUR.tolist())),
        "segment_colour": ", ".join(map(str, SEGMENT_COLOUR.tolist())),
        "charts": _charts(report),
        "worst_slices": sorted(report.per_slice, key=lambda row: (row.scores.pq, row.z))[:_LISTED],
        "lost": sorted(lost, key=lambda row: (-row.voxels, row.z or 0, row.truth_id))[:_LISTED],
        "lost_count": len(lost),
        "lost_iou": _LOST_IOU,
    }
    return render_page("scores.html.jinja", content)


def _score_rows(report: ScoreReport) -> list[dict[str, object]]:
    """Return name, value for the volume, mean over slices (where there is one), intervals and meaning of each score."""
    volume = asdict(report.volume.objects) | asdict(report.volume.partition)
    volume |= {} if report.skeletons is None else skeleton_document(report.skeletons)
    slices = asdict(report.slices)
    return [
        {
            "name": name,
            "volume": value,
            "volume_interval": interval_text(report.intervals.volume.get(name)),
            "mean": slices.get(name),
            "mean_interval": interval_text(report.intervals.slices.get(name)),
            "meaning": MEANINGS[name],
        }
        for name, value in volume.items()
    ]


def interval_text(bounds: Bounds | None) -> str:
    """Write an interval; nothing where there is none.

    Examples
    --------
    >>> interval_text((0.42, 0.5))
    '.420 to .500'
    """
    return "" if bounds is None else " to ".join(f"{end:.3f}".removeprefix("0") for end in bounds)


def _span(bounds: Bounds) -> str:
    """Write an interval where there is little room."""
    return interval_text(bounds).replace(" to ", "–")


def _size_tables(report: ScoreReport) -> list[tuple[str, list[tuple[str, SizeClass, dict[str, str]]]]]:
    """Return title, and limits, scores and intervals of each class, for 2-D objects and for those of the volume."""
    tables = []
    for title, classes, axes in (
        ("2-D objects by size", report.size_classes.slices, 2),
        ("Objects of the volume by size", report.size_classes.volume, 3),
    ):
        if classes:
            ends = [{name: _span(bounds) for name, bounds in row.intervals.items()} for row in classes]
            words = [size_text(row, report.voxel_size_nm, axes) for row in classes]
            tables.append((title, list(zip(words, classes, ends, strict=True))))
    return tables


def size_text(row: SizeClass, voxel_size_nm: tuple[float, float, float] | None, axes: int) -> str:
    """Write the limits of a class in px or voxels and, where these have a size, as diameters."""
    document = size_class_document(row, voxel_size_nm, axes)
    unit = "px" if axes == 2 else "voxels"

    def limit(end: str) -> str:
        diameter = document[f"{end}_diameter_nm"]
        known = "" if diameter is None else f" (⌀ {diameter:.0f} nm)"
        return f"{count_text(document[f'{end}_px'])} {unit}{known}"

    if row.low_px is None and row.high_px is None:
        return "all"
    if row.low_px is None:
        return f"below {limit('high')}"
    return f"from {limit('low')}" if row.high_px is None else f"{limit('low')} to {limit('high')}"


def _charts(report: ScoreReport) -> dict[str, str]:
    """Draw the charts of the page; those along z are left out where there is one slice only."""
    charts = {}
    if report.per_object:
        best = np.array([row.iou for row in report.per_object])
        charts["iou"] = fraction_histogram(best, "IoU of an object of the truth with its best segment")
    if report.accuracy.thresholds:
        sides = {"volume": report.accuracy.volume, "slices": report.accuracy.slices}
        curves = {
            name: {t: Estimate(s, s, s) for t, s in zip(report.accuracy.thresholds, values, strict=True)}
            for name, values in sides.items()
        }
        charts["accuracy"] = estimate_curves(curves, "IoU threshold t", "S(t)", {})
    if len(report.per_slice) == 1:
        return charts
    z = np.array([row.z for row in report.per_slice], np.int64)
    counts = [
        Series("truth", np.array([float(row.truth_objects) for row in report.per_slice])),
        Series("segmentation", np.array([float(row.segments) for row in report.per_slice])),
    ]
    return {
        **charts,
        "quality": chart_along_z(z, _curves(report, {"pq": "PQ", "sq": "SQ", "dq": "DQ"}), "quality", y_limit=1.05),
        "consistency": chart_along_z(
            z, _curves(report, {"e_gs": "E_gs", "e_sg": "E_sg", "oce": "OCE"}), "error", y_limit=1.05
        ),
        "counts": chart_along_z(z, counts, "objects in the slice"),
    }


def _curves(report: ScoreReport, labels: dict[str, str]) -> list[Series]:
    """Return some scores along z, by their names and the labels that they get."""
    return [
        Series(label, np.array([getattr(row.scores, name) for row in report.per_slice]))
        for name, label in labels.items()
    ]

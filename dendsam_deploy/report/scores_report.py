"""The page of an evaluation: how good the labels are, where along z they are worst, and which objects were lost."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dendsam_deploy.durable import published
from dendsam_deploy.metrics.summary import ObjectScores, PartitionScores
from dendsam_deploy.report.figures import Series, chart_along_z, fraction_histogram
from dendsam_deploy.report.page import render_page

if TYPE_CHECKING:
    from dendsam_deploy.evaluate.scores import ScoreReport

_LISTED = 10
"""Rows of the tables of slices and objects that came out worst."""

_LOST_IOU = 0.5
"""An object of the truth whose best segment has a lower IoU counts as lost, as in panoptic quality."""

_MEANINGS = {
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
}
"""What each score says. Where nothing else is said 1 is perfect."""


def write_scores_report(path: Path, report: ScoreReport) -> None:
    """Write the page of an evaluation, whole or not at all.

    Raises
    ------
    StorageError
        Where the file system refuses.
    """
    with published(path) as stream:
        stream.write(render_scores_report(report).encode())


def render_scores_report(report: ScoreReport) -> str:
    """Return the page of an evaluation."""
    lost = [row for row in report.per_object if row.iou < _LOST_IOU]
    content = {
        "report": report,
        "labels_name": Path(report.labels).name,
        "truth_name": Path(report.truth).name,
        "rows": _score_rows(report),
        "charts": _charts(report),
        "worst_slices": sorted(report.per_slice, key=lambda row: (row.scores.pq, row.z))[:_LISTED],
        "lost": sorted(lost, key=lambda row: (-row.voxels, row.z or 0, row.truth_id))[:_LISTED],
        "lost_count": len(lost),
        "lost_iou": _LOST_IOU,
    }
    return render_page("scores.html.jinja", content)


def _score_rows(report: ScoreReport) -> list[tuple[str, float, float | None, str]]:
    """Return name, value for the volume, mean over slices (where there is one) and meaning of each score."""
    objects = [
        (field.name, getattr(report.volume.objects, field.name), getattr(report.slices, field.name))
        for field in fields(ObjectScores)
    ]
    partition = [(field.name, getattr(report.volume.partition, field.name), None) for field in fields(PartitionScores)]
    return [(name, volume, mean, _MEANINGS[name]) for name, volume, mean in (*objects, *partition)]


def _charts(report: ScoreReport) -> dict[str, str]:
    """Draw the charts of the page; those along z are left out where there is one slice only."""
    charts = {}
    if report.per_object:
        best = np.array([row.iou for row in report.per_object])
        charts["iou"] = fraction_histogram(best, "IoU of an object of the truth with its best segment")
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

"""The page of rounds: the held-out scores of each round, what taught it, and whether it was worth it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dendsam_deploy.durable import published
from dendsam_deploy.evaluate.compare_scores import bootstrap_interval
from dendsam_deploy.report.figures import Curve, course_chart
from dendsam_deploy.report.page import render_page

if TYPE_CHECKING:
    from pathlib import Path

    from dendsam_deploy.evaluate.rounds_record import RoundsResult


def write_rounds_report(path: Path, result: RoundsResult) -> None:
    """Write the page of rounds, whole or not at all.

    Raises
    ------
    StorageError
        Where the file system refuses.
    """
    with published(path) as stream:
        stream.write(render_rounds_report(result).encode())


def render_rounds_report(result: RoundsResult) -> str:
    """Return the page of rounds."""
    numbers = np.array([record.number for record in result.records], np.float64)
    curves = [
        Curve("IoU from exact boxes", numbers, np.array([record.score for record in result.records])),
        Curve("PQ of the automatic result", numbers, np.array([record.automatic for record in result.records])),
    ]
    differences = [np.array(record.box_iou) - np.array(result.records[0].box_iou) for record in result.records[1:]]
    content = {
        "result": result,
        "verdict": result.verdict(),
        "charts": {"scores": course_chart(curves, "round", "held-out score", float(result.best.number), "fraction")},
        "gains": [None, *((float(gain.mean()), *bootstrap_interval(gain)) for gain in differences)],
    }
    return render_page("rounds.html.jinja", content)

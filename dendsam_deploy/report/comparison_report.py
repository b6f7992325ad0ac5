"""The page of a comparison: the paper's table, plots, pictures, and quality against box error."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dendsam_deploy.durable import published, storage_errors, write_text
from dendsam_deploy.errors import InvalidArgumentError
from dendsam_deploy.evaluate.box_error_curve import CURVE_SCORE
from dendsam_deploy.evaluate.comparison_report import SOURCE_TITLES
from dendsam_deploy.report.figures_estimates import Estimate, estimate_curves, estimate_dots
from dendsam_deploy.report.overlays import outlines
from dendsam_deploy.report.page import render_page
from dendsam_deploy.report.score_tables import csv_text
from dendsam_deploy.report.scores_report import MEANINGS, interval_text, size_text
from dendsam_deploy.report.worst_objects import SEGMENT_COLOUR, TRUTH_COLOUR
from dendsam_deploy.volume.raster import encode_png, resize_bilinear

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dendsam_deploy.evaluate.box_error_curve import BoxErrorCurve
    from dendsam_deploy.evaluate.comparison_report import Comparison, ComparisonRow, RelativeChange, ShownSlice
    from dendsam_deploy.metrics.size_classes import SizeClass

TABLE_SCORES = ("oce", "pq", "sq", "dq", "s_inst", "msa", "sa50", "sa75", "dice")
"""Columns of the table."""

_PLOTTED = ("s_inst", "pq")
_SMALLEST_PICTURE_PX = 420


def write_comparison_report(path: Path, comparison: Comparison) -> None:
    """Write the page of a comparison, whole or not at all.

    Raises
    ------
    StorageError
        Where the file system refuses.
    """
    with published(path) as stream:
        stream.write(render_comparison_report(comparison).encode())


def render_comparison_report(comparison: Comparison) -> str:
    """Return the page of a comparison."""
    content = {
        "comparison": comparison,
        "volume_name": Path(comparison.volume).name,
        "truth_name": Path(comparison.truth).name,
        "scores": TABLE_SCORES,
        "meanings": {name: MEANINGS[name] for name in TABLE_SCORES},
        "tables": [(bundle, _table(comparison, bundle.name)) for bundle in comparison.bundles],
        "charts": _charts(comparison),
        "size_tables": [(bundle, _size_table(comparison, bundle.name)) for bundle in comparison.bundles],
        "grids": [(row, row.grid) for row in comparison.rows if row.grid is not None],
        "pictures": [] if comparison.shown is None else _pictures(comparison.shown),
        "truth_colour": ", ".join(map(str, TRUTH_COLOUR.tolist())),
        "segment_colour": ", ".join(map(str, SEGMENT_COLOUR.tolist())),
    }
    return render_page("comparison.html.jinja", content)


def write_comparison_table(path: Path, comparison: Comparison) -> None:
    """Write the table as a CSV file, one row for each bundle and prompt source.

    Raises
    ------
    InvalidArgumentError
        The path is a folder.
    StorageError
        Where the file system refuses.
    """
    if path.is_dir():
        raise InvalidArgumentError(f"{path}: is a folder, expected the name of a CSV file")
    rows = []
    for row in comparison.rows:
        line: dict[str, object] = {"bundle": row.bundle, "prompts": row.prompts}
        for name, value in asdict(row.report.slices).items():
            low, high = row.report.intervals.slices.get(name, (None, None))
            change = row.relative.get(name)
            line |= {name: value, f"{name}_low": low, f"{name}_high": high}
            line[f"{name}_relative_percent"] = None if change is None else change.percent
            line[f"{name}_relative_low"] = None if change is None else change.low
            line[f"{name}_relative_high"] = None if change is None else change.high
        rows.append(line | asdict(row.report.volume.partition) | {"seconds_per_slice": row.seconds_per_slice})
    with storage_errors(path):
        write_text(path, csv_text(rows))


def change_text(change: RelativeChange | None) -> str:
    """Write a relative change the way the paper does, such as ``+19.1 %``; nothing where there is none."""
    return "" if change is None or change.percent is None else f"{change.percent:+.1f} %"


def _change_interval(change: RelativeChange | None) -> tuple[str, ...]:
    """Write the ends of the interval of a relative change; nothing where there is none."""
    return () if change is None or change.low is None else (f"{change.low:+.1f}", f"{change.high:+.1f}")


def _size_table(comparison: Comparison, bundle: str) -> list[tuple[str, str, SizeClass]]:
    """Return the size, the prompts and the scores of each class of 2-D objects of one bundle, the smallest first."""
    own = [row for row in comparison.rows if row.bundle == bundle]
    table = [
        (place, size_text(scores, row.report.voxel_size_nm, 2), SOURCE_TITLES[row.prompts], scores)
        for row in own
        for place, scores in enumerate(row.report.size_classes.slices)
    ]
    return [line[1:] for line in sorted(table, key=lambda line: line[0])]


def _table(comparison: Comparison, bundle: str) -> list[tuple[str, ComparisonRow, list[dict[str, object]]]]:
    """Return title, row and cells of one bundle."""
    table = []
    for row in comparison.rows:
        if row.bundle != bundle:
            continue
        values = asdict(row.report.slices)
        cells: list[dict[str, object]] = [
            {
                "value": f"{values[name]:.3f}",
                "interval": interval_text(row.report.intervals.slices.get(name)).replace(" to ", "–"),
                "change": change_text(row.relative.get(name)),
                "change_interval": _change_interval(row.relative.get(name)),
            }
            for name in TABLE_SCORES
        ]
        table.append((SOURCE_TITLES[row.prompts], row, cells))
    return table


def _charts(comparison: Comparison) -> dict[str, str]:
    """Draw the charts."""
    charts = {}
    for name in _PLOTTED:
        groups: dict[str, dict[str, Estimate]] = {}
        for row in comparison.rows:
            value = getattr(row.report.slices, name)
            ends = row.report.intervals.slices.get(name, (value, value))
            groups.setdefault(row.bundle, {})[SOURCE_TITLES[row.prompts]] = Estimate(value, *ends)
        charts[name] = estimate_dots(groups, f"{name}, mean over slices")
    if comparison.curves:
        charts["curve"] = estimate_curves(
            {curve.bundle: _curve(curve) for curve in comparison.curves},
            "largest offset of a box's edge, % of its side",
            f"{CURVE_SCORE}, mean over slices",
            {curve.bundle: mark for curve in comparison.curves if (mark := _mark(curve)) is not None},
        )
    return charts


def _curve(curve: BoxErrorCurve) -> dict[float, Estimate]:
    """Return the points of a curve, x in per cent."""
    points = {}
    for point in curve.points:
        value = getattr(point.scores, CURVE_SCORE)
        points[100 * point.jitter] = Estimate(value, *point.intervals.get(CURVE_SCORE, (value, value)))
    return points


def _mark(curve: BoxErrorCurve) -> tuple[float, float] | None:
    """Return where a detector's measured box error lies on its curve."""
    jitter = None if curve.detector is None else curve.detector.equivalent_jitter
    return None if jitter is None else (100 * jitter, curve.at(jitter))


def _pictures(shown: ShownSlice) -> list[tuple[str, str, bytes]]:
    """Return bundle, title and PNG file of each label map over the micrograph."""
    return [
        (bundle, SOURCE_TITLES[source], draw_outlines(shown.image, shown.truth, labels))
        for (bundle, source), labels in shown.labels.items()
    ]


def draw_outlines(image: NDArray[np.uint8], truth: NDArray[np.uint32], labels: NDArray[np.uint32]) -> bytes:
    """Draw the outlines of the truth, and over them those of a segmentation, on a micrograph; return a PNG file.

    Parameters
    ----------
    image : ndarray, shape (Y, X), uint8
        The micrograph; small ones are enlarged.
    truth, labels : ndarray, shape (Y, X), uint32
        The objects of both sides.
    """
    factor = max(1, -(-_SMALLEST_PICTURE_PX // max(image.shape)))
    height, width = image.shape
    grey = image if factor == 1 else resize_bilinear(np.ascontiguousarray(image), (height * factor, width * factor))
    picture = np.repeat(grey[:, :, None], 3, axis=2)
    for objects, colour in ((truth, TRUTH_COLOUR), (labels, SEGMENT_COLOUR)):
        picture[outlines(np.repeat(np.repeat(objects, factor, 0), factor, 1))] = colour
    return encode_png(picture)

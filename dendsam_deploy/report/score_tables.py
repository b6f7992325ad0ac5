"""The scores as CSV files, for spreadsheets and for statistics programs."""

from __future__ import annotations

import csv
import io
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from dendsam_deploy.durable import storage_errors, write_text
from dendsam_deploy.errors import InvalidArgumentError
from dendsam_deploy.evaluate.score_report import size_class_document, skeleton_document

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from dendsam_deploy.evaluate.score_report import ScoreReport


def write_score_tables(folder: Path, report: ScoreReport) -> tuple[Path, ...]:
    """Write scores, slices, objects, accuracy by threshold and size classes, a CSV file each, into a folder.

    Parameters
    ----------
    folder : Path
        Made where it does not exist; files of these names are replaced.
    report : ScoreReport
        The scores.

    Raises
    ------
    InvalidArgumentError
        The folder is a file.
    StorageError
        The file system refuses.
    """
    if folder.exists() and not folder.is_dir():
        raise InvalidArgumentError(f"{folder}: is a file, expected a folder for the tables; choose another name")
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    tables = {
        "scores.csv": _score_rows(report),
        "per_slice.csv": [
            {"z": row.z, "truth_objects": row.truth_objects, "segments": row.segments, **asdict(row.scores)}
            for row in report.per_slice
        ],
        "per_object.csv": [asdict(row) for row in report.per_object],
        "accuracy.csv": [
            {"iou_threshold": threshold, "volume": volume, "slices": slices}
            for threshold, volume, slices in zip(
                report.accuracy.thresholds, report.accuracy.volume, report.accuracy.slices, strict=True
            )
        ],
        "size_classes.csv": [
            {"of": name, **_flat(size_class_document(row, report.voxel_size_nm, axes))}
            for name, rows, axes in (
                ("slices", report.size_classes.slices, 2),
                ("volume", report.size_classes.volume, 3),
            )
            for row in rows
        ],
    }
    for name, rows in tables.items():
        write_text(folder / name, csv_text(rows))
    return tuple(folder / name for name in tables)


def _flat(document: dict[str, Any]) -> dict[str, Any]:
    """Write the intervals of a size class into columns of their own."""
    intervals = document.pop("intervals")
    for name, ends in intervals.items():
        document |= dict(zip((f"{name}_low", f"{name}_high"), ends, strict=True))
    return document


def csv_text(rows: Iterable[Mapping[str, object]]) -> str:
    """Write rows as CSV with a heading: the columns of all rows, in the order in which they first appear.

    Numbers are written in full, and None as an empty cell.
    """
    rows = tuple(rows)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    stream = io.StringIO()
    writer = csv.DictWriter(stream, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def _score_rows(report: ScoreReport) -> list[dict[str, object]]:
    """Return one row for each score: of the volume and of the slices, with their intervals."""
    volume = asdict(report.volume.objects) | asdict(report.volume.partition)
    volume |= {} if report.skeletons is None else skeleton_document(report.skeletons)
    slices = asdict(report.slices)
    rows = []
    for name, value in volume.items():
        low, high = report.intervals.volume.get(name, (None, None))
        slices_low, slices_high = report.intervals.slices.get(name, (None, None))
        rows.append(
            {
                "score": name,
                "volume": value,
                "volume_low": low,
                "volume_high": high,
                "slices": slices.get(name),
                "slices_low": slices_low,
                "slices_high": slices_high,
            }
        )
    return rows

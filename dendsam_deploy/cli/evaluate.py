"""``evaluate``: scores of a label volume against the truth."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import click

from dendsam_deploy.cli.console import CheckFailedError
from dendsam_deploy.cli.options import HTML_FILE, PATH, SLICES, VOXEL_SIZE, Settings, command, json_option, word
from dendsam_deploy.errors import InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from dendsam_deploy.cli.console import Console

SETTINGS = Settings("dendsam_deploy.evaluate.score_report:EvaluateOptions")


def read_bound(text: str) -> tuple[str, float]:
    """Read ``KEY=VALUE``, a score and a number that it is compared with."""
    key, _, number = text.partition("=")
    try:
        bound = float(number)
    except ValueError:
        bound = math.nan
    if not math.isfinite(bound):
        raise click.BadParameter(f"{text!r} is no bound, expected KEY=VALUE such as slices.pq=0.8")
    return key, bound


BOUND = word("KEY=VALUE", read_bound)


@command("evaluate", "evaluate ca1.dendsam/labels.tif ca1-truth.tif --slices 80:100 --min slices.pq=0.8")
@click.argument("labels", type=PATH)
@click.argument("truth", type=PATH)
@SETTINGS.option("--slices", "slices", SLICES, "Score only these slices.")
@SETTINGS.option("--ignore-label", "ignore_labels", [int], "Label of the truth that is not judged. Repeatable.")
@SETTINGS.flag(
    "--sparse-truth", "sparse_truth", "The truth shows only some objects: leave out segments that meet none."
)
@SETTINGS.flag("--as-2d", "as_2d", "Labels hold for one slice only.")
@SETTINGS.option(
    "--size-limit",
    "size_limits_px",
    [click.IntRange(1)],
    "Area, px, at which a size class begins. Repeatable.",
)
@SETTINGS.option("--skeletons", "skeletons", PATH, "SWC file or folder, micrometres: adds the expected run length.")
@SETTINGS.option("--voxel-size", "voxel_size_nm", VOXEL_SIZE, "nm, in place of what the files record.")
@SETTINGS.option("--resamples", "resamples", click.IntRange(0), "Draws of slices behind each interval; 0: none.")
@SETTINGS.option("--seed", "seed", click.IntRange(0), "Decides about the draws.")
@click.option("--min", "least", type=BOUND, multiple=True, help="Exit 1 if a score is lower. Repeatable.")
@click.option("--max", "most", type=BOUND, multiple=True, help="Exit 1 if an error is higher. Repeatable.")
@click.option("--report", "page", type=HTML_FILE, metavar="FILE", help="Write the scores as an HTML page, too.")
@click.option("--volume", "volume", type=PATH, metavar="PATH", help="Micrographs, to show the worst objects on.")
@click.option("--csv", "tables", type=PATH, metavar="DIR", help="Write the scores as CSV tables into this folder, too.")
@json_option
@click.pass_context
def evaluate(
    context: click.Context,
    labels: Path,
    truth: Path,
    *,
    least: tuple[tuple[str, float], ...],
    most: tuple[tuple[str, float], ...],
    page: Path | None,
    volume: Path | None,
    tables: Path | None,
    json_file: Path | None,
) -> None:
    """Score LABELS against TRUTH.

    The scores are those of the volume, and the means over slices, with the intervals that hold them in 95 of 100 draws
    of the slices. A KEY of --min and --max is volume.NAME or slices.NAME, with the names that --json uses; a bare NAME
    means the volume. Expected run length: segments that hold several skeletons count as wrong all along them.
    """
    from dendsam_deploy.evaluate.score_report import EvaluateOptions
    from dendsam_deploy.evaluate.scores import evaluate_labels
    from dendsam_deploy.report.score_tables import write_score_tables
    from dendsam_deploy.report.scores_report import write_scores_report
    from dendsam_deploy.report.worst_objects import draw_worst_objects

    if volume is not None and page is None:
        raise InvalidArgumentError(f"--volume {volume} is shown on the page of scores; name that with --report FILE")
    check_keys((key for key, _ in (*least, *most)), with_skeletons="skeletons" in SETTINGS.given(context))
    settings = SETTINGS.given(context)
    if "slices" in settings:
        settings["slices"] = range(*settings["slices"])
    console: Console = context.obj
    with console.progress() as progress:
        report = evaluate_labels(labels, truth, EvaluateOptions(**settings), progress)
    if page is not None:
        pictures = () if volume is None else draw_worst_objects(report, volume, truth, labels)
        write_scores_report(page, report, pictures)
    if tables is not None:
        write_score_tables(tables, report)
    document = report.to_document()
    console.result(score_table(document), document, json_file)
    if missed := missed_bounds(document, least, most):
        raise CheckFailedError("; ".join(missed))


def score_table(document: dict[str, Any]) -> str:
    """Write the scores of the volume and the means over slices side by side.

    Parameters
    ----------
    document : dict
        As `ScoreReport.to_document` makes it.
    """
    volume, slices, intervals = document["volume"], document["slices"], document["intervals"]
    has_intervals = bool(intervals["slices"])
    heads = [f"{side:>9}{'95 %':>18}" if has_intervals else f"{side:>9}" for side in ("volume", "slices")]
    rows = [f"{'score':<16}{''.join(heads)}"]
    for name, value in volume.items():
        if isinstance(value, float):
            whole = f"{value:9.4f}{_ends(intervals['volume'].get(name)) if has_intervals else ''}"
            mean = f"{slices[name]:9.4f}{_ends(intervals['slices'].get(name))}" if name in slices else ""
            rows.append(f"{name:<16}{whole}{mean}".rstrip())
    rows.append(
        f"{volume['segments']} segments, {volume['truth_objects']} objects in the truth, "
        f"{len(document['per_slice'])} slices scored"
    )
    if document["options"]["sparse_truth"]:
        rows.append(f"sparse truth: {document['segments_left_out']} segments that touch no object of it are left out")
    rows += _class_rows(document["size_classes"]["slices"])
    return "\n".join(rows)


def _ends(interval: list[float] | None) -> str:
    """Write an interval in a column of its own."""
    return " " * 18 if interval is None else f"  {interval[0]:7.4f} {interval[1]:7.4f} "


def _class_rows(classes: list[dict[str, Any]]) -> list[str]:
    """Write one line for each class of 2-D objects, the smallest first; none where there is but one class."""
    if len(classes) < 2:
        return []
    rows = [f"{'2-D objects, px':<16}{'objects':>9}{'found':>9}{'extra':>9}{'pq':>9}{'s_inst':>9}"]
    for row in classes:
        low, high = row["low_px"], row["high_px"]
        limits = f"from {low}" if high is None else f"below {high}" if low is None else f"{low} to {high}"
        counts = f"{row['truth_objects']:9d}{row['found']:9d}{row['extra_segments']:9d}"
        rows.append(f"{limits:<16}{counts}{row['pq']:9.4f}{row['s_inst']:9.4f}")
    return rows


def missed_bounds(
    document: dict[str, Any], least: Iterable[tuple[str, float]], most: Iterable[tuple[str, float]]
) -> list[str]:
    """Return a phrase for each score below its lower bound or above its upper one."""
    low = [
        f"{key} is {_score(document, key):.4f}, expected at least {b:g}"
        for key, b in least
        if not _score(document, key) >= b
    ]
    high = [
        f"{key} is {_score(document, key):.4f}, expected at most {b:g}"
        for key, b in most
        if not _score(document, key) <= b
    ]
    return low + high


def check_keys(keys: Iterable[str], *, with_skeletons: bool = False) -> None:
    """Raise for a key that no score has.

    Raises
    ------
    InvalidArgumentError
        Lists the scores.
    """
    from dendsam_deploy.metrics.summary import ObjectScores, PartitionScores

    of_objects, of_partition = ([field.name for field in fields(kind)] for kind in (ObjectScores, PartitionScores))
    along_skeletons = ["erl_um", "erl_share"] if with_skeletons else []
    known = {"slices": of_objects, "volume": [*of_objects, *of_partition, *along_skeletons]}
    for key in keys:
        part, _, name = key.rpartition(".")
        if name not in known.get(part or "volume", ()):
            raise InvalidArgumentError(
                f"there is no score {key!r}; give volume.NAME or slices.NAME with NAME one of {', '.join(of_objects)}, "
                f"or for the volume also one of {', '.join(of_partition)} (with --skeletons erl_um, erl_share)"
            )


def _score(document: dict[str, Any], key: str) -> float:
    """Return the score that a key names."""
    part, _, name = key.rpartition(".")
    value: float = document[part or "volume"][name]
    return value

"""``evaluate``: scores of a label volume against the truth."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import click

from dendsam_deploy.cli.console import CheckFailedError
from dendsam_deploy.cli.options import HTML_FILE, PATH, SLICES, Settings, command, json_option, word
from dendsam_deploy.errors import InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from dendsam_deploy.cli.console import Console

SETTINGS = Settings("dendsam_deploy.evaluate.scores:EvaluateOptions")


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
@click.option("--min", "least", type=BOUND, multiple=True, help="Exit 1 if a score is lower. Repeatable.")
@click.option("--max", "most", type=BOUND, multiple=True, help="Exit 1 if an error is higher. Repeatable.")
@click.option("--report", "page", type=HTML_FILE, metavar="FILE", help="Write the scores as an HTML page, too.")
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
    json_file: Path | None,
) -> None:
    """Score LABELS against TRUTH.

    The scores are those of the volume, and the means over slices. A KEY of --min and --max is volume.NAME or
    slices.NAME, with the names that --json uses; a bare NAME means the volume.
    """
    from dendsam_deploy.evaluate.scores import EvaluateOptions, evaluate_labels
    from dendsam_deploy.report.scores_report import write_scores_report

    check_keys(key for key, _ in (*least, *most))
    settings = SETTINGS.given(context)
    if "slices" in settings:
        settings["slices"] = range(*settings["slices"])
    console: Console = context.obj
    with console.progress() as progress:
        report = evaluate_labels(labels, truth, EvaluateOptions(**settings), progress)
    if page is not None:
        write_scores_report(page, report)
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
    volume, slices = document["volume"], document["slices"]
    rows = [f"{'score':<16}{'volume':>9}{'slices':>9}"]
    for name, value in volume.items():
        if isinstance(value, float):
            mean = f"{slices[name]:9.4f}" if name in slices else ""
            rows.append(f"{name:<16}{value:9.4f}{mean}")
    rows.append(
        f"{volume['segments']} segments, {volume['truth_objects']} objects in the truth, "
        f"{len(document['per_slice'])} slices scored"
    )
    return "\n".join(rows)


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


def check_keys(keys: Iterable[str]) -> None:
    """Raise for a key that no score has.

    Raises
    ------
    InvalidArgumentError
        Lists the scores.
    """
    from dendsam_deploy.metrics.summary import ObjectScores, PartitionScores

    of_objects, of_partition = ([field.name for field in fields(kind)] for kind in (ObjectScores, PartitionScores))
    known = {"slices": of_objects, "volume": [*of_objects, *of_partition]}
    for key in keys:
        part, _, name = key.rpartition(".")
        if name not in known.get(part or "volume", ()):
            raise InvalidArgumentError(
                f"there is no score {key!r}; give volume.NAME or slices.NAME with NAME one of {', '.join(of_objects)}, "
                f"or for the volume also one of {', '.join(of_partition)}"
            )


def _score(document: dict[str, Any], key: str) -> float:
    """Return the score that a key names."""
    part, _, name = key.rpartition(".")
    value: float = document[part or "volume"][name]
    return value

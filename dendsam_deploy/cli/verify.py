"""``verify``: whether a bundle does what its weights did."""

from __future__ import annotations

import math
from itertools import groupby
from typing import TYPE_CHECKING

import click

from dendsam_deploy.cli.console import CheckFailedError
from dendsam_deploy.cli.options import PATH, RUNTIME, SLICES, Settings, command, json_option, runtime_options

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from dendsam_deploy.bundle.parity import Combination, ParityReport, ParityRow
    from dendsam_deploy.cli.console import Console

SETTINGS = Settings("dendsam_deploy.evaluate.parity:VerifyOptions")

_METRIC_WIDTH = 36


@command("verify", "verify exports/ca1")
@click.argument("bundle", type=PATH)
@SETTINGS.option("--sam", "sam", PATH, "SAM checkpoint to run beside the graphs.  [default: its stored outputs]")
@SETTINGS.option("--detector", "detector", PATH, "Detector checkpoint, likewise.  [default: its stored outputs]")
@SETTINGS.option("--volume", "volume", PATH, "Volume with ground truth: what the deployment costs in scores.")
@SETTINGS.option("--truth", "truth", PATH, "Its ground truth.")
@SETTINGS.option("--slices", "slices", SLICES, "Slices of it to score.  [default: eight spread evenly]")
@runtime_options
@json_option
@click.pass_context
def verify(context: click.Context, bundle: Path, json_file: Path | None) -> None:
    """Compare the graphs of BUNDLE with the original weights.

    Every engine of this machine and every precision of the bundle is judged, one after the other, unless --engine,
    --device or --precision name some. Without checkpoints the graphs are compared with what the original modules
    returned when the bundle was exported; torch is not needed for that. The table shows the worst value of each
    number, with -v every value. Exit code 1 if a limit is broken.
    """
    from dendsam_deploy.evaluate.parity import VerifyOptions, verify_bundle
    from dendsam_deploy.runtimes.session import SessionOptions

    console: Console = context.obj
    with console.progress() as progress:
        wishes = SessionOptions(**RUNTIME.given(context), progress=progress)
        options = VerifyOptions(session=wishes, **SETTINGS.given(context))
        report = verify_bundle(bundle, options, progress)
    console.result(parity_table(report, in_full=console.verbosity > 0), report.to_document(), json_file)
    if not report.passed:
        raise CheckFailedError(f"{bundle}: {len(report.failures)} of {len(report.rows)} comparisons break their limit")


def parity_table(report: ParityReport, *, in_full: bool = False) -> str:
    """Write one table for each precision, with a column for each engine, and a verdict on each combination.

    Parameters
    ----------
    report : ParityReport
        What was found.
    in_full : bool
        Write every number; by default only the worst of those that differ in nothing but, say, the number of boxes.
    """
    lines: list[str] = []
    for precision, several in groupby(sorted(report.combinations, key=_precision_rank), key=lambda c: c.precision):
        columns = list(several)
        names = "".join(f"{f'{engine} {device}':>20}" for engine, device, _ in columns)
        lines.append(f"{precision:<6}{'graph':<14}{'metric':<{_METRIC_WIDTH}}{'limit':>10}{names}")
        lines += _table_of_precision(report, columns, in_full=in_full)
        lines.append("")
    lines += [_verdict(report, combination) for combination in report.combinations]
    lines += [f"{row.combination}: not judged, {row.reason}" for row in report.not_judged]
    return "\n".join(lines)


def _table_of_precision(report: ParityReport, columns: Sequence[Combination], *, in_full: bool) -> list[str]:
    """Write the rows of the combinations of one precision side by side."""
    cells: dict[tuple[int, str, str], dict[Combination, list[ParityRow]]] = {}
    for row in report.rows:
        if row.combination in columns:
            name = row.metric if in_full else row.metric.partition(":")[0]
            cells.setdefault((row.level, row.graph, name), {}).setdefault(row.combination, []).append(row)
    lines = []
    for (level, graph, name), by_combination in cells.items():
        worst = {combination: max(rows, key=_badness) for combination, rows in by_combination.items()}
        any_row = next(iter(worst.values()))
        limit = "" if any_row.limit is None else f"{any_row.limit:.6g}"
        values = "".join(f"{_cell(worst.get(combination)):>20}" for combination in columns)
        mark = "" if all(row.passed for row in worst.values()) else "  FAILED"
        lines.append(f"{level:<6}{graph:<14}{name:<{_METRIC_WIDTH}}{limit:>10}{values}{mark}".rstrip())
    return lines


def _precision_rank(combination: Combination) -> int:
    """Return the place of a combination's precision, the most exact first."""
    from dendsam_deploy.bundle.manifest import PRECISIONS

    return PRECISIONS.index(combination.precision)


def _badness(row: ParityRow) -> tuple[bool, float]:
    """Return a number that grows with how bad a row is."""
    from dendsam_deploy.evaluate.limits import METRICS

    if not math.isfinite(row.value):
        return not row.passed, math.inf
    return not row.passed, -row.value if METRICS[row.metric.partition(":")[0]].sense == "at least" else row.value


def _cell(row: ParityRow | None) -> str:
    """Write a value; one beyond its limit gets a mark, as several engines may stand in a line."""
    if row is None:
        return "-"
    return f"{row.value:.6g}{'' if row.passed else ' !'}"


def _verdict(report: ParityReport, combination: Combination) -> str:
    """Say whether a combination kept its limits."""
    judged = sum(row.limit is not None for row in report.rows if row.combination == combination)
    failed = len(report.failures_of(*combination))
    return f"{combination}: {f'{failed} of {judged} limits broken' if failed else f'all {judged} limits kept'}"

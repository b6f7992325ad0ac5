"""``verify``: whether a bundle does what its weights did."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from dendsam_deploy.cli.console import CheckFailedError
from dendsam_deploy.cli.options import PATH, RUNTIME, Settings, command, json_option, runtime_options

if TYPE_CHECKING:
    from pathlib import Path

    from dendsam_deploy.bundle.parity import ParityReport, ParityRow
    from dendsam_deploy.cli.console import Console

SETTINGS = Settings("dendsam_deploy.evaluate.parity:VerifyOptions")


@command("verify", "verify exports/ca1")
@click.argument("bundle", type=PATH)
@SETTINGS.option("--sam", "sam", PATH, "SAM checkpoint to run beside the graphs.  [default: its stored outputs]")
@SETTINGS.option("--detector", "detector", PATH, "Detector checkpoint, likewise.  [default: its stored outputs]")
@runtime_options
@json_option
@click.pass_context
def verify(context: click.Context, bundle: Path, json_file: Path | None) -> None:
    """Compare the graphs of BUNDLE with the original weights.

    Without checkpoints the graphs are compared with what the original modules returned when the bundle was exported;
    torch is not needed for that. Exit code 1 if a limit is broken.
    """
    from dendsam_deploy.evaluate.parity import VerifyOptions, verify_bundle
    from dendsam_deploy.runtimes.session import SessionOptions

    console: Console = context.obj
    with console.progress() as progress:
        session = SessionOptions(**RUNTIME.given(context), progress=progress)
        options = VerifyOptions(session=session, **SETTINGS.given(context))
        report = verify_bundle(bundle, options, progress)
    console.result(parity_table(report), report.to_document(), json_file)
    if not report.passed:
        raise CheckFailedError(f"{bundle}: {len(report.failures)} of {len(report.rows)} comparisons break their limit")


def parity_table(report: ParityReport) -> str:
    """Write one line for each comparison and a last one with the verdict."""
    lines = [f"{'level':<6}{'graph':<14}{'metric':<34}{'value':>12}{'limit':>12}"]
    lines += [_parity_line(row) for row in report.rows]
    first = report.rows[0]
    judged = sum(row.limit is not None for row in report.rows)
    verdict = f"all {judged} limits kept" if report.passed else f"{len(report.failures)} of {judged} limits broken"
    return "\n".join([*lines, f"{verdict} by {first.engine} on {first.device} at {first.precision}"])


def _parity_line(row: ParityRow) -> str:
    """Write a comparison."""
    limit = "" if row.limit is None else f"{row.limit:.6g}"
    mark = "" if row.passed else "  FAILED"
    return f"{row.level:<6}{row.graph:<14}{row.metric:<34}{row.value:>12.6g}{limit:>12}{mark}".rstrip()

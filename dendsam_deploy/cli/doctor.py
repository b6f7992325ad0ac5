"""``doctor``: what this machine can run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from dendsam_deploy.cli.options import command, json_option

if TYPE_CHECKING:
    from pathlib import Path

    from dendsam_deploy.cli.console import Console
    from dendsam_deploy.evaluate.doctor import MachineReport


@command("doctor", "doctor")
@json_option
@click.pass_context
def doctor(context: click.Context, json_file: Path | None) -> None:
    """Show what this machine can run, and what would mend the rest.

    Every engine is made to run a small graph; what does not work comes with the reason and the line that mends it.
    """
    from dendsam_deploy.evaluate.doctor import examine_machine

    console: Console = context.obj
    report = examine_machine()
    console.result(machine_table(report), report.to_document(), json_file)


def machine_table(report: MachineReport) -> str:
    """Write what was found on a machine, one finding a line and its remedy below it."""
    memory = "" if report.memory_gib is None else f", memory: {report.memory_gib:g} GiB"
    lines = [
        f"Python {report.python} on {report.platform}, CPU cores: {report.cpu_cores}{memory}",
        ", ".join(f"{name} {version}" for name, version in report.packages.items()),
        "",
    ]
    width = max(len(f"{finding.kind} {finding.name}") for finding in report.findings)
    for finding in report.findings:
        mark = "yes" if finding.available else "no"
        lines.append(f"{f'{finding.kind} {finding.name}':<{width}}  {mark:<3}  {finding.detail}")
        if finding.remedy:
            lines.append(f"{'':<{width}}       -> {finding.remedy}")
    return "\n".join(lines)

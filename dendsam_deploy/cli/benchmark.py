"""``benchmark``: how fast a bundle is on this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from dendsam_deploy.cli.benchmark_tables import benchmark_table, change_table
from dendsam_deploy.cli.console import CheckFailedError
from dendsam_deploy.cli.options import (
    ENGINES,
    HTML_FILE,
    PATH,
    PRECISIONS,
    TRUST,
    VOXEL_SIZE,
    Settings,
    command,
    json_option,
    word,
)

if TYPE_CHECKING:
    from pathlib import Path

    from dendsam_deploy.cli.console import Console

SETTINGS = Settings("dendsam_deploy.evaluate.latency_plan:BenchmarkOptions")
RULE = Settings("dendsam_deploy.evaluate.regression:RegressionOptions")


def read_levels(text: str) -> tuple[str, ...]:
    """Read levels, separated by commas."""
    from dendsam_deploy.bundle.latency import LEVELS

    levels = tuple(text.split(","))
    if unknown := [level for level in levels if level not in LEVELS]:
        raise click.BadParameter(f"{unknown[0]!r} is no level, expected some of {','.join(LEVELS)}")
    return levels


@command("benchmark", "benchmark exports/ca1 --volume ca1.tif --report benchmark.html")
@click.argument("bundle", type=PATH)
@SETTINGS.option("--volume", "volume", PATH, "Measure slices of this volume.  [default: synthetic ones of one tile]")
@SETTINGS.option("--voxel-size", "voxel_size_nm", VOXEL_SIZE, "nm, in place of what the file records.")
@SETTINGS.option("--boxes", "boxes", int, "Objects in each slice.  [default: those found in --volume, else 64]")
@SETTINGS.option("--levels", "levels", word("LEVEL,...", read_levels), "What to measure.")
@SETTINGS.option("--repeats", "repeats", click.IntRange(1), "Most samples of anything.")
@SETTINGS.option("--seconds", "seconds", float, "About how long it may take in all.")
@SETTINGS.flag("--quick", "quick", "At most 5 samples and about 30 s, no whole volume.")
@SETTINGS.option(
    "--engine", "engines", [ENGINES], "What executes the graphs. Repeatable.  [default: all that work here]"
)
@SETTINGS.option("--device", "devices", [str], "cpu or cuda[:N]. Repeatable.  [default: all that there are]")
@SETTINGS.option("--precision", "precisions", [PRECISIONS], "Of the graphs. Repeatable.  [default: the bundle's]")
@SETTINGS.option("--threads", "threads", click.IntRange(1), "Threads of one operator on the CPU.")
@SETTINGS.option("--trust-engine", "trusted_engines", [str], TRUST)
@SETTINGS.option("--sam", "sam", PATH, "SAM checkpoint of the bundle: measure the original torch modules, too.")
@SETTINGS.option("--detector", "detector", PATH, "Detector checkpoint of the bundle, likewise.")
@click.option(
    "--against", type=PATH, metavar="FILE", help="Exit 1 if anything is slower than in this earlier JSON file."
)
@RULE.option("--tolerance", "tolerance", float, "Growth of a median that --against lets pass.")
@RULE.option("--across", "across", [click.Choice(["host", "bundle"])], "May differ from --against. Repeatable.")
@click.option("--report", "page", type=HTML_FILE, metavar="FILE", help="Write the result as an HTML page, too.")
@json_option
@click.pass_context
def benchmark(
    context: click.Context, bundle: Path, *, against: Path | None, page: Path | None, json_file: Path | None
) -> None:
    """Measure how fast BUNDLE is on this machine: its graphs, stages, slices, and a whole volume.

    Engines and precisions take turns sample by sample, each in a process of its own. The result is also kept as
    benchmark.json in the bundle, unless --against finds that something became slower.
    """
    from dendsam_deploy.bundle.bundle import Bundle
    from dendsam_deploy.bundle.latency import graph_digests
    from dendsam_deploy.evaluate.latency import BenchmarkOptions, benchmark_bundle, check_storable, store_report
    from dendsam_deploy.evaluate.regression import (
        RegressionOptions,
        check_comparable,
        compare_reports,
        read_report,
    )
    from dendsam_deploy.host import examine_host
    from dendsam_deploy.report.benchmark_report import write_benchmark_report

    console: Console = context.obj
    options, rule = BenchmarkOptions(**SETTINGS.given(context)), RegressionOptions(**RULE.given(context))
    check_storable(bundle)
    earlier = None if against is None else read_report(against)
    if earlier is not None:
        digests = graph_digests(Bundle.open(bundle).manifest)
        check_comparable(earlier, examine_host().to_document(), digests, rule.across, str(against))
    with console.progress() as progress:
        report = benchmark_bundle(bundle, options, progress)
    if page is not None:
        write_benchmark_report(page, report)
    text, document = benchmark_table(report), report.to_document()
    change = None if earlier is None else compare_reports(earlier, report, rule, str(against))
    if change is not None:
        text += f"\n\n{change_table(change)}"
        document["against"] = change.to_document()
    if change is None or not change.slower:
        store_report(bundle, report)
    console.result(text, document, json_file)
    if change is not None and change.slower:
        raise CheckFailedError(
            f"{bundle}: {len(change.slower)} of {len(change.changes)} rows are slower than in {against} by more than "
            f"{rule.tolerance:.0%}; benchmark.json of the bundle was left as it is"
        )

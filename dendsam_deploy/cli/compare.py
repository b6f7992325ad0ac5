"""``compare``: the paper's table of prompt sources, on one bundle or on several."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from dendsam_deploy.cli.options import (
    CSV_FILE,
    HTML_FILE,
    PATH,
    RUNTIME,
    SLICES,
    VOXEL_SIZE,
    Settings,
    command,
    json_option,
    runtime_options,
)

if TYPE_CHECKING:
    from pathlib import Path

    from dendsam_deploy.cli.console import Console
    from dendsam_deploy.evaluate.comparison_report import Comparison
    from dendsam_deploy.evaluate.point_grid import GridCounts

SETTINGS = Settings("dendsam_deploy.evaluate.labelled_slices:CompareOptions")

SHOWN = ("oce", "pq", "sq", "dq", "s_inst", "msa", "sa50", "sa75", "dice")
"""Columns of the table; ``--json`` has all scores."""


@command("compare", "compare ca1.tif ca1-truth.tif --slices 80:90 -b exports/sam -b exports/ca1 --report compare.html")
@click.argument("volume", type=PATH)
@click.argument("truth", type=PATH)
@click.option(
    "-b",
    "--bundle",
    "bundles",
    type=PATH,
    metavar="DIR",
    multiple=True,
    help="Exported bundle. Repeatable: others are compared with the first.  [default: as in segment]",
)
@SETTINGS.option("--slices", "slices", SLICES, "Slices to segment and score.  [default: eight with objects]")
@SETTINGS.option("--prompts", "sources", [str], "Only this row, such as truth_box or point_grid. Repeatable.")
@SETTINGS.option("--ignore-label", "ignore_labels", [int], "Label of the truth that is not judged. Repeatable.")
@SETTINGS.flag(
    "--sparse-truth", "sparse_truth", "The truth shows only some objects: leave out segments that meet none."
)
@SETTINGS.option("--min-area", "min_area_px", float, "Least px of an object of the truth.  [default: the bundle's]")
@SETTINGS.option("--points", "points", click.IntRange(1, 20), "Clicks on each object in the row of several points.")
@SETTINGS.option("--grid", "grid_points", click.IntRange(1, 256), "Points along each side of a tile.")
@SETTINGS.option(
    "--grid-iou", "grid_iou", click.FloatRange(0, 1), "Least predicted IoU of a mask of the grid.  [default: 0.88]"
)
@SETTINGS.option(
    "--grid-stability", "grid_stability", click.FloatRange(0, 1), "Least stability of such a mask.  [default: 0.95]"
)
@SETTINGS.option("--grid-nms", "grid_nms", click.FloatRange(0, 1), "Largest IoU of the boxes of two such masks.")
@SETTINGS.option(
    "--grid-slices",
    "grid_slices",
    SLICES,
    "Choose the two thresholds, unless given, on these labelled slices, which are not judged: the best mean S_inst.",
)
@SETTINGS.option(
    "--curve-repeats", "curve_repeats", click.IntRange(0), "Draws at each level of box error; 0 leaves the curve out."
)
@SETTINGS.option("--voxel-size", "voxel_size_nm", VOXEL_SIZE, "nm, in place of what the volume records.")
@SETTINGS.option("--zoom", "zoom", float, "Model px per slice px.  [default: from the pixel sizes]")
@SETTINGS.option("--resamples", "resamples", click.IntRange(0), "Draws of slices behind each interval; 0: none.")
@SETTINGS.option("--seed", "seed", click.IntRange(0), "Decides about all draws.")
@runtime_options
@click.option("--report", "page", type=HTML_FILE, metavar="FILE", help="Write the comparison as an HTML page, too.")
@click.option("--csv", "table", type=CSV_FILE, metavar="FILE", help="Write the table as CSV, too.")
@json_option
@click.pass_context
def compare(
    context: click.Context,
    volume: Path,
    truth: Path,
    *,
    bundles: tuple[Path, ...],
    page: Path | None,
    table: Path | None,
    json_file: Path | None,
) -> None:
    """Compare prompts on labelled slices of VOLUME.

    Rows are ground-truth boxes, ground-truth points (one, and several), the detector's boxes, and a grid of points;
    columns the scores against TRUTH, means over slices. With several bundles, changes against the first are relative,
    such as +19.1 %. Quality against box error tells whether the detector is good enough.
    """
    from dendsam_deploy.bundle.bundle import find_bundle
    from dendsam_deploy.evaluate.labelled_slices import CompareOptions
    from dendsam_deploy.evaluate.prompt_comparison import compare_prompts
    from dendsam_deploy.report.comparison_report import write_comparison_report, write_comparison_table
    from dendsam_deploy.runtimes.session import SessionOptions

    console: Console = context.obj
    options = CompareOptions(session=SessionOptions(**RUNTIME.given(context)), **SETTINGS.given(context))
    with console.progress() as progress:
        comparison = compare_prompts(volume, truth, bundles or (find_bundle(),), options, progress)
    if page is not None:
        write_comparison_report(page, comparison)
    if table is not None:
        write_comparison_table(table, comparison)
    for note in comparison.notes:
        console.note(note)
    console.result(comparison_text(comparison), comparison.to_document(), json_file)


def comparison_text(comparison: Comparison) -> str:
    """Write the table, one block for each bundle, and the verdicts on the detectors."""
    from dendsam_deploy.evaluate.comparison_report import SOURCE_TITLES
    from dendsam_deploy.report.comparison_report import change_text

    lines: list[str] = []
    for bundle in comparison.bundles:
        lines.append(f"{bundle.description}, {len(comparison.slices)} slices")
        lines.append(f"{'prompts':<22}{''.join(f'{name:>9}' for name in SHOWN)}")
        for row in comparison.rows:
            if row.bundle != bundle.name:
                continue
            values = "".join(f"{getattr(row.report.slices, name):9.4f}" for name in SHOWN)
            lines.append(f"{SOURCE_TITLES[row.prompts]:<22}{values}")
            if row.relative:
                changes = "".join(f"{change_text(row.relative[name]):>9}" for name in SHOWN)
                lines.append(f"{'':<22}{changes}")
            if row.grid is not None:
                lines.append(f"  {grid_text(row.grid)}")
        lines.append("")
    if len(comparison.bundles) > 1:
        lines.append(f"per cents: against {comparison.bundles[0].name}; of errors, the change of 1 - error")
    lines += [f"{curve.bundle}: {curve.verdict}" for curve in comparison.curves]
    return "\n".join(lines).rstrip()


def grid_text(grid: GridCounts) -> str:
    """Write the thresholds of a grid and what passed them."""
    limits = f"predicted IoU above {grid.predicted_iou:g}, stability {grid.stability:g} or more"
    if grid.distinct:
        return f"{limits}: {grid.distinct} of {grid.masks} masks"
    return (
        f"{limits}: nothing passed, no predicted IoU is above {grid.highest_iou:.2f}; lower --grid-iou and "
        "--grid-stability, or let --grid-slices choose them"
    )

"""``segment``: a volume becomes 3-D instance labels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from dendsam_deploy.cli.options import (
    PATH,
    SLICES,
    Settings,
    bundle_option,
    command,
    json_option,
    runtime_options,
)
from dendsam_deploy.cli.slice_options import open_inputs, slice_options

if TYPE_CHECKING:
    from pathlib import Path

    from dendsam_deploy.cli.console import Console
    from dendsam_deploy.pipeline.interchange import OtherFormat
    from dendsam_deploy.pipeline.record import SegmentResult

SETTINGS = Settings("dendsam_deploy.pipeline.job:SegmentOptions")

LINKERS = click.Choice(["overlap-graph", "iou-greedy"])


@command("segment", "segment ca1.tif -b exports/ca1")
@click.argument("volume", type=PATH)
@bundle_option
@SETTINGS.option("-o, --out", "out", PATH, "Folder of the result.  [default: VOLUME.dendsam]")
@SETTINGS.option("--slices", "slices", SLICES, "Segment only these slices.")
@slice_options(SETTINGS)
@SETTINGS.option("--linker", "linker", LINKERS, "How slices are linked.")
@SETTINGS.flag("--restart", "restart", "Discard an earlier run in that folder instead of resuming it.")
@runtime_options
@json_option
@click.pass_context
def segment(
    context: click.Context,
    volume: Path,
    *,
    bundle: Path | None,
    also: tuple[OtherFormat, ...],
    boxes: Path | None,
    json_file: Path | None,
) -> None:
    """Segment VOLUME into 3-D instances.

    The result is a folder with labels, tables and report.html. Run again after an interruption, the same command goes
    on where it stopped.
    """
    from dendsam_deploy.pipeline.interchange import write_run_formats
    from dendsam_deploy.pipeline.job import SegmentOptions
    from dendsam_deploy.pipeline.run import segment_volume
    from dendsam_deploy.report.run_folder import report_from_run

    console: Console = context.obj
    options = SegmentOptions(**SETTINGS.given(context))
    with open_inputs(context, volume, bundle, boxes, options) as (inputs, options):
        with console.progress() as progress:
            result = segment_volume(volume, inputs.session, options, progress)
        report_from_run(result.out, inputs.raw)
        others = write_run_formats(result.out, also)
    for notice in result.notices:
        console.note(notice)
    document = result.to_document() | {"also": {name: str(path) for name, path in others.items()}}
    console.result(summary(result), document, json_file)


def summary(result: SegmentResult) -> str:
    """Say in one line what came out."""
    return (
        f"{result.out}: {result.objects_3d} objects in {result.slices} slices ({result.objects_2d} profiles), "
        f"{result.seconds:.1f} s, mostly {result.limiting_stage}"
    )

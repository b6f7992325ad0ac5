"""Options of the commands that segment slices: how they do it, and in which formats they write the result."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from dendsam_deploy.cli.options import PATH, VOXEL_SIZE, Function, Settings, word
from dendsam_deploy.errors import InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Callable

FORMATS = click.Choice(["tif", "ome-zarr"])


def slice_options(settings: Settings) -> Callable[[Function], Function]:
    """Add how the slices of a volume are segmented, and in which formats the result is written.

    Boxes from elsewhere arrive as `boxes`, the formats of other programs as `also`.

    Parameters
    ----------
    settings : Settings
        Those of an options class with the fields of ``pipeline.segment.SliceOptions`` and a `format`.
    """
    boxes_help = "Boxes in place of the detector's: folder of YOLO txt files, CSV, or labels."

    def decorate(function: Function) -> Function:
        for option in (
            settings.option("--zoom", "zoom", float, "Model px per slice px.  [default: from the pixel sizes]"),
            settings.option("--voxel-size", "voxel_size_nm", VOXEL_SIZE, "nm, in place of what the file records."),
            settings.option("--format", "format", FORMATS, "Format of the labels.  [default: that of the volume]"),
            settings.option("--min-area", "min_area_px", float, "Least area in a slice, px.  [default: the bundle's]"),
            settings.option("--nms", "nms_iou", float, "Largest IoU of two boxes of a slice.  [default: the bundle's]"),
            settings.option("--score", "detection_score", float, "Least detection score.  [default: the bundle's]"),
            click.option("--boxes", type=PATH, help=boxes_help),
            _also_option,
        ):
            function = option(function)
        return function

    return decorate


def _read_formats(text: str) -> tuple[str, ...]:
    """Read ``coco,yolo,roi`` or some of them."""
    from dendsam_deploy.pipeline.interchange import check_formats

    try:
        return check_formats([part.strip() for part in text.split(",") if part.strip()])
    except InvalidArgumentError as error:
        raise click.BadParameter(str(error)) from error


def _also_option(function: Function) -> Function:
    """Add ``--also coco,yolo,roi``, which arrives as `also`."""
    help_text = "Write the objects for other programs, too: coco (run lengths), yolo (boxes), roi (ImageJ)."
    kind = word("coco,yolo,roi", _read_formats)
    option = click.option("--also", type=kind, metavar="coco,yolo,roi", default="", show_default=False, help=help_text)
    return option(function)

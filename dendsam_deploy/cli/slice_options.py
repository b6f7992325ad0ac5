"""What the commands that segment slices share: their options, and how they open what they read."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import click

from dendsam_deploy.cli.options import PATH, RUNTIME, VOXEL_SIZE, Function, Settings, word
from dendsam_deploy.errors import InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from dendsam_deploy.cli.console import Console
    from dendsam_deploy.evaluate.pseudo_options import PseudoLabelOptions
    from dendsam_deploy.pipeline.job import SegmentOptions
    from dendsam_deploy.runtimes.session import Session
    from dendsam_deploy.volume.volume import VolumeReader

AnyOptions = TypeVar("AnyOptions", "SegmentOptions", "PseudoLabelOptions")

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


class Inputs(NamedTuple):
    """What a command that segments slices reads: the volume, and the bundle on its engine."""

    raw: VolumeReader
    session: Session


@contextmanager
def open_inputs(
    context: click.Context, volume: Path, bundle: Path | None, boxes: Path | None, options: AnyOptions
) -> Iterator[tuple[Inputs, AnyOptions]]:
    """Open the volume, boxes from elsewhere, which the returned options hold, and the bundle; say what it runs on."""
    from dendsam_deploy.bundle.bundle import Bundle, find_bundle
    from dendsam_deploy.runtimes.session import SessionOptions, open_session
    from dendsam_deploy.volume.boxes import open_boxes
    from dendsam_deploy.volume.open import open_volume

    console: Console = context.obj
    opened = Bundle.open(bundle or find_bundle())
    with ExitStack() as stack:
        raw = stack.enter_context(open_volume(volume, options.voxel_size_nm))
        if boxes is not None:
            options = replace(options, boxes=stack.enter_context(open_boxes(boxes, raw.info.shape_zyx)))
        with console.progress() as progress:
            wishes = SessionOptions(**RUNTIME.given(context), progress=progress)
            session = stack.enter_context(open_session(opened, wishes))
        console.note(session.description)
        yield Inputs(raw, session), options

"""``finetune detector``: trains the YOLO detector on boxes derived from labels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from dendsam_deploy.cli.options import PATH, Settings, command, data_options, extra, json_option, output_option

if TYPE_CHECKING:
    from pathlib import Path

    from dendsam_deploy.cli.console import Console

SETTINGS = Settings("dendsam_deploy.training.options:DetectorTrainingOptions")
SCHEDULE = Settings("dendsam_deploy.training.options:DetectorSchedule")


@command("detector", "finetune detector ca1.tif ca1-labels.tif -o ca1-yolo.pt --minutes 30 --slices 0:100")
@click.argument("volume", type=PATH)
@click.argument("labels", type=PATH)
@output_option("Checkpoint to write.", required=True)
@SETTINGS.option("--start", "start", PATH, "YOLO checkpoint, or an architecture such as yolo11n.yaml, to start from.")
@SETTINGS.flag("--from-scratch", "from_scratch", "Start from random weights of that architecture.")
@SETTINGS.option("--image-size", "tile_size_px", int, "Side of the tiles, px.")
@SCHEDULE.option("--minutes", "minutes", click.FloatRange(0, min_open=True), "Longest training time.")
@SCHEDULE.option("--epochs", "epochs", click.IntRange(1), "Most epochs.")
@data_options(SETTINGS)
@SCHEDULE.option("--seed", "seed", int, "Source of every random choice.")
@SCHEDULE.option("--device", "device", str, "cpu or cuda[:N].")
@SETTINGS.flag("--no-resume", "resume", "Begin anew where an interrupted run could go on.")
@json_option
@click.pass_context
def finetune_detector(context: click.Context, volume: Path, labels: Path, out: Path, json_file: Path | None) -> None:
    """Train the detector on the labelled slices of VOLUME.

    LABELS is a label volume of the same shape, one number for each object, 0 elsewhere. The last block of slices is
    held out; the weights that find its objects best are kept.
    """
    with extra("train"):
        from dendsam_deploy.training.detector import finetune_detector

    from dendsam_deploy.training.options import DetectorSchedule, DetectorTrainingOptions

    console: Console = context.obj
    schedule = DetectorSchedule(**SCHEDULE.given(context))
    options = DetectorTrainingOptions(out=out, schedule=schedule, **SETTINGS.given(context))
    with console.progress() as progress:
        result = finetune_detector(volume, labels, options, progress)
    for warning in result.warnings:
        console.note(warning)
    (first, stop), scores = result.held_out_slices, result.scores
    text = (
        f"{result.out}: {result.architecture}, {result.epochs} epochs; on held-out slices {first}:{stop} "
        f"precision {scores.precision:.3f}, recall {scores.recall:.3f} at IoU .5, mAP50 {scores.map50:.3f}"
    )
    console.result(text, result.to_document(), json_file)

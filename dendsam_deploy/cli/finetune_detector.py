"""``finetune detector``: trains the YOLO detector on boxes derived from labels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from dendsam_deploy.cli.options import PATH, Settings, command, data_options, extra, json_option, output_option
from dendsam_deploy.cli.weights import with_weights

if TYPE_CHECKING:
    from pathlib import Path

    from dendsam_deploy.cli.console import Console
    from dendsam_deploy.progress import Progress, ProgressCallback
    from dendsam_deploy.training.detector import DetectorTrainingResult

SETTINGS = Settings("dendsam_deploy.training.options:DetectorTrainingOptions")
SCHEDULE = Settings("dendsam_deploy.training.options:DetectorSchedule")


@command("detector", "finetune detector ca1.tif ca1-labels.tif -o ca1-yolo.pt --minutes 30 --slices 0:100")
@click.argument("volume", type=PATH, required=False)
@click.argument("labels", type=PATH, required=False)
@output_option("Checkpoint to write.", required=True)
@SETTINGS.option("--start", "start", PATH, "YOLO checkpoint, or an architecture such as yolo11n.yaml, to start from.")
@SETTINGS.flag("--from-scratch", "from_scratch", "Start from random weights of that architecture.")
@SETTINGS.option("--image-size", "tile_size_px", int, "Side of the tiles, px.")
@SCHEDULE.option("--minutes", "minutes", click.FloatRange(0, min_open=True), "Longest training time.")
@SCHEDULE.option("--epochs", "epochs", click.IntRange(1), "Most epochs.")
@SCHEDULE.option("--patience", "patience", click.IntRange(1), "Epochs without improvement after which to stop early.")
@SCHEDULE.option("--batch", "batch", click.IntRange(1), "Tiles of a step.  [default: what fits into memory]")
@SCHEDULE.option("--tiles", "tiles", click.IntRange(1), "Tiles to cut.  [default: 600, on a GPU 4000]")
@SCHEDULE.option("--tiles-per-epoch", "tiles_per_epoch", click.IntRange(1), "Of these.  [default: 96, on a GPU 1280]")
@SCHEDULE.option("--learning-rate", "learning_rate", float, "Peak rate.  [default: 5e-4; from random weights 2e-3]")
@data_options(SETTINGS)
@SCHEDULE.option("--seed", "seed", int, "Source of every random choice.")
@SCHEDULE.option("--device", "device", str, "cpu or cuda[:N].")
@SETTINGS.flag("--no-resume", "resume", "Begin anew where an interrupted run could go on.")
@json_option
@click.pass_context
def finetune_detector(
    context: click.Context, volume: Path | None, labels: Path | None, out: Path, json_file: Path | None
) -> None:
    """Train the detector on the labelled slices of VOLUME, or of several volumes that --data names.

    LABELS is a label volume of the same shape, one number for each object, 0 elsewhere. The last block of slices is
    held out; the weights that find its objects best are kept. The course of the training is written beside them, in the
    folder OUT.training (without the suffix of OUT): history.csv, config.json, report.html and, where tensorboard is
    installed, its events. Several GPUs are not used: a detector is small, and trains in minutes on one.
    """
    with extra("train"):
        from dendsam_deploy.training.detector import finetune_detector
        from dendsam_deploy.training.logbook import logbook_folder

    from dendsam_deploy.report.training_report import write_training_report
    from dendsam_deploy.training.options import DetectorSchedule, DetectorTrainingOptions

    console: Console = context.obj
    schedule = DetectorSchedule(**SCHEDULE.given(context))
    given = with_weights(console, SETTINGS.given(context), "start")
    options = DetectorTrainingOptions(out=out, schedule=schedule, **given)
    with console.progress() as progress:
        result = finetune_detector(volume, labels, options, told(console, progress))
    page = write_training_report(logbook_folder(out), result.story)
    scores = result.scores
    text = (
        f"{result.out}: {result.architecture}, {result.epochs} epochs, number {result.best_epoch} is the best; "
        f"on held-out slices of {held_out_text(result)} precision {scores.precision:.3f}, recall {scores.recall:.3f} "
        f"at IoU .5, mAP50 {scores.map50:.3f}{size_text(result)}\nreport: {page}"
    )
    console.result(text, result.to_document() | {"report": str(page)}, json_file)


def told(console: Console, progress: ProgressCallback) -> ProgressCallback:
    """Return a callback that prints what was planned as a line of its own, and hands everything else on."""

    def tell(entry: Progress) -> None:
        if entry.stage == "plan":
            console.note(entry.note)
        else:
            progress(entry)

    return tell


def held_out_text(result: DetectorTrainingResult) -> str:
    """Name the volumes and their held-out slices."""
    blocks = [
        f"{entry.name} " + "+".join(f"{first}:{stop}" for first, stop in entry.held_out_blocks)
        for entry in result.volumes
        if entry.held_out_blocks
    ]
    return ", ".join(blocks)


def size_text(result: DetectorTrainingResult) -> str:
    """Say how the score depends on the size of objects."""
    parts = [f"{entry.name} {entry.map50:.3f} ({entry.objects})" for entry in result.per_size if entry.objects]
    return f"; by size: {', '.join(parts)}" if parts else ""

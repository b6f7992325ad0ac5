"""``finetune detector``: trains the YOLO detector on boxes derived from labels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from dendsam_deploy.cli.headings import with_headings
from dendsam_deploy.cli.options import PATH, Settings, command, data_options, extra, json_option, output_option
from dendsam_deploy.cli.weights import with_weights

if TYPE_CHECKING:
    from pathlib import Path

    from dendsam_deploy.cli.console import Console
    from dendsam_deploy.progress import Progress, ProgressCallback
    from dendsam_deploy.training.detector import DetectorTrainingResult

SETTINGS = Settings("dendsam_deploy.training.options:DetectorTrainingOptions")
SCHEDULE = Settings("dendsam_deploy.training.options:DetectorSchedule")


COUNT = click.IntRange(1)
POSITIVE = click.FloatRange(0, min_open=True)

HEADINGS = {
    "--start": "Model",
    "--minutes": "Length",
    "--batch": "Method and memory",
    "--data": "Data",
    "--seed": "The run",
}


@with_headings(HEADINGS)
@command("detector", "finetune detector ca1.tif ca1-labels.tif -o ca1-yolo.pt --minutes 30 --slices 0:100")
@click.argument("volume", type=PATH, required=False)
@click.argument("labels", type=PATH, required=False)
@output_option("Checkpoint to write.", required=True)
@json_option
@SETTINGS.option("--start", "start", PATH, "YOLO checkpoint, or an architecture such as yolo11n.yaml, to start from.")
@SETTINGS.flag("--from-scratch", "from_scratch", "Start from random weights of that architecture.")
@SETTINGS.option("--image-size", "tile_size_px", int, "Side of the tiles, px.")
@SETTINGS.option("--min-object", "min_object_px", click.FloatRange(0), "Least area of an object, slice px.")
@SCHEDULE.option("--minutes", "minutes", POSITIVE, "Longest training time; none where --epochs is given alone.")
@SCHEDULE.option("--epochs", "epochs", COUNT, "Most epochs; without --minutes the seed decides all.")
@SCHEDULE.option("--patience", "patience", COUNT, "Epochs in a row without a better one after which to stop early.")
@SCHEDULE.option("--batch", "batch", COUNT, "Tiles of a step.  [default: planned from the free memory, and printed]")
@SCHEDULE.option("--tiles", "tiles", COUNT, "Tiles to cut.  [default: 600, on a GPU 4000]")
@SCHEDULE.option("--tiles-per-epoch", "tiles_per_epoch", COUNT, "Of these.  [default: 96, on a GPU 1280]")
@SCHEDULE.option("--learning-rate", "learning_rate", POSITIVE, "Peak.  [default: 5e-4; from random weights 2e-3]")
@data_options(SETTINGS)
@SCHEDULE.option("--seed", "seed", click.IntRange(0), "Source of every random choice.")
@SCHEDULE.option("--device", "device", str, "cpu or cuda[:N]; one GPU at most.")
@SETTINGS.flag("--no-resume", "resume", "Begin anew where an interrupted run could go on.")
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
    given = SCHEDULE.given(context)
    if "epochs" in given:
        given.setdefault("minutes", None)
    schedule = DetectorSchedule(**given)
    given = with_weights(console, SETTINGS.given(context), "start")
    options = DetectorTrainingOptions(out=out, schedule=schedule, **given)
    with console.progress() as progress:
        result = finetune_detector(volume, labels, options, told(console, progress))
    page = write_training_report(logbook_folder(out), result.story)
    scores = result.scores
    text = (
        f"{result.out}: {result.architecture}, {result.epochs} epoch{'' if result.epochs == 1 else 's'}, number "
        f"{result.best_epoch} is the best; "
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

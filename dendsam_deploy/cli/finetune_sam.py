"""``finetune sam``: fine-tunes SAM on labelled slices."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from dendsam_deploy.cli.options import PATH, Settings, command, data_options, extra, json_option, output_option
from dendsam_deploy.models.architectures import MODEL_TYPES

if TYPE_CHECKING:
    from pathlib import Path

    from dendsam_deploy.cli.console import Console

SETTINGS = Settings("dendsam_deploy.training.sam_options:FinetuneSamOptions")
SCHEDULE = Settings("dendsam_deploy.training.sam_options:SamTrainingOptions")

MODELS = click.Choice(MODEL_TYPES)


@command("sam", "finetune sam ca1.tif ca1-labels.tif -o ca1-sam.pt --minutes 30 --slices 0:100")
@click.argument("volume", type=PATH)
@click.argument("labels", type=PATH)
@output_option("Checkpoint to write.", required=True)
@SETTINGS.option("--model", "model_type", MODELS, "Architecture.")
@SETTINGS.option("--start", "start", PATH, "Checkpoint to start from; tiny has one of its own.")
@SETTINGS.flag("--from-scratch", "from_scratch", "Start from random weights.")
@SETTINGS.option("--image-size", "image_size", int, "Side of the model's input, px.  [default: that of the weights]")
@SCHEDULE.option("--minutes", "minutes", click.FloatRange(0, min_open=True), "Longest training time.")
@SCHEDULE.option("--steps", "steps", click.IntRange(1), "Most optimiser steps.")
@data_options(SETTINGS)
@SCHEDULE.option("--seed", "seed", int, "Source of every random choice.")
@SCHEDULE.option("--device", "device", str, "cpu or cuda[:N].")
@SETTINGS.flag("--no-resume", "resume", "Begin anew where an interrupted run could go on.")
@json_option
@click.pass_context
def finetune_sam(context: click.Context, volume: Path, labels: Path, out: Path, json_file: Path | None) -> None:
    """Fine-tune SAM on the labelled slices of VOLUME.

    LABELS is a label volume of the same shape, one number for each object, 0 elsewhere. The last block of slices is
    held out; the weights that segment it best are kept.
    """
    with extra("train"):
        from dendsam_deploy.training.finetune import finetune_sam

    from dendsam_deploy.training.sam_options import FinetuneSamOptions, SamTrainingOptions

    console: Console = context.obj
    schedule = SamTrainingOptions(**SCHEDULE.given(context))
    options = FinetuneSamOptions(out=out, schedule=schedule, **SETTINGS.given(context))
    with console.progress() as progress:
        result = finetune_sam(volume, labels, options, progress)
    first, stop = result.held_out_slices
    text = (
        f"{result.out}: {result.model_type}, {result.steps} steps; with exact boxes on held-out slices {first}:{stop} "
        f"mean IoU {result.held_out_iou:.3f} ({result.first_held_out_iou:.3f} before)"
    )
    console.result(text, result.to_document(), json_file)

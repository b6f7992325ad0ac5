"""``finetune sam``: fine-tunes SAM on labelled slices."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import click

from dendsam_deploy.cli.finetune_detector import told
from dendsam_deploy.cli.headings import with_headings
from dendsam_deploy.cli.options import (
    PATH,
    Settings,
    command,
    data_options,
    extra,
    json_option,
    output_option,
    word,
)
from dendsam_deploy.cli.weights import with_weights
from dendsam_deploy.models.architectures import MODEL_TYPES
from dendsam_deploy.training.sam_options import (
    PRECISION_NAMES,
    PRESET_NAMES,
    PROTOCOL_NAMES,
    PROTOCOLS,
    RATE_NAMES,
    TRAINED_PARTS,
)

if TYPE_CHECKING:
    from pathlib import Path

    from dendsam_deploy.cli.console import Console
    from dendsam_deploy.training.finetune import FinetunedSam

SETTINGS = Settings("dendsam_deploy.training.sam_options:FinetuneSamOptions")
SCHEDULE = Settings("dendsam_deploy.training.sam_options:SamTrainingOptions")

HEADINGS = {
    "--model": "Model",
    "--minutes": "Length",
    "--protocol": "Method",
    "--preset": "Memory and speed",
    "--data": "Data",
    "--seed": "The run",
}


def read_jitter(text: str) -> tuple[float, float]:
    """Read ``LOW,HIGH``, or one number for both."""
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise click.BadParameter(f"{text!r} is no box error, expected LOW,HIGH such as 0.05,0.15") from error
    if len(values) not in (1, 2) or not all(math.isfinite(value) for value in values):
        raise click.BadParameter(f"{text!r} is no box error, expected LOW,HIGH such as 0.05,0.15")
    return values[0], values[-1]


def _of_protocols(field: str) -> str:
    """Write the default of an option that depends on the protocol, and on whether the model is ``tiny``."""
    texts = []
    for name, defaults in PROTOCOLS.items():
        value = getattr(defaults, field)
        numbers = value if isinstance(value, tuple) else (value,)
        text = f"{name}: " + ",".join(f"{n:g}" if isinstance(n, float) else str(n) for n in numbers)
        young = getattr(defaults.young, field, value)
        texts.append(text if young == value else f"{text}, of tiny {young}")
    return f"  [default: {'; '.join(texts)}]"


MODELS = click.Choice(MODEL_TYPES)
COUNT = click.IntRange(1)
POSITIVE = click.FloatRange(0, min_open=True)
PART = click.FloatRange(0, 1)
JITTER = word("LOW,HIGH", read_jitter)

_PROTOCOL_HELP = f"boxes: {PROTOCOLS['boxes'].summary}; published: {PROTOCOLS['published'].summary}."
_TRAIN_HELP = "All weights, those of the decoder, or these and adapters in the encoder, merged into the checkpoint."
_PRECISION_HELP = "Of the large products.  [default: fp32; on a GPU bf16, or fp16 where it has no bf16]"
_PRESET_HELP = "Memory that a step may take; auto plans it from what is free, and prints it."


@with_headings(HEADINGS)
@command("sam", "finetune sam ca1.tif ca1-labels.tif -o ca1-sam.pt --minutes 30 --slices 0:100")
@click.argument("volume", type=PATH, required=False)
@click.argument("labels", type=PATH, required=False)
@output_option("Checkpoint to write.", required=True)
@json_option
@SETTINGS.option("--model", "model_type", MODELS, "Architecture.")
@SETTINGS.option("--start", "start", PATH, "Checkpoint to start from, or a name such as sam_vit_b; tiny has one.")
@SETTINGS.option("--start-base", "start_base", PATH, "Whole SAM that completes a --start with an image encoder only.")
@SETTINGS.flag("--from-scratch", "from_scratch", "Start from random weights.")
@SETTINGS.option("--image-size", "image_size", int, "Side of the model's input, px.  [default: that of the weights]")
@SCHEDULE.option("--train", "train", click.Choice(TRAINED_PARTS), _TRAIN_HELP)
@SCHEDULE.option("--lora-rank", "lora_rank", COUNT, "Rank of these adapters.")
@SCHEDULE.option("--minutes", "minutes", POSITIVE, "Longest training time; none where --steps is given alone.")
@SCHEDULE.option("--steps", "steps", COUNT, "Most optimiser steps; without --minutes the seed decides all.")
@SCHEDULE.option("--patience", "patience", COUNT, "Judgements in a row without a better one after which to stop early.")
@SCHEDULE.option("--judge-minutes", "judge_minutes", POSITIVE, "Time between judgements on the held-out slices.")
@SCHEDULE.option("--judge-steps", "judge_steps", COUNT, "The same without --minutes.  [default: a tenth of --steps]")
@SCHEDULE.option("--protocol", "protocol", click.Choice(PROTOCOL_NAMES), _PROTOCOL_HELP)
@SCHEDULE.option("--objects", "objects_per_tile", COUNT, f"Most objects of a tile.{_of_protocols('objects_per_tile')}")
@SCHEDULE.option("--min-object", "min_object_px", click.FloatRange(0), "Least area of an object, slice px.")
@SCHEDULE.option(
    "--box-jitter", "box_jitter", JITTER, f"Error of boxes, parts of their sides.{_of_protocols('box_jitter')}"
)
@SCHEDULE.option(
    "--exact-fraction", "exact_fraction", click.FloatRange(0, 1), f"Boxes left exact.{_of_protocols('exact_fraction')}"
)
@SCHEDULE.option(
    "--learning-rate", "learning_rate", POSITIVE, "Peak rate.  [default: 1e-5; lora 1e-4; tiny 4e-4, published 2e-4]"
)
@SCHEDULE.option("--rate", "rate", click.Choice(RATE_NAMES), f"How it falls.{_of_protocols('rate')}")
@SCHEDULE.option("--clip-norm", "clip_norm", POSITIVE, f"Largest norm of a gradient.{_of_protocols('clip_norm')}")
@SCHEDULE.option("--preset", "preset", click.Choice(PRESET_NAMES), _PRESET_HELP)
@SCHEDULE.option("--tiles", "tiles_per_step", COUNT, "Tiles encoded together.  [default: planned]")
@SCHEDULE.option("--accumulate", "accumulate", COUNT, "Such batches for each step.  [default: planned]")
@SCHEDULE.option("--precision", "precision", click.Choice(PRECISION_NAMES), _PRECISION_HELP)
@SCHEDULE.flag("--checkpointing", "checkpointing", "Compute the encoder's blocks twice: a fraction of the memory.")
@SCHEDULE.flag("--no-checkpointing", "checkpointing", "Keep what they compute.")
@data_options(SETTINGS)
@SETTINGS.option("--pseudo", "pseudo", [PATH], "Folder of pseudo-labels that teach, too, and never judge. Repeatable.")
@SETTINGS.option("--pseudo-weight", "pseudo_weight", POSITIVE, "How often they are drawn, true labels being 1.")
@SCHEDULE.option("--seed", "seed", click.IntRange(0), "Source of every random choice.")
@SCHEDULE.option("--device", "device", str, "cpu or cuda[:N].")
@SCHEDULE.option("--devices", "devices", COUNT, "GPUs, on the CPU processes, that train together.")
@SETTINGS.flag("--no-resume", "resume", "Begin anew where an interrupted run could go on.")
@click.pass_context
def finetune_sam(
    context: click.Context,
    volume: Path | None,
    labels: Path | None,
    out: Path,
    json_file: Path | None,
) -> None:
    """Fine-tune SAM on the labelled slices of VOLUME, or of several volumes that --data names.

    LABELS is a label volume of the same shape, one number for each object, 0 elsewhere. The last block of slices is
    held out; the weights that segment it best, prompted by exact boxes, are kept. An interrupted training goes on
    where it was when the same command is given again. The course of the training is written beside the checkpoint, in
    the folder OUT.training (without the suffix of OUT): history.csv, config.json, report.html and, where tensorboard is
    installed, its events.
    """
    with extra("train"):
        from dendsam_deploy.training.finetune import finetune_sam

    from dendsam_deploy.report.training_report import write_training_report
    from dendsam_deploy.training.logbook import logbook_folder
    from dendsam_deploy.training.sam_options import FinetuneSamOptions, SamTrainingOptions

    console: Console = context.obj
    given = SCHEDULE.given(context)
    if "steps" in given:
        given.setdefault("minutes", None)
    schedule = SamTrainingOptions(**given)
    given = with_weights(console, SETTINGS.given(context), "start", "start_base")
    options = FinetuneSamOptions(out=out, schedule=schedule, **given)
    with console.progress() as progress:
        result = finetune_sam(volume, labels, options, told(console, progress))
    page = write_training_report(logbook_folder(out), result.story)
    console.result(f"{summary(result)}\nreport: {page}", result.to_document() | {"report": str(page)}, json_file)


def summary(result: FinetunedSam) -> str:
    """Return what came out, in a sentence."""
    first, stop = result.held_out_slices
    early = ", stopped early" if result.stopped_early else ""
    others = ", ".join(
        f"{name} {result.scores[kind]:.3f} ({result.first_scores[kind]:.3f})"
        for kind, name in (("jittered", "boxes 5 to 15 % off"), ("point", "one point"))
    )
    return (
        f"{result.out}: {result.model_type}, {result.steps} steps{early}, number {result.best_step} is the best; "
        f"with exact boxes on held-out slices {first}:{stop} mean IoU {result.held_out_iou:.3f} "
        f"({result.first_held_out_iou:.3f} before); {others}"
    )

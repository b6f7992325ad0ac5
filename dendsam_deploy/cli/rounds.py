"""``rounds``: train, pseudo-label, train again, and tell whether it helped."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from dendsam_deploy.cli.options import (
    PATH,
    SLICES,
    VOXEL_SIZE,
    Settings,
    command,
    extra,
    json_option,
    output_option,
)
from dendsam_deploy.errors import InvalidArgumentError
from dendsam_deploy.models.architectures import MODEL_TYPES

if TYPE_CHECKING:
    from pathlib import Path

    from dendsam_deploy.cli.console import Console
    from dendsam_deploy.evaluate.rounds_record import RoundsResult

SETTINGS = Settings("dendsam_deploy.evaluate.rounds_options:RoundsOptions")
SCHEDULE = Settings("dendsam_deploy.training.sam_options:SamTrainingOptions")
CRITERIA = Settings("dendsam_deploy.evaluate.mask_choice:MaskCriteria")

MODELS = click.Choice(MODEL_TYPES)
COUNT = click.IntRange(1)
PART = click.FloatRange(0, 1)
POSITIVE = click.FloatRange(0, min_open=True)


@command(
    "rounds", "rounds ca1.tif ca1-labels.tif -o ca1-rounds --rounds 3 --labelled-slices 0:8 --held-out-slices 80:100"
)
@click.argument("volume", type=PATH)
@click.argument("labels", type=PATH)
@output_option("Folder of all rounds.", required=True)
@SETTINGS.option("--rounds", "rounds", COUNT, "Most rounds with pseudo-labels.")
@SETTINGS.option("--labelled-slices", "labelled_slices", SLICES, "Slices that train with LABELS.  [default: the rest]")
@SETTINGS.option("--unlabelled-slices", "unlabelled_slices", SLICES, "Slices to pseudo-label.  [default: the rest]")
@SETTINGS.option(
    "--held-out-slices", "held_out_slices", SLICES, "Slices that only judge.  [default: last 15 % of the labelled]"
)
@SETTINGS.option(
    "--calibration-slices", "calibration_slices", SLICES, "Labelled slices that only choose the thresholds of masks."
)
@SETTINGS.option("--wanted-precision", "wanted_precision", float, "Precision of the kept masks there.")
@CRITERIA.option("--least-score", "score", PART, "Without these: least detection score of a mask.")
@CRITERIA.option("--least-iou", "predicted_iou", PART, "Its least predicted IoU.")
@CRITERIA.option("--least-stability", "stability", PART, "Its least stability when the box is a little wrong.")
@CRITERIA.option("--least-agreement", "agreement", PART, "Its least agreement with a neighbouring slice.")
@SETTINGS.option("--gap", "gap", click.IntRange(0), "Slices beside a held-out one that serve nothing.")
@SETTINGS.option("--pseudo-weight", "pseudo_weight", POSITIVE, "How often pseudo-labels are drawn, true ones being 1.")
@SETTINGS.option("--least-gain", "least_gain", click.FloatRange(0), "Gain in the held-out score that counts as one.")
@SETTINGS.option("--patience", "patience", COUNT, "Rounds in a row without a gain after which to stop.")
@SETTINGS.flag("--carry-on", "carry_on", "Start each round from the weights of the one before.")
@SETTINGS.option("--model", "model_type", MODELS, "Architecture.")
@SETTINGS.option("--start", "start", PATH, "Checkpoint to start from; tiny has one of its own.")
@SETTINGS.option("--image-size", "image_size", int, "Side of the model's input, px.  [default: that of the weights]")
@SCHEDULE.option("--minutes", "minutes", POSITIVE, "Longest training time of a round; none where --steps is alone.")
@SCHEDULE.option("--steps", "steps", COUNT, "Most optimiser steps of a round.")
@SETTINGS.option("--detector", "detector", PATH, "What finds the boxes.  [default: trained on the labelled slices]")
@SETTINGS.option("--detector-minutes", "detector_minutes", POSITIVE, "Time for that.")
@SETTINGS.option("--background-label", "background_labels", [int], "Label that is no object. Repeatable.")
@SETTINGS.option("--voxel-size", "voxel_size_nm", VOXEL_SIZE, "nm, in place of what the file records.")
@SCHEDULE.option("--seed", "seed", click.IntRange(0), "Source of every random choice.")
@SCHEDULE.option("--device", "device", str, "cpu or cuda[:N].")
@SETTINGS.flag("--restart", "restart", "Discard earlier rounds in that folder instead of going on.")
@json_option
@click.pass_context
def rounds(context: click.Context, volume: Path, labels: Path, *, out: Path, json_file: Path | None) -> None:
    """Train SAM on few labelled slices of VOLUME, then in rounds on its own best masks of the others.

    Round 0 trains on LABELS alone. Each further round lets the model of the one before label the unlabelled slices,
    keeps the masks that are good enough, and trains anew on both. Held-out slices never see a pseudo-label, nor do
    their neighbours; they judge every round, by exact boxes and by the automatic result, and when they gain no more the
    rounds end. The folder gets a checkpoint and a bundle for every round, best.pt, and rounds.json, .csv and .html,
    which say plainly whether the rounds helped. An interrupted command goes on when it is given again.
    """
    with extra("train"):
        from dendsam_deploy.evaluate.rounds import PAGE_FILE, run_rounds

    from dendsam_deploy.cli.finetune_detector import told
    from dendsam_deploy.evaluate.mask_choice import MaskCriteria
    from dendsam_deploy.evaluate.rounds_options import RoundsOptions
    from dendsam_deploy.report.rounds_report import write_rounds_report
    from dendsam_deploy.training.sam_options import SamTrainingOptions

    console: Console = context.obj
    given = SCHEDULE.given(context)
    if "steps" in given:
        given.setdefault("minutes", None)
    criteria = MaskCriteria(**CRITERIA.given(context))
    wishes = SETTINGS.given(context)
    if "wanted_precision" in wishes and "calibration_slices" not in wishes:
        raise InvalidArgumentError(
            "a precision is measured on labelled slices that do not train: name some with --calibration-slices"
        )
    options = RoundsOptions(out=out, schedule=SamTrainingOptions(**given), criteria=criteria, **wishes)
    with console.progress() as progress:
        result = run_rounds(volume, labels, options, told(console, progress))
    write_rounds_report(result.out / PAGE_FILE, result)
    for notice in result.notices:
        console.note(notice)
    console.result(summary(result), result.to_document(), json_file)


def summary(result: RoundsResult) -> str:
    """Write the table of rounds and the verdict."""
    rows = [f"{'round':<7}{'IoU, exact boxes':>17}{'PQ, automatic':>15}{'masks kept':>14}"]
    for record in result.records:
        kept = f"{record.kept} of {record.masks}" if record.number else "-"
        rows.append(f"{record.number:<7}{record.score:17.4f}{record.automatic:15.4f}{kept:>14}")
    return "\n".join([*rows, f"ended: {result.reason}", result.verdict(), f"best: {result.out / 'best.pt'}"])

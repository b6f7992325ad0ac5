"""``pseudo-label``: masks good enough to train on next."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from dendsam_deploy.cli.console import CheckFailedError
from dendsam_deploy.cli.options import (
    PATH,
    SLICES,
    Settings,
    bundle_option,
    command,
    json_option,
    output_option,
    runtime_options,
)
from dendsam_deploy.cli.slice_options import open_inputs, slice_options

if TYPE_CHECKING:
    from pathlib import Path

    from dendsam_deploy.cli.console import Console
    from dendsam_deploy.evaluate.mask_choice import Share
    from dendsam_deploy.evaluate.pseudo_labels import PseudoLabels
    from dendsam_deploy.pipeline.interchange import OtherFormat

SETTINGS = Settings("dendsam_deploy.evaluate.pseudo_options:PseudoLabelOptions")
CRITERIA = Settings("dendsam_deploy.evaluate.mask_choice:MaskCriteria")

PART = click.FloatRange(0, 1)


@command("pseudo-label", "pseudo-label ca1.tif -b exports/ca1 -o ca1-pseudo --truth ca1-labels.tif --truth-slices 0:8")
@click.argument("volume", type=PATH)
@bundle_option
@output_option("Folder of the result, or a .tif beside which it lies.", required=True)
@SETTINGS.option("--slices", "slices", SLICES, "Look only at these slices.")
@SETTINGS.option("--truth", "truth", PATH, "Labels of the volume, to choose the thresholds by.")
@SETTINGS.option("--truth-slices", "truth_slices", SLICES, "Slices labelled there.  [default: those that show objects]")
@SETTINGS.option("--wanted-precision", "precision", float, "Wanted part of right masks among the kept.  [default: 0.9]")
@SETTINGS.option("--right-iou", "right_iou", float, "IoU with an object of the truth from which a mask is right.")
@SETTINGS.option("--background-label", "background_labels", [int], "Label of the truth that is no object. Repeatable.")
@SETTINGS.flag("--sparse-truth", "sparse_truth", "The truth shows only some objects: judge no masks that meet none.")
@CRITERIA.option("--least-score", "score", PART, "Least detection score; with --truth it is chosen, unless given.")
@CRITERIA.option("--least-iou", "predicted_iou", PART, "Least predicted IoU; likewise.")
@CRITERIA.option("--least-stability", "stability", PART, "Least stability; likewise.")
@CRITERIA.option("--least-agreement", "agreement", PART, "Least agreement; likewise.")
@SETTINGS.option("--jitter", "jitter_fraction", float, "Error of the boxes that measure stability, part of the side.")
@SETTINGS.option("--repeats", "jitter_repeats", click.IntRange(1), "Number of such boxes for each mask.")
@SETTINGS.option("--seed", "seed", click.IntRange(0), "Source of these errors.")
@slice_options(SETTINGS)
@SETTINGS.flag("--restart", "restart", "Find the masks anew instead of resuming an earlier run in that folder.")
@runtime_options
@json_option
@click.pass_context
def pseudo_label(
    context: click.Context,
    volume: Path,
    *,
    bundle: Path | None,
    out: Path,
    also: tuple[OtherFormat, ...],
    boxes: Path | None,
    json_file: Path | None,
) -> None:
    """Label VOLUME with masks that are good enough to train on.

    A mask is kept by its detection score, its predicted IoU, its stability when the box is a little wrong, and its
    agreement with the neighbouring slices. With --truth the thresholds are those that keep most masks at the wanted
    precision; exit 1 where there are none. The folder gets the labels (0 is unlabelled, not background), masks.csv with
    the provenance of every mask, and a review list, worst first: review.html, review.csv and review-rois.zip for
    ImageJ. The masks are found once: the same command with other thresholds chooses among them anew.
    """
    from dendsam_deploy.evaluate.pseudo_labels import pseudo_label_volume
    from dendsam_deploy.evaluate.pseudo_options import PseudoLabelOptions
    from dendsam_deploy.report.review_page import write_review_page

    console: Console = context.obj
    least = {f"least_{name}": value for name, value in CRITERIA.given(context).items()}
    options = PseudoLabelOptions(out=out, also=also, **least, **SETTINGS.given(context))
    with open_inputs(context, volume, bundle, boxes, options) as (inputs, options):
        with console.progress() as progress:
            result = pseudo_label_volume(volume, inputs.session, options, progress)
        write_review_page(result, inputs.raw)
    for notice in result.notices:
        console.note(notice)
    console.result(summary(result), result.to_document(), json_file)
    if result.choice is not None and not result.reached:
        raise CheckFailedError(
            f"{result.out}: no thresholds keep enough masks at a precision of {result.choice.wanted:g}; no labels were "
            "written. Lower --wanted-precision, train longer, or label more slices"
        )


def summary(result: PseudoLabels) -> str:
    """Say in a few lines what was kept and how right it is."""
    lines = [
        f"{result.out}: {result.kept} of {result.masks} masks kept in slices {result.slices[0]}:{result.slices[1]}",
        f"kept are   {result.criteria}",
    ]
    if result.choice is not None:
        choice = result.choice
        lines.append(f"all masks  {share_text(choice.everything)}")
        lines.append(f"chosen on  {share_text(choice.chosen_on)}")
        if choice.left_out is not None:
            lines.append(f"left out   {share_text(choice.left_out)}, on slices that did not choose")
    return "\n".join(lines)


def share_text(share: Share) -> str:
    """Write a precision with its interval."""
    low, high = share.interval
    return f"{share.right} of {share.kept} right, precision {share.precision:.3f} ({low:.3f} to {high:.3f})"

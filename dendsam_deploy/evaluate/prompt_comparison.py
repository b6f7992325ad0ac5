"""The paper's comparison: boxes and points of the truth, boxes of the detector, and a grid of points, side by side."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from dendsam_deploy.bundle.bundle import Bundle
from dendsam_deploy.errors import InvalidArgumentError
from dendsam_deploy.evaluate.compared_bundle import BundleRun
from dendsam_deploy.evaluate.comparison_report import Comparison, ShownSlice
from dendsam_deploy.evaluate.labelled_slices import CompareOptions, LabelledStack
from dendsam_deploy.progress import Progress, ProgressCallback, no_progress
from dendsam_deploy.volume.open import open_labels, open_volume

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


def compare_prompts(
    volume: Path,
    truth: Path,
    bundles: Sequence[Path],
    options: CompareOptions | None = None,
    progress: ProgressCallback = no_progress,
) -> Comparison:
    """Segment labelled slices from every prompt source with every bundle, and score all alike.

    Parameters
    ----------
    volume, truth : Path
        A volume, and labels of its shape.
    bundles : sequence of Path
        The first one is what the others are compared with.
    options : CompareOptions, optional
        How.
    progress : callable
        Told after each slice of each bundle.

    Raises
    ------
    VolumeError
        A file cannot be read, the two differ in shape, or no object is there to be judged.
    InvalidArgumentError
        The slices are not in the volume, or no bundle is named.
    BundleError, MissingCapabilityError
        A bundle cannot be used, or lacks what a wanted source needs.
    """
    options = options or CompareOptions()
    if not bundles:
        raise InvalidArgumentError("there is no bundle to compare; name one with -b")
    opened = [Bundle.open(path) for path in bundles]
    with open_volume(volume) as raw, open_labels(truth) as labels:
        slices = LabelledStack.choose(raw, labels, opened[0].manifest, options)
        runs = [BundleRun(bundle, name, slices) for bundle, name in zip(opened, _names(opened), strict=True)]
        steps = len(runs) * len(slices.chosen)
        for number, run in enumerate(runs):
            with run.session:
                if slices.choosing:
                    progress(Progress("compare", number * len(slices.chosen), steps, f"{run.name}, the grid"))
                    run.choose_grid(slices.read(z) for z in slices.choosing)
                for done, z in enumerate(slices.chosen, start=number * len(slices.chosen)):
                    progress(Progress("compare", done, steps, f"{run.name}, slice {z}"))
                    run.add(slices.read(z))
        progress(Progress("compare", steps, steps))
    reports = [run.reports() for run in runs]
    return Comparison(
        volume=raw.info.source,
        truth=labels.info.source,
        slices=slices.chosen,
        options=options.to_document(),
        least_px=slices.least_px,
        bundles=tuple(run.described for run in runs),
        rows=tuple(row for run, own in zip(runs, reports, strict=True) for row in run.rows(own, reports[0])),
        curves=tuple(run.curve(own) for run, own in zip(runs, reports, strict=True) if options.curve_repeats),
        notes=(*_blank_note(runs[0].blank, options), *(note for run in runs for note in run.notes)),
        shown=_shown_by_all(runs),
    )


def _blank_note(blank: Sequence[int], options: CompareOptions) -> tuple[str, ...]:
    """Warn of slices without an object: unlabelled ones look the same as empty ones, but for what they do to scores."""
    if not blank or options.sparse_truth:
        return ()
    return (
        f"the truth shows no object to judge in slices {', '.join(map(str, blank))}: they score 1 where nothing was "
        "found and 0 where something was. If they are not labelled, leave them out with --slices",
    )


def _names(bundles: Sequence[Bundle]) -> list[str]:
    """Return a name for each bundle: its own, or its path where two have the same, numbered where it comes again."""
    own = [bundle.manifest.name for bundle in bundles]
    names = [name if own.count(name) == 1 else str(bundle.path) for name, bundle in zip(own, bundles, strict=True)]
    earlier = [names[:place].count(name) for place, name in enumerate(names)]
    return [f"{name} ({before + 1})" if before else name for name, before in zip(names, earlier, strict=True)]


def _shown_by_all(runs: Sequence[BundleRun]) -> ShownSlice | None:
    """Put what the bundles made of the shown slice together."""
    shown = [run.shown for run in runs if run.shown is not None]
    return None if not shown else replace(shown[0], labels={k: v for each in shown for k, v in each.labels.items()})

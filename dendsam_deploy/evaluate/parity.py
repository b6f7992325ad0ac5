"""Does the bundle do what its weights did? Every graph against the original modules, level by level.

Run first, judge later: comparisons measure, `limits` judges, and every row of the report carries the number by which
it passed or failed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dendsam_deploy.bundle.bundle import Bundle
from dendsam_deploy.bundle.parity import Combination, NotJudged, ParityReport
from dendsam_deploy.bundle.writer import write_parity
from dendsam_deploy.errors import BundleError, MissingCapabilityError
from dendsam_deploy.evaluate.judge import STEPS, compare_session
from dendsam_deploy.evaluate.truth import Originals, Truth, collect_truth
from dendsam_deploy.progress import Progress, ProgressCallback, no_progress
from dendsam_deploy.runtimes.choice import Choice
from dendsam_deploy.runtimes.session import SessionOptions, runnable_combinations, session_on

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@dataclass(frozen=True, slots=True)
class VerifyOptions:
    """What to compare with what.

    Parameters
    ----------
    sam, detector : Path or None
        Checkpoints that the bundle was exported from; their original modules are then run beside the graphs. None takes
        the outputs that were stored when the bundle was exported.
    session : SessionOptions
        Engines, devices and precisions to judge; what they leave open means all that the bundle has and this machine
        can run.
    box_counts : tuple of int
        Numbers of boxes in one call of the decoder.
    """

    sam: Path | None = None
    detector: Path | None = None
    session: SessionOptions = field(default_factory=SessionOptions)
    box_counts: tuple[int, ...] = (1, 3, 17, 64)


def verify_bundle(
    path: Path, options: VerifyOptions | None = None, progress: ProgressCallback = no_progress
) -> ParityReport:
    """Judge a bundle on every engine, device and precision, and write the result to its ``parity.json``.

    One combination after the other is loaded and judged, and written down at once. One that is not the only one asked
    for, and whose engine refuses the graphs, is reported as not judged.

    Parameters
    ----------
    path : Path
        The bundle.
    options : VerifyOptions, optional
        What to compare with what.
    progress : callable
        Told about each step.

    Raises
    ------
    BundleError, UnsafeFileError
        Where the bundle cannot be used.
    CheckpointError
        Where a checkpoint is not the one that the bundle was exported from.
    MissingCapabilityError
        Where no engine, or no torch for the checkpoints, is installed.
    """
    options = options or VerifyOptions()
    bundle = Bundle.open(path)
    combinations = runnable_combinations(bundle, options.session)
    total = 1 + len(combinations) * len(STEPS)
    progress(Progress("verify", 0, total, "reference"))
    truth = collect_truth(bundle, Originals(options.sam, options.detector, options.session.threads))
    report = ParityReport(())
    for index, combination in enumerate(combinations):

        def tell(step: str, combination: Combination = combination, done: int = 1 + index * len(STEPS)) -> None:
            progress(Progress("verify", done + STEPS.index(step), total, f"{combination}: {step}"))

        found = _judged(bundle, combination, truth, options, tell)
        if not found.rows and len(combinations) == 1:
            raise MissingCapabilityError(found.not_judged[0].reason)
        report = ParityReport(report.rows + found.rows, report.not_judged + found.not_judged)
        write_parity(bundle, report)
    progress(Progress("verify", total, total))
    return report


def _judged(
    bundle: Bundle, combination: Combination, truth: Truth, options: VerifyOptions, tell: Callable[[str], None]
) -> ParityReport:
    """Judge one combination; where its engine refuses the graphs, say so."""
    try:
        session = session_on(bundle, Choice(combination, is_proven=False), options.session)
        return compare_session(session, truth, options.box_counts, tell)
    except (MissingCapabilityError, BundleError) as error:
        return ParityReport((), (NotJudged(*combination, reason=str(error)),))

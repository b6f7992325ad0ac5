"""Does the bundle do what its weights did? Every graph against the original modules, level by level.

Run first, judge later: comparisons measure, `limits` judges, and every row of the report carries the number by which
it passed or failed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from dendsam_deploy.bundle.bundle import Bundle
from dendsam_deploy.bundle.parity import Combination, NotJudged, ParityReport
from dendsam_deploy.bundle.writer import write_parity
from dendsam_deploy.errors import BundleError, InvalidArgumentError, MissingCapabilityError, ParityError
from dendsam_deploy.evaluate.compare_scores import (
    LabelledSlices,
    SliceScores,
    compare_scores,
    read_labelled_slices,
    score_slices,
)
from dendsam_deploy.evaluate.findings import Finding
from dendsam_deploy.evaluate.judge import STEPS, compare_session, judge
from dendsam_deploy.evaluate.truth import FP32, Originals, Truth, collect_truth, reference_session
from dendsam_deploy.progress import Progress, ProgressCallback, no_progress
from dendsam_deploy.runtimes.choice import Choice
from dendsam_deploy.runtimes.session import SessionOptions, runnable_combinations, session_on

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from dendsam_deploy.bundle.parity import Reference
    from dendsam_deploy.runtimes.session import Session


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
    volume, truth : Path or None
        A volume and its ground truth: scores of the deployed chain are then compared with those of the reference.
    slices : (int, int) or None
        First slice of the volume to score and the one after the last; None takes a few spread evenly.
    """

    sam: Path | None = None
    detector: Path | None = None
    session: SessionOptions = field(default_factory=SessionOptions)
    box_counts: tuple[int, ...] = (1, 3, 17, 64)
    volume: Path | None = None
    truth: Path | None = None
    slices: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if (self.volume is None) != (self.truth is None) or (self.slices and self.volume is None):
            raise InvalidArgumentError("scores need a volume and its ground truth; give both --volume and --truth")


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
    steps = STEPS if options.volume is None else (*STEPS, "scores")
    total = 1 + len(combinations) * len(steps)
    progress(Progress("verify", 0, total, "reference"))
    subject = _subject(bundle, options)
    report = ParityReport(())
    for index, combination in enumerate(combinations):

        def tell(step: str, combination: Combination = combination, done: int = 1 + index * len(steps)) -> None:
            progress(Progress("verify", done + steps.index(step), total, f"{combination}: {step}"))

        found = _judged(subject, combination, tell)
        if not found.rows and len(combinations) == 1:
            raise MissingCapabilityError(found.not_judged[0].reason)
        report = found.merged_into(report)
        write_parity(bundle, report)
    progress(Progress("verify", total, total))
    return report


@dataclass(frozen=True, slots=True)
class _Subject:
    """A bundle, what it should return, and labelled slices with the reference's scores where there are any."""

    bundle: Bundle
    options: VerifyOptions
    truth: Truth
    slices: LabelledSlices | None
    scores: SliceScores | None


def _subject(bundle: Bundle, options: VerifyOptions) -> _Subject:
    """Run the reference."""
    originals = Originals(options.sam, options.detector, options.session.threads)
    if options.volume is None or options.truth is None:
        return _Subject(bundle, options, collect_truth(bundle, originals), None, None)
    slices = read_labelled_slices(options.volume, options.truth, options.slices)
    truth = collect_truth(bundle, originals)
    session, scores = reference_session(bundle, originals), None
    has_detector = any(graph.role == "detector" for graph in bundle.manifest.graphs)
    if session is not None and has_detector == (session.detector is not None):
        with session:
            scores = score_slices(session, slices)
    return _Subject(bundle, options, truth, slices, scores)


def _judged(subject: _Subject, combination: Combination, tell: Callable[[str], None]) -> ParityReport:
    """Judge one combination; where its engine refuses the graphs, say so."""
    options = subject.options
    try:
        wishes = replace(options.session, with_points=True)
        session = session_on(subject.bundle, Choice(combination, is_proven=False), wishes)
        report = compare_session(session, subject.truth, options.box_counts, tell)
        if subject.slices is None:
            return report
        tell("scores")
        findings = _scored(session, subject, subject.slices, combination)
    except (MissingCapabilityError, BundleError) as error:
        return ParityReport((), (NotJudged(*combination, reason=str(error)),))
    return replace(report, rows=report.rows + judge(findings, session, subject.truth))


def _scored(
    session: Session, subject: _Subject, slices: LabelledSlices, combination: Combination
) -> tuple[Finding, ...]:
    """Compare the scores of a session with those of the reference."""
    originals = (subject.options.sam, subject.options.detector)
    is_reference = combination == FP32 and originals == (None, None)
    try:
        with session:
            scores = score_slices(session, slices)
    except ParityError:  # NaN, which level 2 has counted
        return (Finding(5, "chain", "truth_pq", math.nan),)
    reference_from: Reference = "fp32" if originals == (None, None) else "torch"
    return tuple(compare_scores(scores, None if is_reference else subject.scores, reference_from))

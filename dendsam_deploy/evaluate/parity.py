"""Does the bundle do what its weights did? Every graph against the original modules, level by level.

Run first, judge later: comparisons measure, `limits` judges, and every row of the report carries the number by which
it passed or failed.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from dendsam_deploy.bundle.bundle import REFERENCE_FILE, Bundle
from dendsam_deploy.bundle.parity import ParityReport, ParityRow, Reference
from dendsam_deploy.bundle.reference import DetectorOutputs, ReferenceInputs, SamOutputs, load_reference
from dendsam_deploy.bundle.writer import write_parity
from dendsam_deploy.errors import BundleError, InvalidArgumentError, MissingCapabilityError
from dendsam_deploy.evaluate.compare_boxes import compare_boxes, detect
from dendsam_deploy.evaluate.compare_masks import compare_masks
from dendsam_deploy.evaluate.compare_preprocessing import compare_preprocessing
from dendsam_deploy.evaluate.compare_tensors import (
    compare_embeddings,
    compare_end_to_end,
    compare_logits,
    encode,
)
from dendsam_deploy.evaluate.limits import METRICS
from dendsam_deploy.progress import Progress, ProgressCallback, no_progress
from dendsam_deploy.runtimes.session import Session, SessionOptions, open_session

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path
    from types import ModuleType

    from dendsam_deploy.evaluate.findings import Finding

_STEPS = ("reference", "preprocessing", "encoder", "decoder", "detector", "masks")


@dataclass(frozen=True, slots=True)
class VerifyOptions:
    """What to compare with what.

    Parameters
    ----------
    sam, detector : Path or None
        Checkpoints that the bundle was exported from; their original modules are then run beside the graphs. None takes
        the outputs that were stored when the bundle was exported.
    session : SessionOptions
        Engine, device and precision to judge.
    box_counts : tuple of int
        Numbers of boxes in one call of the decoder.
    """

    sam: Path | None = None
    detector: Path | None = None
    session: SessionOptions = field(default_factory=SessionOptions)
    box_counts: tuple[int, ...] = (1, 3, 17, 64)


@dataclass(frozen=True, slots=True)
class Truth:
    """What the original modules make of the reference tiles, and whether they were run just now.

    Parameters
    ----------
    inputs : ReferenceInputs
        Tiles and boxes.
    sam : SamOutputs
        Of segment_anything.
    detector : DetectorOutputs or None
        Of ultralytics; None where the bundle's detector has no original but itself.
    sam_from, detector_from : str
        ``torch`` or ``stored``.
    """

    inputs: ReferenceInputs
    sam: SamOutputs
    detector: DetectorOutputs | None
    sam_from: Reference = "stored"
    detector_from: Reference = "stored"


def verify_bundle(
    path: Path, options: VerifyOptions | None = None, progress: ProgressCallback = no_progress
) -> ParityReport:
    """Judge a bundle on one engine, device and precision, and write the result to its ``parity.json``.

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
        Where an engine, or torch for the checkpoints, is not installed.
    """
    options = options or VerifyOptions()
    bundle = Bundle.open(path)
    progress(Progress("verify", 0, len(_STEPS), _STEPS[0]))
    truth = _truth(bundle, options)
    with open_session(bundle, options.session) as session:
        report = compare_session(session, truth, options.box_counts, progress)
    write_parity(bundle, report)
    return report


def compare_session(
    session: Session, truth: Truth, box_counts: tuple[int, ...], progress: ProgressCallback = no_progress
) -> ParityReport:
    """Judge an open session without touching any file.

    Parameters
    ----------
    session : Session
        The graphs.
    truth : Truth
        What they should return.
    box_counts : tuple of int
        Numbers of boxes in one call of the decoder.
    progress : callable
        Told about each step.
    """
    inputs, expected = truth.inputs, truth.sam
    if not all(1 <= count <= len(inputs.boxes) for count in box_counts):
        raise InvalidArgumentError(f"box counts {box_counts} do not fit the reference's {len(inputs.boxes)} boxes")
    rows: list[ParityRow] = []

    def judge(step: str, findings: Iterable[Finding]) -> None:
        progress(Progress("verify", _STEPS.index(step), len(_STEPS), step))
        rows.extend(_row(finding, session, truth) for finding in findings)

    judge("preprocessing", compare_preprocessing(session.manifest.preprocessing, inputs))
    embeddings = encode(session.encoder, inputs)
    judge("encoder", compare_embeddings(embeddings, expected.embeddings, inputs))
    judge("decoder", compare_logits(session, inputs, expected, box_counts))
    judge("decoder", compare_end_to_end(session, embeddings, inputs, expected))
    if session.detector is not None:
        found = detect(session.detector, inputs)
        confident = session.manifest.thresholds.detection_score
        judge("detector", compare_boxes(found, truth.detector, inputs, confident))
    judge("masks", compare_masks(session, embeddings, inputs, expected))
    progress(Progress("verify", len(_STEPS), len(_STEPS)))
    return ParityReport(tuple(sorted(rows, key=lambda row: row.level)))


def _row(finding: Finding, session: Session, truth: Truth) -> ParityRow:
    """Judge one finding."""
    limit, passed = METRICS[finding.metric].judge(finding.value, session.precision)
    return ParityRow(
        level=finding.level,
        graph=finding.graph,
        engine=session.engine,
        device=session.device,
        precision=session.precision,
        metric=f"{finding.metric}:{finding.detail}" if finding.detail else finding.metric,
        value=float(finding.value),
        limit=limit,
        passed=passed,
        reference=truth.detector_from if finding.graph == "detector" else truth.sam_from,
    )


def _truth(bundle: Bundle, options: VerifyOptions) -> Truth:
    """Collect the right answers: computed now where a checkpoint is given, stored otherwise."""
    path = bundle.extra_path(REFERENCE_FILE)
    if path is None:
        raise BundleError(
            f"{bundle.path}: has no {REFERENCE_FILE}, so there is nothing to compare with; export it again"
        )
    stored = load_reference(path, bundle.manifest.preprocessing.tile_size_px)
    sam, detector = stored.sam, stored.detector
    if options.sam is not None:
        sam = _sam_outputs(options.sam, bundle, stored.inputs)
    if options.detector is not None:
        detector = _detector_outputs(options.detector, bundle, stored.inputs)
    return Truth(
        inputs=stored.inputs,
        sam=sam,
        detector=detector,
        sam_from="stored" if options.sam is None else "torch",
        detector_from="stored" if options.detector is None else "torch",
    )


def _sam_outputs(checkpoint: Path, bundle: Bundle, inputs: ReferenceInputs) -> SamOutputs:
    """Run segment_anything's own modules."""
    encoder, decoder = _torch_reference().sam_runners(checkpoint, bundle.manifest)
    embeddings = encoder.run({"tiles": inputs.tiles, "sizes": inputs.sizes})["embeddings"]
    decoded = decoder.run(
        {
            "embeddings": embeddings,
            "boxes": inputs.boxes,
            "tile_index": inputs.tile_index,
            "region": np.array([embeddings.shape[-1]], np.int64),
        }
    )
    logits, iou = decoded["logits"], decoded["iou"]
    return SamOutputs(*(array.astype(np.float32, copy=False) for array in (embeddings, logits, iou)))


def _detector_outputs(checkpoint: Path, bundle: Bundle, inputs: ReferenceInputs) -> DetectorOutputs:
    """Run ultralytics' own network."""
    if checkpoint.suffix.lower() == ".onnx":
        raise InvalidArgumentError(f"{checkpoint}: a detector in ONNX has no original to compare with; leave it out")
    return detect(_torch_reference().detector_runner(checkpoint, bundle.manifest), inputs)


def _torch_reference() -> ModuleType:
    """Import the original modules, which only the training installation has."""
    try:
        return importlib.import_module("dendsam_deploy.runtimes.torch_reference")
    except ImportError as error:
        raise MissingCapabilityError(
            f"comparing with checkpoints needs torch ({error}); install dendsam-deploy[train], or leave the checkpoints"
            " out to compare with the outputs stored in the bundle"
        ) from error

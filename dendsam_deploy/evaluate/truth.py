"""What the original modules make of the reference tiles: the right answers that graphs are compared with."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from dendsam_deploy.bundle.bundle import REFERENCE_FILE
from dendsam_deploy.bundle.parity import Combination, Reference
from dendsam_deploy.bundle.reference import ReferenceInputs, SamOutputs, load_reference
from dendsam_deploy.errors import BundleError, InvalidArgumentError, MissingCapabilityError
from dendsam_deploy.evaluate.compare_boxes import Prompts, detect, sure_objects
from dendsam_deploy.evaluate.findings import run_graph
from dendsam_deploy.geometry import EMBEDDING_STRIDE_PX, LOGIT_STRIDE_PX
from dendsam_deploy.runtimes.session import ENGINES, Session, SessionOptions

if TYPE_CHECKING:
    from pathlib import Path
    from types import ModuleType

    from numpy.typing import NDArray

    from dendsam_deploy.bundle.bundle import Bundle
    from dendsam_deploy.bundle.manifest import Role
    from dendsam_deploy.bundle.reference import DetectorOutputs, PointAnswers, StoredReference
    from dendsam_deploy.runtimes.runner import Runner

FP32 = Combination("onnxruntime", "cpu", "fp32")
"""What answers for the original modules where these are not at hand: proved against them, and installed everywhere."""

_BOXES_PER_CALL = 16


@dataclass(frozen=True, slots=True)
class DetectedObjects:
    """Objects that the reference's detector is sure of, and what the reference makes of them.

    Parameters
    ----------
    prompts : Prompts
        The objects.
    logits : ndarray, shape (N, S/4, S/4), float32
        Their masks on the whole grid.
    iou : ndarray, shape (N,), float32
        Predicted IoU.
    masks_from : str
        ``torch`` or ``fp32``.
    """

    prompts: Prompts
    logits: NDArray[np.float32]
    iou: NDArray[np.float32]
    masks_from: Reference


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
        Of ultralytics. Of a detector that came as a graph, its fp32 graph; None where there is no such detector.
    stored_detector : DetectorOutputs or None
        What was stored about the detector when the bundle was exported.
    detected : DetectedObjects or None
        Detector and SAM together.
    sam_from, detector_from : str
        ``torch``, ``stored`` or ``fp32``.
    points : PointAnswers or None
        Of segment_anything for clicks; None where the bundle takes none.
    """

    inputs: ReferenceInputs
    sam: SamOutputs
    detector: DetectorOutputs | None
    stored_detector: DetectorOutputs | None = None
    detected: DetectedObjects | None = None
    sam_from: Reference = "stored"
    detector_from: Reference = "stored"
    points: PointAnswers | None = None


@dataclass(frozen=True, slots=True)
class Originals:
    """Checkpoints to run beside the graphs, in place of what was stored or of the fp32 graphs.

    Parameters
    ----------
    sam, detector : Path or None
        The files that the bundle was exported from.
    threads : int or None
        Threads of the fp32 graphs.
    """

    sam: Path | None = None
    detector: Path | None = None
    threads: int | None = None


def collect_truth(bundle: Bundle, originals: Originals) -> Truth:
    """Collect the right answers: computed now where a checkpoint is given, stored otherwise.

    Raises
    ------
    BundleError
        Where the bundle has no usable reference.
    CheckpointError
        Where a checkpoint is not the one that the bundle was exported from.
    MissingCapabilityError
        Where there are checkpoints but no torch.
    """
    path = bundle.extra_path(REFERENCE_FILE)
    if path is None:
        raise BundleError(
            f"{bundle.path}: has no {REFERENCE_FILE}, so there is nothing to compare with; export it again"
        )
    stored = load_reference(path, bundle.manifest.preprocessing.tile_size_px)
    session = reference_session(bundle, originals)
    sam = stored.sam if originals.sam is None or session is None else _sam_outputs(session, stored.inputs)
    detector, detector_from = _detector_outputs(session, stored, originals)
    detected = None
    if detector is not None and session is not None:
        prompts = sure_objects(detector, stored.inputs, bundle.manifest.thresholds)
        detected = _detected(prompts, sam, session.decoder, "fp32" if originals.sam is None else "torch")
    return Truth(
        inputs=stored.inputs,
        sam=sam,
        detector=detector,
        stored_detector=stored.detector,
        detected=detected,
        sam_from="stored" if originals.sam is None else "torch",
        detector_from=detector_from,
        points=_point_answers(bundle, stored, sam, originals),
    )


def reference_session(bundle: Bundle, originals: Originals) -> Session | None:
    """Return a session that answers for the weights: the original modules where they are given, fp32 graphs elsewhere.

    Returns
    -------
    Session or None
        Not open. None where neither is there for the encoder or the decoder.
    """
    manifest, options = bundle.manifest, SessionOptions(*FP32, threads=originals.threads)

    def graph(role: Role) -> Runner | None:
        spec = manifest.graph(role, FP32.precision)
        return ENGINES[FP32.engine](bundle.graph_path(role, FP32.precision), spec, options) if spec else None

    encoder, decoder, detector = graph("encoder"), graph("decoder"), graph("detector")
    if originals.sam is not None:
        encoder, decoder = _torch_reference().sam_runners(originals.sam, manifest)
    if originals.detector is not None:
        if originals.detector.suffix.lower() == ".onnx":
            raise InvalidArgumentError(
                f"{originals.detector}: a detector in ONNX has no original to compare with; leave it out"
            )
        detector = _torch_reference().detector_runner(originals.detector, manifest)
    return None if encoder is None or decoder is None else Session(manifest, encoder, decoder, detector)


def _sam_outputs(session: Session, inputs: ReferenceInputs) -> SamOutputs:
    """Run segment_anything's own modules."""
    with session.encoder as encoder:
        encoded = run_graph(encoder, {"tiles": inputs.tiles, "sizes": inputs.sizes})
    embeddings: NDArray[np.float32] = encoded["embeddings"].astype(np.float32, copy=False)
    with session.decoder as decoder:
        logits, iou = _whole_masks(decoder, embeddings, inputs.boxes, inputs.tile_index)
    return SamOutputs(embeddings, logits, iou)


def _detector_outputs(
    session: Session | None, stored: StoredReference, originals: Originals
) -> tuple[DetectorOutputs | None, Reference]:
    """Return a detector's candidates in the reference tiles, and where they come from."""
    if stored.detector is not None and originals.detector is None:
        return stored.detector, "stored"
    if session is None or session.detector is None:
        return None, "stored"
    with session.detector as detector:
        return detect(detector, stored.inputs), "fp32" if originals.detector is None else "torch"


def _point_answers(
    bundle: Bundle, stored: StoredReference, sam: SamOutputs, originals: Originals
) -> PointAnswers | None:
    """Return what the stored clicks give: run segment_anything's own predictor where its checkpoint is given."""
    known = stored.points
    if known is None or originals.sam is None:
        return known
    runner = _torch_reference().points_runner(originals.sam, bundle.manifest)
    inputs = {name: getattr(known, name) for name in ("points", "labels", "tile_index")}
    outputs = run_graph(runner, {"embeddings": sam.embeddings, **inputs})
    logits, iou = (outputs[name].astype(np.float32, copy=False) for name in ("logits", "iou"))
    return replace(known, logits=logits, iou=iou)


def _detected(prompts: Prompts, sam: SamOutputs, decoder: Runner, masks_from: Reference) -> DetectedObjects:
    """Decode the objects of a detector from the reference's embeddings."""
    with decoder:
        logits, iou = _whole_masks(decoder, sam.embeddings, prompts.detections.boxes_xyxy, prompts.tile_index)
    return DetectedObjects(prompts, logits, iou, masks_from)


def _whole_masks(
    decoder: Runner, embeddings: NDArray[np.float32], boxes: NDArray[np.float32], tile_index: NDArray[np.int64]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return the masks of boxes on the whole grid, and their predicted IoU."""
    cells = embeddings.shape[-1]
    grid = cells * EMBEDDING_STRIDE_PX // LOGIT_STRIDE_PX
    logits, iou = np.zeros((len(boxes), grid, grid), np.float32), np.zeros(len(boxes), np.float32)
    for start in range(0, len(boxes), _BOXES_PER_CALL):
        some = slice(start, start + _BOXES_PER_CALL)
        tensors: dict[str, NDArray[np.generic]] = {
            "embeddings": embeddings,
            "boxes": boxes[some],
            "tile_index": tile_index[some],
            "region": np.array([cells], np.int64),
        }
        outputs = run_graph(decoder, tensors)
        logits[some], iou[some] = outputs["logits"], outputs["iou"]
    return logits, iou


def _torch_reference() -> ModuleType:
    """Import the original modules, which only the training installation has."""
    try:
        return importlib.import_module("dendsam_deploy.runtimes.torch_reference")
    except ImportError as error:
        raise MissingCapabilityError(
            f"comparing with checkpoints needs torch ({error}); install dendsam-deploy[train], or leave the checkpoints"
            " out to compare with the outputs stored in the bundle"
        ) from error

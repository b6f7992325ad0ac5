"""The detector's part of a bundle, whichever kind of file it comes from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dendsam_deploy.bundle.manifest import Source
from dendsam_deploy.export.foreign_detector import ForeignDetectorOptions, wrap_detector
from dendsam_deploy.export.graphs import GraphExport, describe_graph, onnx_from_torch
from dendsam_deploy.export.reference import checkpoint_digest, detector_outputs
from dendsam_deploy.models.detector import load_detector
from dendsam_deploy.models.detector_graph import DetectorGraph
from dendsam_deploy.models.detector_scale import detector_input_size
from dendsam_deploy.models.reference import OriginalDetector
from dendsam_deploy.models.weights import sha256_of

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from dendsam_deploy.bundle.manifest import GraphSpec, Preprocessing
    from dendsam_deploy.bundle.reference import DetectorOutputs, ReferenceInputs
    from dendsam_deploy.export.precision import Rung


@dataclass(frozen=True, slots=True)
class ExportedDetector:
    """What a detector adds to a bundle.

    Parameters
    ----------
    graph : GraphSpec
        The graph that was written.
    source : Source
        Where it comes from.
    outputs : DetectorOutputs or None
        What the original finds on the reference tiles; None for a foreign graph, which is its own original.
    training : mapping
        What its checkpoint records about its training.
    score_threshold : float or None
        The least score that its training found best.
    """

    graph: GraphSpec
    source: Source
    outputs: DetectorOutputs | None
    training: Mapping[str, object] = field(default_factory=dict)
    score_threshold: float | None = None


def export_detector_at(path: Path, folder: Path, preprocessing: Preprocessing, rung: Rung) -> GraphSpec | None:
    """Write a detector at half precision; None where it stays at fp32.

    A foreign graph stays as its author made it. ONNX has no convolution at bf16 before opset 22.
    """
    if path.suffix.lower() == ".onnx" or rung.precision == "bf16":
        return None
    export = GraphExport("detector", preprocessing.tile_size_px, rung.precision)
    detector = load_detector(path)
    size = detector_input_size(detector, preprocessing)
    module = DetectorGraph(detector, export.tile_size_px, size, compute=rung.dtype)
    return onnx_from_torch(module, export, folder / export.file)


def export_detector(path: Path, out: Path, preprocessing: Preprocessing, inputs: ReferenceInputs) -> ExportedDetector:
    """Write a detector as the bundle's detector graph.

    Parameters
    ----------
    path : Path
        An Ultralytics checkpoint or description, or a detector in ONNX.
    out : Path
        The file to write.
    preprocessing : Preprocessing
        How the bundle prepares tiles.
    inputs : ReferenceInputs
        The tiles of the stored reference.

    Raises
    ------
    CheckpointError, UnsafeFileError
        Where the file is no detector, or reading it could run code.
    """
    export = GraphExport("detector", preprocessing.tile_size_px)
    if path.suffix.lower() == ".onnx":
        wrap_detector(path, out, ForeignDetectorOptions(export.tile_size_px))
        source = Source("detector", "onnx", checkpoint_digest(path, sha256_of(path)))
        return ExportedDetector(describe_graph(out, export), source, outputs=None)
    detector = load_detector(path)
    module = DetectorGraph(detector, export.tile_size_px, detector_input_size(detector, preprocessing))
    original = OriginalDetector(detector.network, module.input_size_px)
    return ExportedDetector(
        graph=onnx_from_torch(module, export, out),
        source=Source("detector", detector.architecture, checkpoint_digest(path, detector.sha256)),
        outputs=detector_outputs(original, inputs, module.candidates),
        training=detector.record.summary if detector.record else {},
        score_threshold=detector.record.score_threshold if detector.record else None,
    )

"""From weights to a bundle: three graphs, a stored reference, a model card, and a proof before it gets its name."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from dendsam_deploy import __version__
from dendsam_deploy.bundle.bundle import MODEL_CARD_FILE, REFERENCE_FILE
from dendsam_deploy.bundle.manifest import (
    SCHEMA_VERSION,
    Decoding,
    GraphSpec,
    Manifest,
    Preprocessing,
    Source,
    Thresholds,
)
from dendsam_deploy.bundle.parity import ParityReport
from dendsam_deploy.bundle.reference import StoredReference, save_reference
from dendsam_deploy.bundle.writer import BundleWriter
from dendsam_deploy.durable import storage_errors, write_text
from dendsam_deploy.errors import InvalidArgumentError, ParityError
from dendsam_deploy.export.graphs import GraphExport, onnx_from_torch
from dendsam_deploy.export.model_card import TrainingFacts, model_card
from dendsam_deploy.export.options import DEFAULT_THRESHOLDS, ExportOptions
from dendsam_deploy.export.reference import ReferenceOptions, checkpoint_digest, reference_inputs, sam_outputs
from dendsam_deploy.geometry import EMBEDDING_STRIDE_PX, default_overlap_px
from dendsam_deploy.models.box_decoder import BoxDecoderGraph
from dendsam_deploy.models.image_encoder import ImageEncoderGraph
from dendsam_deploy.models.weights import TrainingRecord, load_sam
from dendsam_deploy.progress import Progress, ProgressCallback, no_progress

if TYPE_CHECKING:
    from dendsam_deploy.bundle.reference import ReferenceInputs
    from dendsam_deploy.export.detector import ExportedDetector

Gate = Callable[[Path], ParityReport]
"""Judges a finished but unpublished bundle; `evaluate.parity.verify_bundle` with its options filled in."""

_REGION_SIZES = (8, 16, 32, 64)
_STEPS = ("reading the weights", "detector", "encoder", "decoder", "reference", "verifying")
_PRODUCERS = ("torch", "onnx", "onnxscript", "segment-anything")


def export_bundle(options: ExportOptions, gate: Gate | None = None, progress: ProgressCallback = no_progress) -> Path:
    """Write a bundle.

    Parameters
    ----------
    options : ExportOptions
        What to export.
    gate : callable, optional
        Judges the bundle before it gets its name. Without one the bundle is published as *unproven*.
    progress : callable
        Told about each step.

    Returns
    -------
    Path
        The bundle's folder.

    Raises
    ------
    CheckpointError
        Where weights cannot be read.
    UnsafeFileError
        Where reading them could run code.
    ParityError
        Where the gate found a difference beyond the limits; nothing is published then.
    InvalidArgumentError, StorageError
        Where the folder exists or cannot be written.
    """
    with BundleWriter(options.out, overwrite=options.overwrite) as writer:
        parts = _write_graphs(options, writer.folder, progress)
        with storage_errors(options.out):
            save_reference(writer.folder / REFERENCE_FILE, parts.reference)
        manifest = _manifest(options, parts)
        write_text(writer.folder / MODEL_CARD_FILE, model_card(manifest, parts.facts))
        writer.write_manifest(replace(manifest, extra_files=writer.digest(REFERENCE_FILE, MODEL_CARD_FILE)))
        if gate is not None:
            _step(progress, "verifying")
            _pass(gate, writer.folder, options.out)
    progress(Progress("export", len(_STEPS), len(_STEPS), str(options.out)))
    return options.out


@dataclass(frozen=True, slots=True)
class _Parts:
    """What the weights were turned into."""

    model_type: str
    preprocessing: Preprocessing
    sources: tuple[Source, ...]
    graphs: tuple[GraphSpec, ...]
    reference: StoredReference
    facts: TrainingFacts
    thresholds: Thresholds = DEFAULT_THRESHOLDS


def _write_graphs(options: ExportOptions, folder: Path, progress: ProgressCallback) -> _Parts:
    """Read the weights, write the graphs, and let the original modules compute the reference."""
    _step(progress, "reading the weights")
    loaded = load_sam(options.sam, options.image_size_px)
    preprocessing = _preprocessing(options, loaded.record)
    size = preprocessing.tile_size_px
    inputs = reference_inputs(ReferenceOptions(size, options.reference_volume))
    _step(progress, "detector")  # first: a wrong file is found before minutes are spent on the encoder
    detector = None if options.detector is None else _export_detector(options.detector, folder, preprocessing, inputs)
    _step(progress, "encoder")
    encoder = onnx_from_torch(ImageEncoderGraph(loaded.sam), GraphExport("encoder", size), folder / "encoder.onnx")
    _step(progress, "decoder")
    decoder = onnx_from_torch(BoxDecoderGraph(loaded.sam), GraphExport("decoder", size), folder / "decoder.onnx")
    _step(progress, "reference")
    sam = Source("sam", loaded.record.model_type, checkpoint_digest(options.sam, loaded.sha256))
    parts = _Parts(
        model_type=loaded.record.model_type,
        preprocessing=preprocessing,
        sources=(sam,),
        graphs=(encoder, decoder),
        reference=StoredReference(inputs, sam_outputs(loaded.sam, inputs), None),
        facts=TrainingFacts(loaded.record.summary, {}),
    )
    return parts if detector is None else _with_detector(parts, detector)


def _export_detector(
    path: Path, folder: Path, preprocessing: Preprocessing, inputs: ReferenceInputs
) -> ExportedDetector:
    """Write the detector's graph."""
    # ultralytics takes seconds to import, and a bundle without a detector needs none of it.
    from dendsam_deploy.export.detector import export_detector  # noqa: PLC0415  (see above)

    return export_detector(path, folder / "detector.onnx", preprocessing, inputs)


def _with_detector(parts: _Parts, detector: ExportedDetector) -> _Parts:
    """Add a detector."""
    score = detector.score_threshold
    return replace(
        parts,
        thresholds=parts.thresholds if score is None else replace(parts.thresholds, detection_score=score),
        sources=(*parts.sources, detector.source),
        graphs=(*parts.graphs, detector.graph),
        reference=replace(parts.reference, detector=detector.outputs),
        facts=replace(parts.facts, detector=detector.training),
    )


def _preprocessing(options: ExportOptions, record: TrainingRecord) -> Preprocessing:
    """Settle how tiles are prepared: as the checkpoint records it, unless the options say otherwise."""
    size = record.image_size
    overlap = default_overlap_px(size) if options.overlap_px is None else options.overlap_px
    if not 0 <= overlap < size:
        raise InvalidArgumentError(
            f"an overlap of {overlap} px does not fit tiles of {size} px; choose 0 to {size - 1}"
        )
    for name, value in (("model_pixel_size_nm", options.model_pixel_size_nm), ("zoom", options.zoom)):
        if value is not None and not value > 0:
            raise InvalidArgumentError(f"{name} is {value}, expected a positive number")
    pixel_size = options.model_pixel_size_nm or record.model_pixel_size_nm
    return Preprocessing("minmax_uint8", size, overlap, pixel_size, options.zoom or record.zoom)


def _manifest(options: ExportOptions, parts: _Parts) -> Manifest:
    """Describe the bundle; the list of extra files is left to the caller."""
    cells = parts.preprocessing.tile_size_px // EMBEDDING_STRIDE_PX
    now = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
    is_yolo = any(source.role == "detector" and source.kind != "onnx" for source in parts.sources)
    packages = (*_PRODUCERS, *(("ultralytics",) if is_yolo else ()))
    return Manifest(
        schema_version=SCHEMA_VERSION,
        name=options.name or options.out.name,
        created_utc=now.isoformat().replace("+00:00", "Z"),
        licence=options.licence,
        model_type=parts.model_type,
        sources=parts.sources,
        graphs=parts.graphs,
        preprocessing=parts.preprocessing,
        decoding=Decoding(
            region_sizes=(*(size for size in _REGION_SIZES if size < cells), cells),
            margin_fraction=options.margin_fraction,
            margin_px=options.margin_px,
        ),
        thresholds=options.thresholds or parts.thresholds,
        producers={"dendsam-deploy": __version__} | {package: metadata.version(package) for package in packages},
        extra_files=(),
    )


def _pass(gate: Gate, folder: Path, out: Path) -> None:
    """Raise unless the gate lets the bundle pass."""
    report = gate(folder)
    if not report.passed:
        worst = "; ".join(
            f"{row.graph} {row.metric} {row.value:.3g} (limit {'none' if row.limit is None else f'{row.limit:g}'})"
            for row in report.failures[:3]
        )
        raise ParityError(
            f"{out}: the graphs differ from their weights in {len(report.failures)} of {len(report.rows)} checks: "
            f"{worst}; nothing was published (--no-verify publishes it as unproven)"
        )


def _step(progress: ProgressCallback, name: str) -> None:
    """Report the beginning of a step."""
    progress(Progress("export", _STEPS.index(name), len(_STEPS), name))

"""From weights to a bundle: its graphs, a stored reference, a model card, and a proof before it gets its name."""

from __future__ import annotations

import datetime
from dataclasses import dataclass, replace
from importlib import metadata
from typing import TYPE_CHECKING

from dendsam_deploy import __version__
from dendsam_deploy.bundle.bundle import REFERENCE_FILE
from dendsam_deploy.bundle.manifest import SCHEMA_VERSION, Decoding, GraphSpec, Manifest, Preprocessing, Source
from dendsam_deploy.bundle.reference import StoredReference, save_reference
from dendsam_deploy.bundle.writer import BundleWriter
from dendsam_deploy.durable import storage_errors
from dendsam_deploy.errors import InvalidArgumentError, ParityError
from dendsam_deploy.export.attention import Stopwatch, choose_attention
from dendsam_deploy.export.draft import (
    Draft,
    Gate,
    Weights,
    decoder_graph,
    differences,
    encoder_graph,
    failed_engines,
    is_refused,
    points_graph,
)
from dendsam_deploy.export.model_card import TrainingFacts
from dendsam_deploy.export.options import DEFAULT_THRESHOLDS, ExportOptions
from dendsam_deploy.export.parser_support import unsupported_nodes
from dendsam_deploy.export.precision import Rung, Tell, check_precisions, with_precision
from dendsam_deploy.export.reference import (
    ReferenceOptions,
    checkpoint_digest,
    point_answers,
    reference_inputs,
    sam_outputs,
)
from dendsam_deploy.geometry import EMBEDDING_STRIDE_PX, default_overlap_px
from dendsam_deploy.models.weights import TrainingRecord, load_sam
from dendsam_deploy.progress import Progress, ProgressCallback, no_progress

if TYPE_CHECKING:
    from pathlib import Path

    from dendsam_deploy.bundle.reference import ReferenceInputs
    from dendsam_deploy.export.detector import ExportedDetector

_REGION_SIZES = (8, 16, 32, 64)
_STEPS = ("reading the weights", "detector", "encoder", "decoder", "reference", "verifying", "other precisions")
_PRODUCERS = ("torch", "onnx", "onnxscript", "segment-anything")


@dataclass(frozen=True, slots=True)
class Judges:
    """Who decides what is published; handed in, because this layer runs no engine.

    Parameters
    ----------
    gate : callable or None
        Judges each precision before the bundle gets its name. Without one the bundle is published as *unproven*.
    stopwatch : callable or None
        Times the forms of attention, see `attention.choose_attention`; `evaluate.stopwatch.time_encoder`.
    """

    gate: Gate | None = None
    stopwatch: Stopwatch | None = None


def no_notice(sentence: str) -> None:
    """Tell nobody."""


def export_bundle(
    options: ExportOptions,
    judges: Judges | None = None,
    progress: ProgressCallback = no_progress,
    tell: Tell = no_notice,
) -> Path:
    """Write a bundle.

    Parameters
    ----------
    options : ExportOptions
        What to export.
    judges : Judges, optional
        Who decides what is published.
    progress : callable
        Told about each step.
    tell : callable
        Told about each precision that fails its proof, and what takes its place.

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
        Where the gate found a difference of the fp32 graphs beyond the limits; nothing is published then.
    InvalidArgumentError, StorageError
        Where the folder exists or cannot be written, or the weights have no graphs at a precision.
    """
    judges = judges or Judges()
    with BundleWriter(options.out, overwrite=options.overwrite) as writer:
        draft = Draft(writer, *_fp32_parts(options, judges, writer.folder, progress), judges.gate)
        draft.describe()
        _step(progress, "verifying")
        draft, found = draft.judged("fp32")
        if is_refused(found):
            raise ParityError(
                f"{options.out}: {differences(found)}; nothing was published (--no-verify publishes it as unproven)"
            )
        for sentence in failed_engines(found):
            tell(sentence)
        _step(progress, "other precisions")
        for precision in dict.fromkeys(options.precisions):  # one that is named twice is made once
            draft = with_precision(draft, precision, tell)
        _tell_what_tensorrt_refuses(draft, tell)
        draft.record_proof()
    progress(Progress("export", len(_STEPS), len(_STEPS), str(options.out)))
    return options.out


def _fp32_parts(
    options: ExportOptions, judges: Judges, folder: Path, progress: ProgressCallback
) -> tuple[Weights, Manifest, TrainingFacts]:
    """Read the weights, write the graphs, and let the original modules compute the reference."""
    _step(progress, "reading the weights")
    loaded = load_sam(options.sam, options.image_size_px)
    check_precisions(loaded.sam, loaded.record.model_type, options.precisions)
    preprocessing = _preprocessing(options, loaded.record)
    weights = Weights(loaded.sam, options.detector, preprocessing, options.reference_volume)
    inputs = reference_inputs(ReferenceOptions(preprocessing.tile_size_px, options.reference_volume))
    _step(progress, "detector")  # first: a wrong file is found before minutes are spent on the encoder
    detector = None if options.detector is None else _export_detector(options.detector, folder, preprocessing, inputs)
    _step(progress, "encoder")
    rung = Rung("fp32", choose_attention(loaded.sam, options.attention, judges.stopwatch))
    encoder = encoder_graph(weights, rung, folder)
    _step(progress, "decoder")
    decoder = decoder_graph(weights, rung, folder)
    points = (points_graph(weights, folder),) if options.points else ()
    _step(progress, "reference")
    outputs = None if detector is None else detector.outputs
    with storage_errors(options.out):
        answers = sam_outputs(loaded.sam, inputs)
        clicks = point_answers(loaded.sam, inputs, answers.embeddings) if points else None
        save_reference(folder / REFERENCE_FILE, StoredReference(inputs, answers, outputs, clicks))
    source = Source("sam", loaded.record.model_type, checkpoint_digest(options.sam, loaded.sha256))
    manifest = _manifest(options, weights, source, (encoder, decoder, *points))
    facts = TrainingFacts(loaded.record.summary, {})
    if detector is None:
        return weights, manifest, facts
    return weights, _with_detector(options, manifest, detector), replace(facts, detector=detector.training)


def _export_detector(
    path: Path, folder: Path, preprocessing: Preprocessing, inputs: ReferenceInputs
) -> ExportedDetector:
    """Write the detector's graph."""
    # ultralytics takes seconds to import, and a bundle without a detector needs none of it.
    from dendsam_deploy.export.detector import export_detector  # noqa: PLC0415  (see above)

    return export_detector(path, folder / "detector.onnx", preprocessing, inputs)


def _with_detector(options: ExportOptions, manifest: Manifest, detector: ExportedDetector) -> Manifest:
    """Add a detector, and the threshold that its training found best where the user names none."""
    score = detector.score_threshold
    thresholds = manifest.thresholds
    if score is not None and options.thresholds is None:
        thresholds = replace(thresholds, detection_score=score)
    producers = manifest.producers
    if detector.source.kind != "onnx":
        producers = producers | {"ultralytics": metadata.version("ultralytics")}
    return replace(
        manifest,
        thresholds=thresholds,
        producers=producers,
        sources=(*manifest.sources, detector.source),
        graphs=(*manifest.graphs, detector.graph),
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


def _manifest(options: ExportOptions, weights: Weights, source: Source, graphs: tuple[GraphSpec, ...]) -> Manifest:
    """Describe the bundle; the list of extra files is left to the draft."""
    cells = weights.preprocessing.tile_size_px // EMBEDDING_STRIDE_PX
    now = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
    return Manifest(
        schema_version=SCHEMA_VERSION,
        name=options.name or options.out.name,
        created_utc=now.isoformat().replace("+00:00", "Z"),
        licence=options.licence,
        model_type=source.kind,
        sources=(source,),
        graphs=graphs,
        preprocessing=weights.preprocessing,
        decoding=Decoding(
            region_sizes=(*(size for size in _REGION_SIZES if size < cells), cells),
            margin_fraction=options.margin_fraction,
            margin_px=options.margin_px,
        ),
        thresholds=options.thresholds or DEFAULT_THRESHOLDS,
        producers={"dendsam-deploy": __version__} | {package: metadata.version(package) for package in _PRODUCERS},
        extra_files=(),
    )


def _tell_what_tensorrt_refuses(draft: Draft, tell: Tell) -> None:
    """Say which graphs a GPU will have to run on another engine, as a detector from elsewhere may have to."""
    for graph in draft.manifest.graphs:
        # Quantised inputs are uint8, which CPUs are fastest with and TensorRT does not take: int8 is for CPUs.
        refused = [] if graph.precision == "int8" else unsupported_nodes(draft.writer.folder / graph.files[0].file)
        if refused:
            more = f", and {len(refused) - 1} more" if len(refused) > 1 else ""
            tell(f"{graph.files[0].file}: TensorRT's parser will refuse it ({refused[0]}{more})")


def _step(progress: ProgressCallback, name: str) -> None:
    """Report the beginning of a step."""
    progress(Progress("export", _STEPS.index(name), len(_STEPS), name))

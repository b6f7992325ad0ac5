"""A bundle under construction: weights on one side, graphs and their proof on the other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dendsam_deploy.bundle.bundle import MODEL_CARD_FILE, REFERENCE_FILE, Bundle
from dendsam_deploy.bundle.manifest import GraphSpec, Manifest, Precision, Preprocessing
from dendsam_deploy.bundle.parity import ParityReport
from dendsam_deploy.bundle.writer import BundleWriter, write_parity
from dendsam_deploy.durable import write_text
from dendsam_deploy.errors import MissingCapabilityError
from dendsam_deploy.export.graphs import GraphExport, onnx_from_torch
from dendsam_deploy.export.model_card import TrainingFacts, model_card
from dendsam_deploy.models.box_decoder import BoxDecoderGraph
from dendsam_deploy.models.image_encoder import ImageEncoderGraph
from dendsam_deploy.models.plain_encoder import PlainEncoder
from dendsam_deploy.models.point_decoder import PointDecoderGraph

if TYPE_CHECKING:
    from segment_anything.modeling import Sam

    from dendsam_deploy.export.precision import Rung

Gate = Callable[[Path, Precision], ParityReport]
"""Judges an unpublished bundle at one precision; `evaluate.parity.verify_bundle` with its options filled in."""


@dataclass(frozen=True, slots=True)
class Weights:
    """What graphs are made of: a SAM, the detector's file where there is one, how tiles are prepared, and a volume."""

    sam: Sam
    detector: Path | None
    preprocessing: Preprocessing
    volume: Path | None


@dataclass(frozen=True, slots=True)
class Draft:
    """A bundle that has its fp32 graphs but not yet its name.

    Parameters
    ----------
    writer : BundleWriter
        Holds the folder.
    weights : Weights
        What further graphs are made of.
    manifest : Manifest
        Describes the graphs that are there.
    facts : TrainingFacts
        For the model card.
    gate : callable or None
        Judges a precision; None where nothing is to be proven.
    proof : ParityReport
        What it found so far.
    """

    writer: BundleWriter
    weights: Weights
    manifest: Manifest
    facts: TrainingFacts
    gate: Gate | None
    proof: ParityReport = field(default_factory=lambda: ParityReport(()))

    def describe(self) -> None:
        """Write model card and manifest for the graphs that are there; the folder is a bundle from then on."""
        write_text(self.writer.folder / MODEL_CARD_FILE, model_card(self.manifest, self.facts))
        extra_files = self.writer.digest(REFERENCE_FILE, MODEL_CARD_FILE)
        self.writer.write_manifest(replace(self.manifest, extra_files=extra_files))

    def with_graphs(self, graphs: tuple[GraphSpec, ...]) -> Draft:
        """Return the draft with further graphs, described."""
        draft = replace(self, manifest=replace(self.manifest, graphs=(*self.manifest.graphs, *graphs)))
        draft.describe()
        return draft

    def judged(self, precision: Precision) -> tuple[Draft, ParityReport]:
        """Let the gate judge a precision; the report has no rows where there is no gate or no engine for it."""
        if self.gate is None:
            return self, ParityReport(())
        try:
            found = self.gate(self.writer.folder, precision)
        except MissingCapabilityError:
            found = ParityReport(())
        return replace(self, proof=found.merged_into(self.proof)), found

    def discard(self, graphs: tuple[GraphSpec, ...]) -> None:
        """Remove the files of graphs that are not to be published."""
        for graph in graphs:
            for file in graph.files:
                (self.writer.folder / file.file).unlink()
        self.describe()

    def record_proof(self) -> None:
        """Write what was proven about the graphs as they are now."""
        if self.proof.rows or self.proof.not_judged:
            write_parity(Bundle.open(self.writer.folder), self.proof)


def encoder_graph(weights: Weights, rung: Rung, folder: Path) -> GraphSpec:
    """Write the image encoder at a precision."""
    export = GraphExport("encoder", weights.preprocessing.tile_size_px, rung.precision, rung.attention)
    if rung.attention is None:
        return onnx_from_torch(ImageEncoderGraph(weights.sam), export, folder / export.file)
    return onnx_from_torch(PlainEncoder(weights.sam, rung.attention, rung.dtype), export, folder / export.file)


def decoder_graph(weights: Weights, rung: Rung, folder: Path) -> GraphSpec:
    """Write the box decoder at a precision."""
    export = GraphExport("decoder", weights.preprocessing.tile_size_px, rung.precision)
    return onnx_from_torch(BoxDecoderGraph(weights.sam, rung.dtype), export, folder / export.file)


def points_graph(weights: Weights, folder: Path) -> GraphSpec:
    """Write the decoder for points, which exists at fp32 only: it serves comparisons and clicks, not whole volumes."""
    export = GraphExport("points", weights.preprocessing.tile_size_px)
    return onnx_from_torch(PointDecoderGraph(weights.sam), export, folder / export.file)


def detector_graphs(weights: Weights, rung: Rung, folder: Path) -> tuple[GraphSpec, ...]:
    """Write the detector at half precision, where there is one that can be."""
    if weights.detector is None:
        return ()
    # ultralytics takes seconds to import, and a bundle without a detector needs none of it.
    from dendsam_deploy.export.detector import export_detector_at  # noqa: PLC0415  (see above)

    graph = export_detector_at(weights.detector, folder, weights.preprocessing, rung)
    return () if graph is None else (graph,)


def is_refused(report: ParityReport) -> bool:
    """Tell whether a precision was judged and passed on no engine at all."""
    return bool(report.rows) and not report.proven


def failed_engines(report: ParityReport) -> list[str]:
    """Return a sentence for each engine that failed where another one passed."""
    return [
        f"{combination} {differences(ParityReport(report.failures_of(*combination)))}; it is not proven there"
        for combination in report.combinations
        if report.proven and combination not in report.proven
    ]


def differences(report: ParityReport) -> str:
    """Say in how many checks a report failed, and name the first of them."""
    worst = "; ".join(
        f"{row.graph} {row.metric} {row.value:.3g} (limit {'none' if row.limit is None else f'{row.limit:g}'})"
        for row in report.failures[:3]
    )
    return f"differs from the weights in {len(report.failures)} of {len(report.rows)} checks: {worst}"

"""Reports of benchmarks that nobody ran, with numbers as a test wants them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from dendsam_deploy.bundle.latency import (
    TORCH_REFERENCE,
    CombinationRecord,
    LatencyReport,
    LatencyRow,
    LeftOut,
    MatrixPeak,
    VolumeEstimate,
)
from dendsam_deploy.evaluate.latency_rows import in_order, ratios_of
from dendsam_deploy.evaluate.latency_statistics import summarise

if TYPE_CHECKING:
    from collections.abc import Sequence

HOST = {
    "processor": "Abacus 9",
    "architecture": "x86_64",
    "instructions": ["avx2"],
    "cpu_cores": 2,
    "memory_gib": 16.0,
    "gpus": [],
    "gpu_driver": None,
    "system": "Linux 6.1",
    "python": "3.12.1",
    "packages": {"numpy": "2.1"},
    "load_average": 0.1,
}
UNITS = {"detector": "tile", "encoder": "tile", "decoder": "box"}


def make_row(level: str, name: str, samples_ms: Sequence[float], engine: str = "onnxruntime", **facts) -> LatencyRow:
    """A row of given samples."""
    batch, summary = facts.pop("batch", 1), summarise(samples_ms)
    return LatencyRow(
        level=level,
        name=name,
        engine=engine,
        device=facts.pop("device", "cpu"),
        precision=facts.pop("precision", "fp32"),
        batch=batch,
        unit=UNITS.get(name.partition(":")[0], "slice"),
        boxes=facts.pop("boxes", None if level == "graph" else 64),
        objects=None if level in ("graph", "stage") else 60.0,
        samples_ms=tuple(samples_ms),
        warmup_ms=(2 * samples_ms[0],),
        median_ms=summary.median_ms,
        p90_ms=summary.p90_ms,
        p99_ms=summary.p99_ms,
        mad_ms=summary.mad_ms,
        per_second=batch * 1000 / summary.median_ms,
        **facts,
    )


def rows_of_engine(engine: str, slowness: float) -> list[LatencyRow]:
    """What a benchmark of one engine has: an encoder of 100 ms that takes most of a slice of 130."""

    def samples(ms: float) -> list[float]:
        return [slowness * ms * (1 + 0.01 * k) for k in (-2, -1, 0, 1, 2)]

    graphs = [
        make_row("graph", "detector", samples(20), engine, peak_rss_mb=900.0),
        make_row("graph", "encoder", samples(100), engine, flop=5e9, gflop_per_second=50 / slowness, of_peak=0.5),
        *(make_row("graph", "decoder:16", samples(4 * n), engine, batch=n) for n in (1, 8, 64)),
        make_row("graph", "decoder:32", samples(400), engine, batch=64),
    ]
    stages = {"read": 0.2, "prepare": 0.1, "detect": 5, "encode": 100, "decode": 20, "paint": 5}
    if engine == TORCH_REFERENCE:
        return graphs
    return [
        *graphs,
        *(make_row("stage", stage, samples(ms), engine) for stage, ms in stages.items()),
        make_row("slice", "slice", samples(130), engine, megavoxels_per_second=8.0, peak_rss_mb=1000.0),
        make_row("volume", "volume", [slowness * 1040.0], engine, batch=8, megavoxels_per_second=8.0),
    ]


def make_report(rows: Sequence[LatencyRow] | None = None, **changes) -> LatencyReport:
    """A report of two engines and the reference, or of given rows."""
    engines = {"openvino": 1.0, "onnxruntime": 1.5, TORCH_REFERENCE: 4.0}
    if rows is None:
        rows = [row for engine, slowness in engines.items() for row in rows_of_engine(engine, slowness)]
    rows = in_order(rows)
    graphs = {"encoder": "fp32", "decoder": "fp32", "detector": "fp32"}
    report = LatencyReport(
        bundle="ca1",
        graphs={"encoder.onnx": "ab" * 32},
        created_utc="2026-11-21T10:00:00Z",
        host=HOST,
        command="dendsam-deploy benchmark ca1",
        settings={
            "subject": "synthetic slices of one tile",
            "slice_hw": [1024, 1024],
            "tiles_per_slice": 1,
            "boxes_per_slice": 64,
            "threads": None,
        },
        combinations=tuple(
            CombinationRecord(engine, "cpu", "fp32", graphs, engine == "openvino", 900.0, 1200.0) for engine in engines
        ),
        rows=tuple(rows),
        ratios=tuple(ratios_of(rows, 1)),
        matrix_peaks=(MatrixPeak("numpy", "cpu", "fp32", 90.0), MatrixPeak("openvino", "cpu", "fp32", 100.0)),
        estimates=(VolumeEstimate("openvino", "cpu", "fp32", 1000, (2048, 2048), 0.5, "a run of 8 slices"),),
        left_out=(LeftOut("tensorrt", "cuda:0", None, None, "no NVIDIA <driver> found"),),
    )
    return replace(report, **changes)


def slowed(report: LatencyReport, factor: float, names: Sequence[str] = ()) -> LatencyReport:
    """The same report with everything, or some rows, slower by a factor."""
    rows = [
        row
        if names and row.name not in names
        else make_row(
            row.level,
            row.name,
            [factor * ms for ms in row.samples_ms],
            row.engine,
            batch=row.batch,
            boxes=row.boxes,
            precision=row.precision,
        )
        for row in report.rows
    ]
    return replace(report, rows=tuple(rows))

"""A whole benchmark of a small bundle."""

from __future__ import annotations

import itertools
import json
import socket
from dataclasses import replace

import numpy as np
import pytest
import tifffile

from dendsam_deploy.bundle.bundle import Bundle
from dendsam_deploy.bundle.latency import BENCHMARK_FILE, TORCH_REFERENCE, latency_from_json
from dendsam_deploy.errors import StorageError, VolumeError
from dendsam_deploy.evaluate.latency import BenchmarkOptions, benchmark_bundle, check_storable, store_report

ROW_KEYS = {
    "level", "name", "engine", "device", "precision", "batch", "samples_ms", "median_ms", "p90_ms", "p99_ms",
    "per_second", "peak_rss_mb", "peak_device_mb",
}  # fmt: skip
FEW = BenchmarkOptions(engines=("onnxruntime",), devices=("cpu",), threads=1, boxes=5, repeats=2, seconds=20)


@pytest.fixture(scope="module")
def report(exported):
    options = replace(FEW, sam=exported.sam, detector=exported.detector)
    notes = []
    found = benchmark_bundle(exported.bundle, options, notes.append)
    assert notes[-1].done == notes[-1].total
    assert all(note.done <= note.total for note in notes)
    return found


def test_every_level_is_measured_on_the_graphs_and_on_the_reference(report, exported) -> None:
    def names(engine):
        return {(row.level, row.name, row.batch) for row in report.rows if row.engine == engine}

    graphs = {("graph", "detector", 1), ("graph", "encoder", 1)}
    regions = Bundle.open(exported.bundle).manifest.decoding.region_sizes
    usual = regions[min(1, len(regions) - 1)]
    decoders = {("graph", f"decoder:{usual}", count) for count in (1, 8, 64)}
    decoders |= {("graph", f"decoder:{region}", 64) for region in regions}
    stages = {("stage", stage, 1) for stage in ("read", "prepare", "detect", "encode", "decode", "paint")}
    both = graphs | decoders | stages | {("slice", "slice", 1)}
    assert both <= names("onnxruntime")
    assert both <= names(TORCH_REFERENCE)
    assert {row.level for row in report.rows if row.engine == "onnxruntime"} == {"graph", "stage", "slice", "volume"}
    assert [row.engine for row in report.of_level("volume")] == ["onnxruntime"]


def test_rows_hold_their_raw_samples_and_what_follows_from_them(report) -> None:
    for row in report.rows:
        assert 1 <= len(row.samples_ms) <= 2
        assert row.median_ms == pytest.approx(np.median(row.samples_ms))
        assert row.per_second == pytest.approx(1000 * row.batch / row.median_ms)
        assert row.precision == "fp32"
    assert all(row.warmup_ms for row in report.of_level("slice"))
    encoder = next(row for row in report.rows if (row.name, row.engine) == ("encoder", "onnxruntime"))
    assert encoder.gflop_per_second == pytest.approx(encoder.flop / encoder.median_ms / 1e6)
    best = max(peak.gflop_per_second for peak in report.matrix_peaks)
    assert encoder.of_peak == pytest.approx(encoder.gflop_per_second / best)
    assert {peak.by for peak in report.matrix_peaks} == {"numpy", "onnxruntime"}


def test_ratios_and_estimates_follow_from_rows(report) -> None:
    ours = [ratio for ratio in report.ratios if ratio.engine == "onnxruntime"]
    found = {(ratio.name, ratio.level, ratio.row, ratio.batch): ratio for ratio in ours}
    whole = found["end_to_end_over_encoder", "slice", "slice", 1]
    rows = {(row.name, row.engine): row for row in report.rows}
    assert whole.value == pytest.approx(
        rows["encoder", "onnxruntime"].median_ms / rows["slice", "onnxruntime"].median_ms
    )
    assert whole.low <= whole.value <= whole.high
    faster = found["over_torch_reference", "graph", "encoder", 1]
    assert faster.value == pytest.approx(
        rows["encoder", TORCH_REFERENCE].median_ms / rows["encoder", "onnxruntime"].median_ms
    )
    (estimate,) = report.estimates
    assert (estimate.slices, estimate.slice_hw, estimate.engine) == (1000, (2048, 2048), "onnxruntime")


def test_what_was_opened_is_told(report) -> None:
    assert [record.engine for record in report.combinations] == ["onnxruntime", TORCH_REFERENCE]
    for record in report.combinations:
        assert record.graphs == {"detector": "fp32", "encoder": "fp32", "decoder": "fp32"}
        assert record.first_result_ms > record.load_ms > 0


def test_the_document_has_the_keys_of_the_contract_and_no_trace_of_the_machine(report, exported) -> None:
    document = report.to_document()
    assert document.keys() >= {"host", "command", "rows", "ratios"}
    assert all(row.keys() >= ROW_KEYS for row in document["rows"])
    text = json.dumps(document)
    assert socket.gethostname() not in text
    assert str(exported.bundle.parent) not in text
    assert "/tmp" not in text
    command = "dendsam-deploy benchmark toy --engine onnxruntime --device cpu --threads 1 --boxes 5 --repeats 2 "
    assert report.command == command + "--seconds 20 --sam sam.pt --detector detector.pt"


def test_the_report_is_kept_in_the_bundle(report, tmp_path) -> None:
    path = store_report(tmp_path, report)
    assert path == tmp_path / BENCHMARK_FILE
    assert latency_from_json(path.read_text(), str(path)) == report


def test_a_bundle_that_cannot_be_written_to_is_found_out_before(tmp_path, monkeypatch) -> None:
    check_storable(tmp_path)
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(StorageError, match="copy the bundle"):
        check_storable(tmp_path)


def test_a_volume_of_the_users_own(exported, tmp_path) -> None:
    rng = np.random.default_rng(0)
    tifffile.imwrite(tmp_path / "ca1.tif", rng.integers(0, 255, (3, 150, 140), np.uint8), photometric="minisblack")
    options = replace(
        FEW, volume=tmp_path / "ca1.tif", voxel_size_nm=(40, 15, 15), levels=("slice", "volume"), repeats=1
    )
    report = benchmark_bundle(exported.bundle, options)
    assert {row.level for row in report.rows} == {"slice", "volume"}
    assert (report.estimates[0].slices, report.estimates[0].slice_hw) == (3, (150, 140))
    assert report.settings["subject"] == "ca1.tif"
    assert report.settings["tiles_per_slice"] == 4
    volume = report.of_level("volume")[0]
    assert volume.megavoxels_per_second == pytest.approx(volume.per_second * 150 * 140 / 1e6)
    with pytest.raises(VolumeError):
        benchmark_bundle(exported.bundle, replace(FEW, volume=tmp_path / "absent.tif"))


def test_rows_come_level_by_level_with_rivals_side_by_side(report) -> None:
    levels = [row.level for row in report.rows]
    assert [level for level, _ in itertools.groupby(levels)] == ["graph", "stage", "slice", "volume"]
    pairs = [row.name for row in report.of_level("graph") if row.batch == 1]
    assert [len(list(rows)) for _, rows in itertools.groupby(pairs)] == [2] * (len(pairs) // 2)

"""The page of a benchmark."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from pages import Page, assert_self_contained

sys.path.append(str(Path(__file__).parents[1] / "evaluate"))

from latency_reports import HOST, make_report, make_row, rows_of_engine

from dendsam_deploy.report.benchmark_report import render_benchmark_report, write_benchmark_report


def page_of(report) -> Page:
    return Page(render_benchmark_report(report))


def test_the_page_shows_what_was_measured(tmp_path) -> None:
    report = make_report()
    write_benchmark_report(tmp_path / "b.html", report)
    page = Page((tmp_path / "b.html").read_text())
    assert_self_contained(page)
    assert "Benchmark of ca1" in page.text
    assert "130 ms a slice, openvino, fp32" in page.text
    assert "10.0 / s tiles encoded, openvino, fp32" in page.text
    assert "50 % of the machine's matrix products" in page.text
    assert "77 % of encoding alone, end to end" in page.text, "100 of 130 ms"
    assert "30 min 0 s for 1 000 slices" in page.text.replace("\N{NARROW NO-BREAK SPACE}", " ")
    assert "no NVIDIA <driver> found" in page.text
    assert "dendsam-deploy benchmark ca1" in page.text
    for row in report.rows:
        assert row.name in page.text


def test_it_has_a_waterfall_distributions_and_rates() -> None:
    page = page_of(make_report())
    assert page.tags.count("svg") == 6
    assert "milliseconds since the slice was asked for" in page.text
    assert "one call of the encoder, milliseconds" in page.text
    assert "64 boxes in one call of the decoder, milliseconds" in page.text
    assert "boxes per second" in page.text
    order = [page.text.index(f"{stage} ") for stage in ("read", "prepare", "detect", "encode", "decode", "paint")]
    assert order == sorted(order)


def test_what_is_unproven_is_said_first() -> None:
    report = make_report()
    assert "onnxruntime on cpu at fp32 has not been proven" in page_of(report).text
    proven = tuple(replace(record, is_proven=record.engine != "torch-reference") for record in report.combinations)
    assert "not been proven" not in page_of(replace(report, combinations=proven)).text, "the reference needs no proof"


def test_a_page_of_graphs_or_of_slices_alone() -> None:
    rows = rows_of_engine("openvino", 1.0)
    bare = {"estimates": (), "left_out": ()}
    graphs = page_of(make_report([row for row in rows if row.level == "graph"], **bare))
    assert "A slice" not in graphs.text
    assert "boxes per second" in graphs.text
    slices = page_of(make_report([row for row in rows if row.level == "slice"], **bare))
    assert "The graphs" not in slices.text
    assert slices.tags.count("svg") == 1
    assert page_of(make_report([], **bare)).tags.count("svg") == 0


def test_memory_of_a_gpu_has_its_column_only_where_there_is_one() -> None:
    on_gpu = make_row("graph", "encoder", [10.0] * 3, device="cuda:0", peak_device_mb=4321.0)
    host = {**HOST, "gpus": ["NVIDIA H200"]}
    page = page_of(make_report([on_gpu], host=host))
    assert "GPU MB" in page.text
    assert "4321" in page.text
    assert "NVIDIA H200" in page.text
    assert "onnxruntime, cuda:0, fp32" in page.text
    assert "GPU MB" not in page_of(make_report()).text

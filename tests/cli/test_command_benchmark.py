"""``benchmark``: on bundles with and without a detector, its files, its comparison with an earlier one."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import onnx
import onnx.parser
import pytest

from dendsam_deploy.bundle.bundle import Bundle
from dendsam_deploy.bundle.contract import graph_inputs, graph_outputs
from dendsam_deploy.bundle.writer import BundleWriter
from dendsam_deploy.cli.benchmark import read_levels
from dendsam_deploy.cli.benchmark_tables import benchmark_table, change_table
from dendsam_deploy.cli.main import main
from dendsam_deploy.evaluate.regression import RegressionOptions, compare_reports, read_report
from dendsam_deploy.export.foreign_detector import ForeignDetectorOptions, wrap_detector

SIZE_PX = 64

ROW_KEYS = {
    "level", "name", "engine", "device", "precision", "batch", "samples_ms", "median_ms", "p90_ms", "p99_ms",
    "per_second", "peak_rss_mb", "peak_device_mb",
}  # fmt: skip
SHORT = ("--engine", "onnxruntime", "--device", "cpu", "--threads", 1, "--boxes", 4, "--repeats", 3, "--seconds", 10)


@pytest.fixture(scope="module")
def foreign(bundle, tmp_path_factory):
    """A bundle whose detector was made elsewhere: five boxes of fixed places, scored by the light of the image."""
    folder = tmp_path_factory.mktemp("foreign")
    model = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17]>
        net (float[b, 3, 64, 64] images) => (float[b, 5, 6] output0) {
            light = Conv <strides = [64, 64]> (images, mean)
            each = Reshape (light, column)
            scored = Mul (lit, each)
            output0 = Add (scored, fixed)
        }""")
    corners = np.array([[8 * k, 4 * k, 8 * k + 20, 4 * k + 20, 0, 0] for k in range(5)], np.float32)
    lit = np.zeros((1, 5, 6), np.float32)
    lit[..., 4] = 1.0
    for name, value in {
        "mean": np.full((1, 3, 64, 64), 1 / (3 * 64 * 64), np.float32),
        "column": np.array([-1, 1, 1]),
        "lit": lit,
        "fixed": corners[None],
    }.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(value, name))
    onnx.save(model, folder / "detector.onnx")
    with BundleWriter(folder / "bundle") as writer:
        shutil.copytree(bundle, writer.folder, dirs_exist_ok=True)
        wrap_detector(folder / "detector.onnx", writer.folder / "detector.onnx", ForeignDetectorOptions(SIZE_PX))
        manifest = Bundle.open(bundle).manifest
        detector = replace(
            manifest.graph("decoder", "fp32"),
            role="detector",
            files=writer.digest("detector.onnx"),
            inputs=graph_inputs("detector", SIZE_PX),
            outputs=graph_outputs("detector", SIZE_PX),
        )
        writer.write_manifest(replace(manifest, graphs=(*manifest.graphs, detector)))
    return writer.out


@pytest.fixture
def own(bundle, tmp_path):
    """A copy of the bundle that a test may write into."""
    return shutil.copytree(bundle, tmp_path / "own")


@pytest.fixture(scope="module")
def measured(bundle, tmp_path_factory):
    """A bundle without a detector, measured once: its folder, the JSON file, the page and what was printed."""
    folder = tmp_path_factory.mktemp("measured")
    own = shutil.copytree(bundle, folder / "bundle")
    words = ["benchmark", own, *SHORT, "--json", folder / "b.json", "--report", folder / "b.html", "-q"]
    assert main([str(word) for word in words]) == 0
    return folder


def test_a_bundle_without_a_detector(measured, bundle) -> None:
    document = json.loads((measured / "b.json").read_text())
    assert document.keys() >= {"host", "command", "rows", "ratios"}
    assert all(row.keys() >= ROW_KEYS for row in document["rows"])
    assert {row["level"] for row in document["rows"]} == {"graph", "stage", "slice", "volume"}
    assert {row["name"].partition(":")[0] for row in document["rows"] if row["level"] == "graph"} == {
        "encoder",
        "decoder",
    }
    assert {(row["engine"], row["device"], row["precision"]) for row in document["rows"]} == {
        ("onnxruntime", "cpu", "fp32")
    }
    assert {ratio["name"] for ratio in document["ratios"]} == {"end_to_end_over_encoder"}
    assert document["host"]["cpu_cores"] >= 1


def test_the_result_is_in_the_bundle_in_the_file_and_on_the_page(measured) -> None:
    document = json.loads((measured / "b.json").read_text())
    assert json.loads((measured / "bundle" / "benchmark.json").read_text()) == document
    page = (measured / "b.html").read_text(encoding="utf-8")
    assert "Benchmark of random" in page
    assert str(measured) not in json.dumps(document) + page


def test_a_detector_made_elsewhere(run, foreign, tmp_path) -> None:
    out = shutil.copytree(foreign, tmp_path / "own")
    document = run("benchmark", out, *SHORT, "--levels", "graph,slice", "--json", "-").document
    rows = {row["name"]: row for row in document["rows"]}
    assert rows.keys() >= {"detector", "encoder", "slice"}
    assert rows["detector"]["flop"] >= 2 * 3 * 64 * 64
    assert rows["slice"]["objects"] > 0, "the number of objects was chosen, and not left to the detector"
    assert {row["level"] for row in document["rows"]} == {"graph", "slice"}


def test_the_table_shows_the_rows(run, own) -> None:
    outcome = run("benchmark", own, *SHORT, "--quick", "--levels", "slice")
    assert outcome.code == 0
    assert "onnxruntime  cpu" in outcome.out
    (line,) = [line for line in outcome.out.splitlines() if line.startswith("slice")][:1]
    assert "Mvx" in line
    assert "hours here" in outcome.out
    assert "matrix products by numpy on cpu at fp32" in outcome.out


def edited(measured, tmp_path, edit):
    """The JSON file of the bundle that was measured, with an edit."""
    document = json.loads((measured / "b.json").read_text())
    edit(document)
    path = tmp_path / "old.json"
    path.write_text(json.dumps(document))
    return path


def times(factor):
    """Make everything in a document slower or faster than it was."""

    def edit(document) -> None:
        for row in document["rows"]:
            row["samples_ms"] = [factor * ms for ms in row["samples_ms"]]
            row["median_ms"] *= factor

    return edit


@pytest.fixture
def against(run, measured, tmp_path):
    """Measure the bundle once more, against an edited file."""

    def call(edit, *words):
        path = edited(measured, tmp_path, edit)
        return run("benchmark", measured / "bundle", *SHORT, "--levels", "graph", "--against", path, *words)

    return call


def test_what_became_a_thousand_times_slower_is_a_regression(against, measured, tmp_path) -> None:
    before = (measured / "bundle" / "benchmark.json").read_bytes()
    outcome = against(times(0.001), "--json", tmp_path / "new.json")
    assert outcome.code == 1
    assert "slower than in" in outcome.err
    assert "slower" in outcome.out
    verdicts = {row["name"]: row["verdict"] for row in json.loads((tmp_path / "new.json").read_text())["against"]}
    assert verdicts["encoder"] == "slower"
    assert (measured / "bundle" / "benchmark.json").read_bytes() == before, "the next comparison must fail, too"


def test_what_became_faster_passes(against, own) -> None:
    outcome = against(times(1000))
    assert outcome.code == 0
    assert "0 slower" in outcome.out
    assert "faster" in outcome.out


def test_another_machine_and_another_bundle_are_refused_before_measuring(against, measured) -> None:
    outcome = against(lambda document: document["host"].update(cpu_cores=999))
    assert outcome.code == 2
    assert "--across host" in outcome.message
    outcome = against(lambda document: document["graphs"].update({"encoder.onnx": "00"}))
    assert outcome.code == 2
    assert "--across bundle" in outcome.message


def test_what_is_no_benchmark_is_a_bad_input_file(run, own, tmp_path) -> None:
    (tmp_path / "old.json").write_text("{}")
    outcome = run("benchmark", own, "--against", tmp_path / "old.json")
    assert outcome.code == 4
    assert "not a report of" in outcome.message
    assert run("benchmark", own, "--against", tmp_path / "absent.json").code == 4


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("--engine", "abacus"), 2),
        (("--levels", "galaxy"), 2),
        (("--boxes", 0), 2),
        (("--tolerance", -1), 2),
        (("--device", "gpu"), 2),
        (("--precision", "bf16"), 3),
        (("--volume", "absent.tif"), 4),
        (("--sam", "absent.pt"), 4),
    ],
)
def test_wrong_words(run, own, words, code) -> None:
    assert run("benchmark", own, *words).code == code


def test_no_bundle(run, tmp_path) -> None:
    assert run("benchmark", tmp_path).code == 4


def test_levels() -> None:
    assert read_levels("graph,volume") == ("graph", "volume")


def test_tables_leave_out_columns_that_nothing_fills(measured) -> None:
    report = read_report(measured / "b.json")
    assert "GPU MB" not in benchmark_table(report)
    assert "RSS MB" in benchmark_table(report)
    change = compare_reports(report, report, RegressionOptions(), "b.json")
    assert "matrix products ran at 1.00 of the rate then" in change_table(change)

"""A comparison that fails when it must, and not when it is noise."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from latency_reports import HOST, make_report, make_row, slowed

from dendsam_deploy.bundle.latency import LatencyReport, MatrixPeak, latency_from_json, latency_to_json
from dendsam_deploy.errors import InputFileError, InvalidArgumentError
from dendsam_deploy.evaluate.regression import (
    RegressionOptions,
    check_comparable,
    compare_reports,
    read_report,
)

RULE = RegressionOptions()


def compare(then: LatencyReport, now: LatencyReport, rule: RegressionOptions = RULE):
    return compare_reports(then, now, rule, "old.json")


def test_the_same_numbers_are_the_same() -> None:
    report = make_report()
    change = compare(report, report)
    assert change.slower == ()
    assert {row.verdict for row in change.changes} == {"same", "not judged"}
    assert (change.only_then, change.only_now, change.machine_ratio) == (0, 0, 1.0)


def test_what_became_slower_is_found_and_nothing_else() -> None:
    report = make_report()
    change = compare(report, slowed(report, 1.3, ["encoder"]))
    assert {(row.row.name, row.row.engine) for row in change.slower} == {
        ("encoder", "openvino"),
        ("encoder", "onnxruntime"),
        ("encoder", "torch-reference"),
    }
    assert all(row.ratio == pytest.approx(1.3) and row.low > 1 for row in change.slower)


def test_what_became_faster_is_not_held_against_anybody() -> None:
    report = make_report()
    change = compare(report, slowed(report, 0.5))
    assert change.slower == ()
    assert {row.verdict for row in change.changes} == {"faster", "not judged"}


@pytest.mark.parametrize(
    ("growth", "tolerance", "found"), [(1.08, 0.1, 0), (1.08, 0.05, 1), (1.5, 0.6, 0), (1.5, 0.4, 1)]
)
def test_the_tolerance_decides(growth, tolerance, found) -> None:
    then = make_report([make_row("graph", "encoder", [100, 101, 102, 103, 104])])
    change = compare(then, slowed(then, growth), RegressionOptions(tolerance))
    assert len(change.slower) == found


def test_noise_is_not_taken_for_a_regression() -> None:
    rng = np.random.default_rng(0)
    false_alarms = missed = 0
    for _ in range(60):
        # Medians of nine such samples differ by more than 10 % every other time.
        then, now = (make_report([make_row("graph", "encoder", rng.lognormal(4, 0.3, 9).tolist())]) for _ in range(2))
        false_alarms += len(compare(then, now).slower)
        missed += not compare(then, slowed(now, 3.0)).slower
    assert false_alarms <= 4
    assert missed <= 4


def test_few_samples_are_shown_and_not_judged() -> None:
    then = make_report([make_row("graph", "encoder", [100, 100, 100]), make_row("graph", "detector", [10, 10])])
    change = compare(then, slowed(then, 5))
    assert {row.row.name: row.verdict for row in change.changes} == {"encoder": "slower", "detector": "not judged"}


def test_a_comparison_of_nothing_does_not_pass() -> None:
    then = make_report([make_row("graph", "encoder", [100, 100, 100])])
    for now in (
        make_report([make_row("graph", "encoder", [100, 100, 100], precision="bf16")]),
        make_report([make_row("graph", "encoder", [100])]),
        make_report([]),
    ):
        with pytest.raises(InvalidArgumentError, match="none of its 1 rows can be judged"):
            compare(then, now)


def test_slices_of_another_volume_are_other_slices() -> None:
    then = make_report()
    now = replace(then, settings={**then.settings, "subject": "ca1.tif"})
    change = compare(then, now)
    assert {row.row.level for row in change.changes} == {"graph"}
    assert change.only_then == change.only_now > 0


def test_other_threads_are_refused() -> None:
    then = make_report()
    with pytest.raises(InvalidArgumentError, match="measured with all threads, now with 1"):
        compare(then, replace(then, settings={**then.settings, "threads": 1}))


def test_a_slower_machine_shows() -> None:
    then = make_report()
    now = replace(then, matrix_peaks=(MatrixPeak("numpy", "cpu", "fp32", 45.0), MatrixPeak("x", "cpu", "fp32", 1.0)))
    assert compare(then, now).machine_ratio == pytest.approx(0.5)
    assert compare(then, replace(then, matrix_peaks=())).machine_ratio is None


def test_another_machine_or_bundle_is_refused_unless_it_is_meant() -> None:
    then = make_report()
    other = {**HOST, "cpu_cores": 64}
    check_comparable(then, HOST, then.graphs, (), "old.json")
    with pytest.raises(InvalidArgumentError, match=r"another machine .cpu_cores 2 and 64.*--across host"):
        check_comparable(then, other, then.graphs, ("bundle",), "old.json")
    check_comparable(then, other, then.graphs, ("host",), "old.json")
    graphs = {"encoder.onnx": "cd" * 32, "encoder.bf16.onnx": "ef" * 32}
    with pytest.raises(InvalidArgumentError, match=r"encoder\.bf16\.onnx, encoder\.onnx differ.*--across bundle"):
        check_comparable(then, HOST, graphs, ("host",), "old.json")
    check_comparable(then, HOST, graphs, ("bundle",), "old.json")


@pytest.mark.parametrize("tolerance", [-0.1, float("nan"), 10])
def test_impossible_tolerances(tolerance) -> None:
    with pytest.raises(InvalidArgumentError, match="tolerance"):
        RegressionOptions(tolerance)


def test_a_report_survives_its_file(tmp_path) -> None:
    report = make_report()
    (tmp_path / "b.json").write_text(latency_to_json(report))
    assert read_report(tmp_path / "b.json") == report
    assert report.slice_ms.keys() == {("openvino", "cpu", "fp32"), ("onnxruntime", "cpu", "fp32")}
    later = latency_to_json(report).replace('"bundle": "ca1"', '"bundle": "ca1", "mood": "fine"')
    assert latency_from_json(later, "b.json") == report, "a later version may have added a key"


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: "[]",
        lambda text: "{}",
        lambda text: text.replace('"schema_version": 1', '"schema_version": 9'),
        lambda text: text.replace('"level": "graph"', '"level": "galaxy"'),
        lambda text: text.replace('"median_ms": 20.0', '"median_ms": "fast"'),
        lambda text: text.replace('"median_ms": 20.0', '"median_ms": NaN'),
        lambda text: text.replace('"samples_ms"', '"examples_ms"'),
        lambda text: text.replace('"batch": 8', '"batch": true'),
        lambda text: "[" * 100_000,
    ],
)
def test_what_is_no_report_is_named(tmp_path, damage) -> None:
    path = tmp_path / "old.json"
    path.write_text(damage(latency_to_json(make_report())))
    with pytest.raises(InputFileError, match=r"old\.json: not a report of `dendsam-deploy benchmark`"):
        read_report(path)


def test_a_file_that_is_not_there_or_not_text(tmp_path) -> None:
    with pytest.raises(InputFileError, match="cannot be read"):
        read_report(tmp_path / "absent.json")
    (tmp_path / "b.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputFileError, match="cannot be read"):
        read_report(tmp_path / "b.json")

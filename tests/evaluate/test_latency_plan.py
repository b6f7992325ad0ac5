"""The parts of a benchmark that decide what is measured, when, and what follows."""

from __future__ import annotations

import re
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tifffile
from latency_reports import make_row

from dendsam_deploy.bundle.bundle import Bundle
from dendsam_deploy.bundle.latency import TORCH_REFERENCE, CombinationRecord, MatrixPeak
from dendsam_deploy.bundle.parity import Combination, ParityReport, ParityRow
from dendsam_deploy.errors import BundleError, InvalidArgumentError, MissingCapabilityError
from dendsam_deploy.evaluate import latency, latency_lanes, latency_plan
from dendsam_deploy.evaluate.latency_bench import Case, Sample
from dendsam_deploy.evaluate.latency_lanes import Course, Lane, measure_alternating, measure_volume
from dendsam_deploy.evaluate.latency_plan import (
    BenchmarkOptions,
    Subject,
    bench_setup,
    choose_combinations,
    choose_subject,
    graph_cases,
)
from dendsam_deploy.evaluate.latency_rows import SLICE, Measurements, Rates, estimate_volume, ratios_of, rows_of
from dendsam_deploy.progress import Progress, no_progress


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"levels": ("galaxy",)}, "galaxy"),
        ({"levels": ()}, "levels are none"),
        ({"boxes": 0}, "boxes is 0"),
        ({"repeats": 0}, "repeats is 0"),
        ({"seconds": 0.0}, "seconds 0"),
        ({"detector": Path("d.pt")}, "without --sam"),
    ],
)
def test_impossible_options(options, words) -> None:
    with pytest.raises(InvalidArgumentError, match=words):
        BenchmarkOptions(**options)


def test_quick_is_short() -> None:
    quick = BenchmarkOptions(quick=True).settled
    assert (quick.quick, quick.repeats, quick.levels) == (False, 5, ("graph", "stage", "slice"))
    assert BenchmarkOptions(quick=True, levels=("volume",)).settled.levels == ("volume",)
    plain = BenchmarkOptions()
    assert plain.settled is plain


# What is measured -----------------------------------------------------------------------------------------------------


@pytest.fixture
def bundle(exported):
    return replace(Bundle.open(exported.bundle), parity=None)


@pytest.fixture
def works(monkeypatch):
    """Let every engine work on the CPU, and none on a GPU."""
    monkeypatch.setattr(
        latency_plan, "why_not", lambda maker, device, options: None if device == "cpu" else "no NVIDIA driver found"
    )


def with_precisions(bundle, *precisions):
    fp32 = bundle.manifest.graph("encoder", "fp32")
    graphs = (*bundle.manifest.graphs, *(replace(fp32, precision=precision) for precision in precisions))
    return replace(bundle, manifest=replace(bundle.manifest, graphs=graphs))


def test_everything_that_works_is_measured_fp32_first(bundle, works) -> None:
    wanted, left_out = choose_combinations(with_precisions(bundle, "bf16"), BenchmarkOptions())
    on_cpu = [combination for combination in wanted if combination.device == "cpu"]
    assert on_cpu == list(wanted)
    assert [c.precision for c in wanted] == sorted((c.precision for c in wanted), key=["fp32", "bf16"].index)
    assert {("openvino", "bf16"), ("onnxruntime", "fp32")} <= {(c.engine, c.precision) for c in wanted}
    assert {(row.device, row.reason) for row in left_out} == {("cuda:0", "no NVIDIA driver found")}


def test_wishes_are_fulfilled_or_refused(bundle, works) -> None:
    def chosen(**wishes):
        return choose_combinations(with_precisions(bundle, "bf16"), BenchmarkOptions(**wishes))[0]

    assert chosen(engines=("openvino",), devices=("cpu",)) == (
        Combination("openvino", "cpu", "fp32"),
        Combination("openvino", "cpu", "bf16"),
    )
    assert chosen(engines=("openvino", "onnxruntime"), devices=("cpu",), precisions=("bf16",)) == (
        Combination("openvino", "cpu", "bf16"),
        Combination("onnxruntime", "cpu", "bf16"),
    )
    with pytest.raises(MissingCapabilityError, match="engine onnxruntime: no NVIDIA driver found"):
        chosen(engines=("onnxruntime",), devices=("cuda",))
    with pytest.raises(MissingCapabilityError, match="int8"):
        chosen(precisions=("int8",))
    with pytest.raises(InvalidArgumentError, match="'gpu' is unknown"):
        chosen(devices=("gpu",))


def test_what_is_known_to_be_wrong_is_not_measured_unless_it_is_asked_for(bundle, works) -> None:
    failed = ParityRow(2, "encoder", "openvino", "cpu", "fp32", "embedding_cosine", 0.1, 0.9, False, "torch")
    judged = replace(bundle, parity=ParityReport((failed,)))
    wanted, left_out = choose_combinations(judged, BenchmarkOptions(devices=("cpu",)))
    assert {c.engine for c in wanted} == {"onnxruntime"}
    assert any(row.engine == "openvino" and "verify" in row.reason for row in left_out)
    asked, _ = choose_combinations(judged, BenchmarkOptions(engines=("openvino",), devices=("cpu",)))
    assert {c.engine for c in asked} == {"openvino"}


def test_a_graph_at_another_precision_is_measured_there(bundle) -> None:
    graphs = {"detector": "fp32", "encoder": "int8", "decoder": "fp32"}
    assert {case.name for case in graph_cases(bundle.manifest, graphs, "int8", [1])} == {"encoder"}
    every = dict.fromkeys(graphs, "fp32")
    cases = graph_cases(bundle.manifest, every, "fp32", [1, 4])
    assert [case.batch for case in cases if case.name == "encoder"] == [1, 4]
    assert len(set(cases)) == len(cases)


def test_synthetic_slices_fill_one_tile_and_differ(bundle, tmp_path) -> None:
    subject = choose_subject(bundle.manifest, BenchmarkOptions(), tmp_path)
    stack = tifffile.imread(subject.volume)
    size = bundle.manifest.preprocessing.tile_size_px
    assert stack.shape == subject.shape_zyx == (16, size, size)
    assert (subject.boxes, subject.zoom, subject.is_synthetic) == (64, 1.0, True)
    assert len({plane.tobytes() for plane in stack}) == 16


def test_a_bundle_without_detector_is_given_boxes(bundle, tmp_path) -> None:
    tifffile.imwrite(tmp_path / "v.tif", np.zeros((90, 64, 64), np.uint8), photometric="minisblack")
    bare = replace(bundle.manifest, graphs=tuple(g for g in bundle.manifest.graphs if g.role != "detector"))
    options = BenchmarkOptions(volume=tmp_path / "v.tif")
    assert choose_subject(bare, options, tmp_path).boxes == 64
    subject = choose_subject(bundle.manifest, options, tmp_path)
    assert (subject.boxes, subject.slices) == (None, (29, 61))


# When it is measured --------------------------------------------------------------------------------------------------


class Clock:
    """A clock that only samples move."""

    def __init__(self, monkeypatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(latency_lanes, "time", SimpleNamespace(perf_counter=lambda: self.now))


class FakeWorker:
    """A worker whose samples take as long as it is told."""

    def __init__(self, engine, clock, log, ms) -> None:
        self.engine, self.clock, self.log, self.ms = engine, clock, log, ms
        self.setup = SimpleNamespace(engine=engine)

    def take(self, case, index):
        self.clock.now += self.ms / 1000
        self.log.append((self.engine, case.name, index))
        return Sample(self.ms, {}, 1.0, 1)


def lanes_of(clock, log, cases, **engines):
    lanes = []
    for engine, ms in engines.items():
        measured = Measurements(Combination(engine, "cpu", "fp32"))
        measured.warmup = {case: [Sample(ms)] for case in (*cases, SLICE)}
        record = CombinationRecord(engine, "cpu", "fp32", {}, True, 1.0, 1.0)
        lanes.append(Lane(FakeWorker(engine, clock, log, ms), record, measured, tuple(cases)))
    return lanes


def course_of(**options) -> Course:
    return Course(BenchmarkOptions(**options), Path(), no_progress, started=0.0)


def test_engines_take_turns_in_rotating_order(monkeypatch) -> None:
    clock, log = Clock(monkeypatch), []
    lanes = lanes_of(clock, log, [Case("graph", "encoder")], a=10, b=10, c=10)
    measure_alternating(lanes, course_of(repeats=4, seconds=1000, levels=("graph",)))
    assert "".join(engine for engine, _, _ in log) == "abcbcacababc"
    assert [index for _, _, index in log] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]


def test_slow_things_get_fewer_samples_but_three(monkeypatch) -> None:
    clock, log = Clock(monkeypatch), []
    lanes = lanes_of(clock, log, [Case("graph", "encoder")], a=4000)
    measure_alternating(lanes, course_of(repeats=20, seconds=10, levels=("graph", "slice")))
    assert [name for _, name, _ in log] == ["encoder"] * 3 + ["slice"] * 3
    log.clear()
    measure_alternating(lanes_of(clock, log, [], a=1), course_of(repeats=20, seconds=1000))
    assert len(log) == 20


def test_cheap_things_come_first(monkeypatch) -> None:
    clock, log = Clock(monkeypatch), []
    lanes = lanes_of(clock, log, [Case("graph", "encoder"), Case("graph", "detector")], a=5)
    lanes[0].measured.warmup[Case("graph", "encoder")] = [Sample(900.0)]
    measure_alternating(lanes, course_of(repeats=1, seconds=100, levels=("graph",)))
    assert [name for _, name, _ in log] == ["detector", "encoder"]


def test_the_fastest_segments_a_volume_as_long_as_time_allows(monkeypatch) -> None:
    clock, log = Clock(monkeypatch), []
    lanes = lanes_of(clock, log, [], slow=900, quick=100)
    for lane in lanes:
        lane.measured.samples[SLICE] = lane.measured.warmup[SLICE]
    subject = Subject(Path("v.tif"), "v", (100, 64, 64), (10, 42), None, None, 5)
    for seconds, slices in ((0.01, 2), (0.55, 5), (1000, 16)):
        log.clear()
        lanes[1].measured.samples = {SLICE: lanes[1].measured.warmup[SLICE]}
        clock.now = 0.0
        measure_volume(lanes, subject, course_of(seconds=seconds, repeats=1))
        assert log == [("quick", "volume", 0)]
        assert list(lanes[1].measured.samples)[-1] == Case("volume", "volume", slices)


def test_more_combinations_are_opened_only_as_far_as_the_time_allows(monkeypatch, bundle, tmp_path) -> None:
    opened = []

    class Opening(FakeWorker):
        def __init__(self, setup, listen) -> None:
            super().__init__(setup.engine, clock, [], 2000)
            opened.append(setup.engine)
            self.setup, self.started, self.load_ms, self.is_proven = setup, clock.now, 1.0, True
            self.graphs, self.encoder_batches = {}, [1]

        def __enter__(self):
            clock.now += 3
            return self

        def __exit__(self, *error) -> None:
            return None

    clock = Clock(monkeypatch)
    monkeypatch.setattr(latency_lanes, "Worker", Opening)
    subject = choose_subject(bundle.manifest, BenchmarkOptions(), tmp_path)
    wanted = [Combination(engine, "cpu", "fp32") for engine in "abcdef"]

    def lanes_within(seconds, **wishes):
        clock.now = 0.0
        opened.clear()
        course = course_of(seconds=seconds, **wishes)
        with ExitStack() as stack:
            lanes = latency_lanes.open_lanes(bundle, wanted, subject, course, stack)
        return len(lanes), [row.engine for row in course.left_out]

    # One costs 5 s to open and 2 x 3 x 2 s to sample.
    assert lanes_within(10)[0] == 1, "one is always measured"
    assert lanes_within(40) == (3, ["d", "e", "f"])
    assert lanes_within(1000) == (6, [])
    assert lanes_within(10, engines=tuple("abcdef")) == (6, [])


def test_what_fails_is_left_out_or_raised_if_it_was_asked_for(monkeypatch, bundle, tmp_path) -> None:
    class Failing:
        def __init__(self, setup, listen) -> None:
            raise BundleError(f"{setup.bundle}: {setup.engine} has no kernel")

    monkeypatch.setattr(latency_lanes, "Worker", Failing)
    subject = choose_subject(bundle.manifest, BenchmarkOptions(), tmp_path)
    wanted = [Combination("a", "cpu", "fp32")]
    with ExitStack() as stack, pytest.raises(BundleError, match="no kernel"):
        latency_lanes.open_lanes(bundle, wanted, subject, course_of(), stack)


def test_trust_in_compiled_engines_reaches_the_bench_and_the_command(bundle, tmp_path) -> None:
    digests = ("ab" * 32, "cd" * 32)
    options = BenchmarkOptions(trusted_engines=digests)
    setup = bench_setup(
        bundle, Combination("a", "cpu", "fp32"), choose_subject(bundle.manifest, options, tmp_path), options, tmp_path
    )
    assert setup.trusted_engines == digests
    assert f"--trust-engine {digests[0]} --trust-engine {digests[1]}" in latency._command(tmp_path, options)


def test_what_an_engine_prepares_is_told(bundle) -> None:
    told = []
    course = Course(BenchmarkOptions(), Path(), told.append)
    course.tell_of_preparation(Progress("compile", 3, 12, "encoder.onnx, Tactics"))
    course.tell_of_preparation(Progress("compile", 0, 1, "decoder.onnx for 4 tiles"))
    assert [progress.note for progress in told] == [
        "compile: encoder.onnx, Tactics, 25%",
        "compile: decoder.onnx for 4 tiles",
    ]
    assert {progress.stage for progress in told} == {"benchmark"}


# What follows ---------------------------------------------------------------------------------------------------------

SUBJECT = Subject(Path("v.tif"), "v.tif", (200, 500, 400), (0, 9), None, None, 7)


def test_rows_of_samples() -> None:
    measured = Measurements(Combination("openvino", "cpu", "bf16"))
    case = Case("graph", "decoder", 8, 16)
    measured.warmup[case] = [Sample(50.0, rss_mb=900.0)]
    measured.samples[case] = [Sample(float(ms), rss_mb=800.0 + ms) for ms in (10, 30, 20)]
    measured.samples[SLICE] = [Sample(ms, {"encode": ms / 2, "detect": 0.0}, 4.0, 1) for ms in (100.0, 200.0, 300.0)]
    rates = Rates(
        {case: (4e7, None)}, (MatrixPeak("openvino", "cpu", "bf16", 8.0), MatrixPeak("x", "cpu", "fp32", 1e9))
    )
    graph, whole, stage = rows_of(measured, SUBJECT, rates, ("graph", "slice", "stage"))
    assert (graph.name, graph.batch, graph.unit, graph.boxes) == ("decoder:16", 8, "box", None)
    assert graph.samples_ms == (10.0, 30.0, 20.0)
    assert graph.warmup_ms == (50.0,)
    assert (graph.median_ms, graph.mad_ms, graph.per_second) == (20, 10, 400)
    assert (graph.peak_rss_mb, graph.peak_device_mb) == (900, None)
    assert (graph.gflop_per_second, graph.of_peak) == (pytest.approx(2.0), pytest.approx(0.25))
    assert (whole.boxes, whole.objects, whole.megavoxels_per_second) == (7, 4.0, pytest.approx(5 * 0.2))
    assert (stage.name, stage.samples_ms) == ("encode", (50.0, 100.0, 150.0))
    assert [row.level for row in rows_of(measured, SUBJECT, rates, ("slice",))] == ["slice"]


def test_the_encoder_at_its_best_is_what_the_whole_is_compared_with() -> None:
    rows = [
        make_row("graph", "encoder", [100] * 3),
        make_row("graph", "encoder", [200] * 3, batch=4),
        make_row("slice", "slice", [500] * 3),
        make_row("volume", "volume", [2000], batch=5),
        make_row("slice", "slice", [900] * 3, "openvino"),
    ]
    found = {(ratio.row, ratio.engine): ratio for ratio in ratios_of(rows, tiles=6)}
    assert found.keys() == {("slice", "onnxruntime"), ("volume", "onnxruntime")}
    assert found["slice", "onnxruntime"].value == pytest.approx(6 * 50 / 500)
    assert found["volume", "onnxruntime"].value == pytest.approx(5 * 6 * 50 / 2000)
    assert ratios_of(rows, tiles=0) == []


def test_the_time_for_a_volume(bundle) -> None:
    slices = [make_row("slice", "slice", [2000] * 3), make_row("slice", "slice", [100] * 3, TORCH_REFERENCE)]
    estimate = estimate_volume(slices, SUBJECT, bundle.manifest, 4)
    assert estimate.hours == pytest.approx(200 * 2 / 3600)
    assert (estimate.slices, estimate.slice_hw, estimate.engine) == (200, (500, 400), "onnxruntime")
    run = make_row("volume", "volume", [9000], "openvino", batch=3)
    assert estimate_volume([*slices, run], SUBJECT, bundle.manifest, 4).hours == pytest.approx(200 * 3 / 3600)
    assert estimate_volume([], SUBJECT, bundle.manifest, 4) is None
    usual = estimate_volume(slices, replace(SUBJECT, zoom=1.0), bundle.manifest, 1)
    tiles = int(re.search(r"of (\d+) such tiles", usual.basis)[1])
    side = bundle.manifest.preprocessing
    per_axis = 1 + -(-(2048 - side.tile_size_px) // (side.tile_size_px - side.overlap_px))
    assert tiles == per_axis**2
    assert usual.hours == pytest.approx(1000 * tiles * 2 / 3600)

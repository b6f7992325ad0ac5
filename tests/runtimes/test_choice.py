"""`auto` takes the fastest proven combination that works here, and nothing that is not proven while one is."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import pytest

from dendsam_deploy.bundle.bundle import Bundle
from dendsam_deploy.bundle.latency import BENCHMARK_FILE, LatencyReport, LatencyRow, graph_digests, latency_to_json
from dendsam_deploy.bundle.manifest import Decoding, GraphSpec, Manifest, Preprocessing, Thresholds
from dendsam_deploy.bundle.parity import Combination, ParityReport, ParityRow
from dendsam_deploy.errors import InvalidArgumentError, MissingCapabilityError
from dendsam_deploy.host import examine_host
from dendsam_deploy.runtimes import session
from dendsam_deploy.runtimes.choice import PLACES, choose, combinations_on_offer, machine_of, times_measured_here
from dendsam_deploy.runtimes.session import ENGINES, SessionOptions

EVERY = tuple(ENGINES)
TRT = Combination("tensorrt", "cuda:0", "fp16")
GPU = Combination("onnxruntime", "cuda:0", "fp32")
VINO = Combination("openvino", "cpu", "fp32")
VINO_BF16 = Combination("openvino", "cpu", "bf16")
ORT = Combination("onnxruntime", "cpu", "fp32")
OFFERED = (TRT, GPU, VINO, VINO_BF16, ORT)


def a_manifest(**precisions: tuple) -> Manifest:
    graphs = tuple(GraphSpec(role, at, 20, (), (), ()) for role, several in precisions.items() for at in several)
    return Manifest(
        schema_version=1,
        name="toy",
        created_utc="",
        licence="",
        model_type="tiny",
        sources=(),
        graphs=graphs,
        preprocessing=Preprocessing("minmax_uint8", 64, 0, None, None),
        decoding=Decoding((4,), 0.25, 16.0),
        thresholds=Thresholds(0.25, 0.6, 0.0, 25),
        producers={},
        extra_files=(),
    )


def a_bundle(proven: tuple[Combination, ...] = (), failed: tuple[Combination, ...] = ()) -> Bundle:
    rows = [ParityRow(2, "encoder", *c, "cosine", 1.0, 0.9, c in proven, "stored") for c in (*proven, *failed)]
    return Bundle(Path("toy"), a_manifest(encoder=("fp32",)), ParityReport(tuple(rows)) if rows else None)


def everything_works(engine: str, device: str) -> None:
    return None


def chosen(bundle: Bundle, timings_ms: dict | None = None, works=everything_works) -> Combination:
    return choose(bundle, OFFERED, works, timings_ms or {}).combination


def test_every_engine_has_a_place():
    assert set(ENGINES) <= {engine for _, engine in PLACES}


def test_what_a_bundle_offers():
    manifest = a_manifest(encoder=("fp32", "bf16", "int8"), decoder=("fp32", "bf16"), detector=("fp32",))
    offered = combinations_on_offer(manifest, SessionOptions(), ("onnxruntime", "openvino"))
    assert [c for c in offered if c.device == "cpu"] == [
        Combination(engine, "cpu", precision)
        for engine, precision in itertools.product(("openvino", "onnxruntime"), ("fp32", "bf16", "int8"))
    ]
    assert offered[0] == Combination("onnxruntime", "cuda:0", "bf16")
    wishes = SessionOptions("onnxruntime", "cuda", "int8")
    assert combinations_on_offer(manifest, wishes, EVERY) == (Combination("onnxruntime", "cuda:0", "int8"),)
    wishes = SessionOptions("onnxruntime", "cuda:3", "fp32")
    assert combinations_on_offer(manifest, wishes, EVERY)[0].device == "cuda:3"


def test_a_role_without_any_usable_graph_rules_a_precision_out():
    manifest = a_manifest(encoder=("fp32", "fp16"), decoder=("fp16",))
    assert {c.precision for c in combinations_on_offer(manifest, SessionOptions(), EVERY)} == {"fp16"}
    with pytest.raises(MissingCapabilityError, match="at fp32; it has fp16"):
        combinations_on_offer(manifest, SessionOptions(precision="fp32"), EVERY)


def test_an_engine_that_compiles_in_every_session_is_only_taken_on_request():
    manifest = a_manifest(encoder=("fp32",))
    assert "onnxruntime+tensorrt" not in {c.engine for c in combinations_on_offer(manifest, SessionOptions(), EVERY)}
    (only,) = combinations_on_offer(manifest, SessionOptions("onnxruntime+tensorrt"), EVERY)
    assert only == Combination("onnxruntime+tensorrt", "cuda:0", "fp32")
    with pytest.raises(MissingCapabilityError, match="runs on cuda"):
        combinations_on_offer(manifest, SessionOptions("onnxruntime+tensorrt", "cpu"), EVERY)


@pytest.mark.parametrize("device", ["tpu", "cuda:", "cuda:x", "CPU", ""])
def test_a_device_that_does_not_exist_is_refused(device):
    with pytest.raises(InvalidArgumentError, match="choose cpu, cuda or cuda:N"):
        combinations_on_offer(a_manifest(encoder=("fp32",)), SessionOptions(device=device), EVERY)


def test_only_proven_combinations_are_taken():
    assert chosen(a_bundle(proven=(ORT,))) == ORT
    assert chosen(a_bundle(proven=(ORT, VINO), failed=(TRT, GPU))) == VINO
    assert chosen(a_bundle(proven=(ORT,)), {VINO: 1.0, ORT: 9.0}) == ORT, "fast, but not proven"


def test_a_proof_of_reduced_precision_holds_for_the_processor_that_gave_it():
    """One without bf16 instructions computes a bf16 graph in fp32, and proves nothing about one that has them."""
    parity = a_bundle(proven=(VINO_BF16, ORT)).parity
    assert parity is not None

    def proven_by(machine: str) -> Bundle:
        return replace(a_bundle(), parity=ParityReport(tuple(replace(row, machine=machine) for row in parity.rows)))

    times = {VINO_BF16: 1.0, ORT: 2.0}
    assert chosen(proven_by(machine_of("cpu")), times) == VINO_BF16
    assert chosen(proven_by("abacus"), times) == ORT, "fp32 is the same everywhere"


def test_a_proof_on_a_gpu_holds_for_that_gpu_even_at_fp32():
    """A bundle that was verified elsewhere brings rows about a cuda:0 that is another GPU than the one here."""
    parity = a_bundle(proven=(GPU, ORT)).parity
    assert parity is not None
    rows = tuple(replace(row, machine="NVIDIA RTX 5090" if row.device != "cpu" else "") for row in parity.rows)
    verified_elsewhere = replace(a_bundle(), parity=ParityReport(rows))
    choice = choose(verified_elsewhere, (GPU, ORT), everything_works, {})
    assert (choice.combination, choice.is_proven) == (ORT, True)
    choice = choose(verified_elsewhere, (GPU,), everything_works, {})
    assert (choice.combination, choice.is_proven) == (GPU, False)


def test_a_proof_on_a_device_of_a_later_version_is_passed_over():
    later = ParityRow(2, "encoder", "warp", "npu:0", "bf16", "cosine", 1.0, 0.9, True, "stored", "NPU 9000")
    parity = a_bundle(proven=(ORT,)).parity
    assert parity is not None
    bundle = replace(a_bundle(), parity=ParityReport((*parity.rows, later)))
    assert chosen(bundle) == ORT


def test_without_measurements_gpus_and_fp32_on_cpus_are_preferred():
    assert chosen(a_bundle(proven=(ORT, VINO_BF16, VINO, GPU, TRT))) == TRT
    assert chosen(a_bundle(proven=(ORT, VINO_BF16, VINO))) == VINO


def test_measured_times_decide():
    bundle = a_bundle(proven=(ORT, VINO_BF16, VINO))
    choice = choose(bundle, OFFERED, everything_works, {VINO: 20.0, VINO_BF16: 10.0, ORT: 30.0})
    assert (choice.combination, choice.is_proven) == (VINO_BF16, True)
    assert choice.reason == "the fastest of 3 that were measured here"


@pytest.mark.parametrize(
    ("times_ms", "expected", "reason"),
    [
        ({ORT: 30.0}, VINO, "preferred of 3 proven ones; not measured here"),
        ({VINO: 40.0}, VINO, "preferred of 3 proven ones"),
        ({VINO_BF16: 40.0}, VINO_BF16, "preferred of 3 proven ones"),
        ({VINO: 40.0, ORT: 30.0}, ORT, "the fastest of 2 that were measured here"),
    ],
)
def test_an_engine_that_was_not_measured_is_not_slower_than_one_that_was(times_ms, expected, reason):
    """As after ``benchmark --engine onnxruntime``, or where OpenVINO was installed later."""
    choice = choose(a_bundle(proven=(ORT, VINO_BF16, VINO)), OFFERED, everything_works, times_ms)
    assert (choice.combination, choice.reason) == (expected, reason)


def measured(bundle: Bundle, **changes) -> None:
    """Put a benchmark of all combinations on the CPU into a bundle; openvino in bf16 was the fastest."""
    rows = tuple(
        LatencyRow(
            "slice",
            "slice",
            *combination,
            batch=1,
            unit="slice",
            boxes=4,
            objects=None,
            samples_ms=(ms,),
            warmup_ms=(),
            median_ms=ms,
            p90_ms=ms,
            p99_ms=ms,
            mad_ms=0.0,
            per_second=1000 / ms,
        )
        for combination, ms in ((VINO, 20.0), (VINO_BF16, 10.0), (ORT, 30.0))
    )
    report = LatencyReport(
        bundle="toy",
        graphs=graph_digests(bundle.manifest),
        created_utc="",
        host=examine_host().to_document(),
        command="",
        settings={},
        combinations=(),
        rows=rows,
        ratios=(),
        matrix_peaks=(),
        estimates=(),
        left_out=(),
    )
    (bundle.path / BENCHMARK_FILE).write_text(latency_to_json(replace(report, **changes)))


def test_a_benchmark_of_this_machine_and_these_graphs_decides(tmp_path: Path):
    bundle = replace(a_bundle(proven=(ORT, VINO_BF16, VINO)), path=tmp_path)
    assert times_measured_here(bundle) == {}
    measured(bundle)
    assert times_measured_here(bundle) == {VINO: 20.0, VINO_BF16: 10.0, ORT: 30.0}
    measured(bundle, host=examine_host().to_document() | {"cpu_cores": 1000})
    assert times_measured_here(bundle) == {}, "another machine"
    measured(bundle, graphs={"encoder.onnx": "0"})
    assert times_measured_here(bundle) == {}, "other graphs"
    measured(bundle)
    written = (tmp_path / BENCHMARK_FILE).read_text()
    for damaged in ("{", "[" * 100_000, written.replace("20.0", "9" * 400), written.replace("20.0", "9" * 5000), "\0"):
        (tmp_path / BENCHMARK_FILE).write_text(damaged)
        assert times_measured_here(bundle) == {}, "no reason not to segment"
    (tmp_path / BENCHMARK_FILE).unlink()
    (tmp_path / BENCHMARK_FILE).mkdir()
    assert times_measured_here(bundle) == {}


def test_a_gpu_that_was_not_measured_is_not_slower_than_a_processor_that_was():
    bundle = a_bundle(proven=(GPU, ORT))
    assert chosen(bundle, {ORT: 5.0}) == GPU
    assert chosen(bundle, {ORT: 5.0, GPU: 50.0}) == ORT
    assert chosen(bundle, {ORT: 50.0, GPU: 5.0}) == GPU


def test_what_does_not_work_here_is_passed_over():
    bundle = a_bundle(proven=(TRT, VINO, ORT))
    asked = []

    def only_onnxruntime(engine: str, device: str) -> str | None:
        asked.append((engine, device))
        return None if engine == "onnxruntime" else "not installed"

    assert chosen(bundle, works=only_onnxruntime) == ORT
    assert asked == [("tensorrt", "cuda:0"), ("openvino", "cpu"), ("onnxruntime", "cpu")], "each is asked once"


def test_where_nothing_is_proven_fp32_is_taken_and_said_to_be_unproven():
    choice = choose(a_bundle(), (VINO_BF16, VINO, ORT), everything_works, {VINO_BF16: 1.0})
    assert (choice.combination, choice.is_proven) == (VINO, False)
    choice = choose(a_bundle(failed=(VINO,)), (VINO_BF16, VINO, ORT), everything_works, {})
    assert choice.combination == ORT, "nobody knows anything against it"
    choice = choose(a_bundle(failed=(VINO, ORT)), (VINO, ORT), everything_works, {})
    assert (choice.combination, choice.reason) == (VINO, "1 limits broken")
    # A bundle without fp32, or a wish for something else: what there is.
    assert choose(a_bundle(), (VINO_BF16,), everything_works, {}).combination == VINO_BF16


def test_where_nothing_works_every_reason_is_given():
    with pytest.raises(MissingCapabilityError, match="openvino on cpu: no openvino; onnxruntime on cpu: no"):
        choose(a_bundle(), (VINO, ORT), lambda engine, device: f"no {engine}", {})


def test_a_broken_package_is_no_error_in_auto(monkeypatch: pytest.MonkeyPatch, exported):
    def broken(path, spec, options):
        raise MissingCapabilityError("engine openvino: libtbb.so: cannot open shared object file")

    monkeypatch.setattr(session, "ENGINES", MappingProxyType({**ENGINES, "openvino": broken}))
    bundle = Bundle.open(exported.bundle)
    assert session.open_session(bundle, SessionOptions(device="cpu")).engine == "onnxruntime"
    with pytest.raises(MissingCapabilityError, match=r"libtbb\.so"):
        session.open_session(bundle, SessionOptions(engine="openvino"))

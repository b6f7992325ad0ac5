"""One combination on the bench: samples execute what they say, with inputs that change from one to the next."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from dendsam_deploy import errors
from dendsam_deploy.bundle.bundle import Bundle
from dendsam_deploy.bundle.latency import TORCH_REFERENCE
from dendsam_deploy.bundle.parity import Combination
from dendsam_deploy.errors import BundleError, CheckpointError, InvalidArgumentError, MissingCapabilityError
from dendsam_deploy.evaluate import latency_worker
from dendsam_deploy.evaluate.latency_bench import Bench, BenchSetup, Case, open_bench
from dendsam_deploy.evaluate.latency_plan import BenchmarkOptions, bench_setup, choose_subject
from dendsam_deploy.evaluate.latency_worker import Worker, serve
from dendsam_deploy.progress import Progress

SLICE = Case("slice", "slice")
ON_CPU = Combination("onnxruntime", "cpu", "fp32")


@pytest.fixture(scope="module")
def setup(exported, tmp_path_factory) -> BenchSetup:
    workspace = tmp_path_factory.mktemp("workspace")
    bundle, options = Bundle.open(exported.bundle), BenchmarkOptions(boxes=5, threads=1)
    return bench_setup(bundle, ON_CPU, choose_subject(bundle.manifest, options, workspace), options, workspace)


@pytest.fixture(scope="module")
def bench(setup) -> Bench:
    with open_bench(setup) as opened:
        yield opened


class Spy:
    """A runner that notes what it is called with, and cannot do more than any runner."""

    def __init__(self, runner) -> None:
        self.runner, self.calls = runner, []

    def __getattr__(self, name):
        return getattr(self.runner, name)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        self.runner.__exit__(kind, error, traceback)

    def run(self, inputs):
        self.calls.append({name: np.array(value) for name, value in inputs.items()})
        return self.runner.run(inputs)


@pytest.fixture
def spied(bench, monkeypatch):
    spies = {role: Spy(getattr(bench.session, role)) for role in ("detector", "encoder", "decoder")}
    monkeypatch.setattr(bench, "session", replace(bench.session, **spies))
    return spies


@pytest.mark.parametrize(
    ("case", "shapes"),
    [
        (Case("graph", "detector"), {"tiles": (1, 128, 128)}),
        (Case("graph", "encoder", 3), {"tiles": (3, 128, 128), "sizes": (3, 2)}),
        (
            Case("graph", "decoder", 7, 4),
            {"embeddings": (1, 256, 8, 8), "boxes": (7, 4), "tile_index": (7,), "region": (1,)},
        ),
    ],
)
def test_a_graph_is_called_once_with_other_inputs_than_before(bench, spied, case, shapes) -> None:
    samples = [bench.take(case, index) for index in (0, 1, 4)]
    calls = spied[case.name].calls
    assert [{name: value.shape for name, value in call.items()} for call in calls] == [shapes] * 3
    first = next(iter(shapes))
    assert not np.array_equal(calls[0][first], calls[1][first])
    np.testing.assert_array_equal(calls[0][first], calls[2][first])
    assert all(sample.total_ms > 0 and sample.stage_ms == {} for sample in samples)


def test_a_slice_has_its_objects_and_its_stages(bench, spied) -> None:
    sample = bench.take(SLICE, 0)
    assert sample.stage_ms.keys() >= {"read", "prepare", "detect", "encode", "decode", "paint"}
    within = sum(ms for stage, ms in sample.stage_ms.items() if stage not in ("read", "prepare"))
    assert sample.total_ms >= 0.99 * within
    assert sample.tiles == 1
    assert 0 < sample.objects <= 5, "objects that others cover do not come out"
    assert len(spied["detector"].calls) == len(spied["encoder"].calls) == 1
    assert sum(len(call["boxes"]) for call in spied["decoder"].calls) == 5
    bench.take(SLICE, 1)
    assert not np.array_equal(*(call["tiles"] for call in spied["encoder"].calls))


def test_a_volume_is_segmented_whole_and_leaves_nothing(bench, setup, spied) -> None:
    sample = bench.take(Case("volume", "volume", 3), 0)
    assert len(spied["encoder"].calls) == 3
    assert sample.objects > 0
    assert {path.name for path in Path(setup.workspace).iterdir()} == {"phantom.tif"}


def test_memory_is_that_of_the_sample(bench) -> None:
    sample = bench.take(SLICE, 0)
    assert sample.rss_mb is None or sample.rss_mb > 10
    assert sample.device_mb is None


def test_operations_of_the_graphs(bench) -> None:
    useful, reference = bench.flop(Case("graph", "encoder", 2))
    assert 0 < useful < reference
    one, eight = (bench.flop(Case("graph", "decoder", count, 4)) for count in (1, 8))
    assert one[1] is eight[1] is None
    assert one[0] < eight[0] < 8 * one[0], "a tile's share is paid once"
    assert bench.flop(Case("graph", "detector"))[0] > 0


def test_boxes_are_given_where_there_is_no_detector(bench, spied, monkeypatch) -> None:
    monkeypatch.setattr(bench, "session", replace(bench.session, detector=None))
    assert bench.take(SLICE, 0).objects > 0
    assert bench.take(Case("volume", "volume", 1), 0).objects > 0
    assert sum(len(call["boxes"]) for call in spied["decoder"].calls) == 10
    with pytest.raises(InvalidArgumentError, match="has no detector"):
        bench.take(Case("graph", "detector"), 0)


def test_the_detector_decides_where_no_number_is_given(setup, exported) -> None:
    with open_bench(replace(setup, boxes=None)) as opened:
        spy = Spy(opened.session.detector)
        opened.session = replace(opened.session, detector=spy)
        sample = opened.take(SLICE, 0)
    assert len(spy.calls) == 1
    assert sample.objects is not None
    assert sample.tiles == (1 if sample.objects else 0)


def test_the_reference_runs_the_original_modules(setup, exported) -> None:
    reference = replace(setup, engine=TORCH_REFERENCE, sam=str(exported.sam), detector=str(exported.detector))
    with open_bench(reference) as opened:
        assert opened.graphs == {"detector": "fp32", "encoder": "fp32", "decoder": "fp32"}
        assert opened.take(SLICE, 0).total_ms > 0
        assert opened.take(Case("graph", "decoder", 2, 4), 0).total_ms > 0
    with pytest.raises(InvalidArgumentError, match="needs the SAM checkpoint"):
        open_bench(replace(reference, sam=None))
    with pytest.raises(CheckpointError):
        open_bench(replace(reference, sam=str(exported.detector)))


def converse(*orders):
    """Serve some orders in this process; return the answers."""
    answers = io.StringIO()
    serve(io.StringIO("".join(json.dumps(order) + "\n" for order in orders)), answers)
    return [json.loads(line) for line in answers.getvalue().splitlines()]


def test_orders_and_answers(setup, monkeypatch) -> None:
    monkeypatch.setattr("dendsam_deploy.evaluate.matrix_peak._LEAST_SECONDS", 0.0)
    encoder = asdict(Case("graph", "encoder"))
    opened, sample, wrong, flop, numpy_peak = converse(
        {"do": "open", "setup": asdict(setup)},
        {"do": "take", "case": encoder, "index": 0},
        {"do": "take", "case": {**encoder, "name": "oracle"}, "index": 0},
        {"do": "flop", "case": encoder},
        {"do": "numpy_peak"},
    )
    assert opened["graphs"]["encoder"] == "fp32"
    assert opened["encoder_batches"] == [1]
    assert sample["total_ms"] > 0
    assert wrong["error"] == "InvalidArgumentError"
    assert "no oracle" in wrong["message"]
    assert flop["flop"][0] > 0
    assert numpy_peak["flop_per_second"] > 0


def test_a_bench_that_does_not_open_says_why(setup, tmp_path) -> None:
    (answer,) = converse({"do": "open", "setup": asdict(replace(setup, bundle=str(tmp_path)))})
    assert issubclass(getattr(errors, answer["error"]), BundleError)
    assert "manifest.json" in answer["message"]


def test_a_worker_measures_in_its_own_process(setup) -> None:
    with Worker(setup) as worker:
        assert worker.load_ms > 0
        assert worker.graphs.keys() == {"detector", "encoder", "decoder"}
        assert worker.take(SLICE, 0).total_ms > 0
        with pytest.raises(InvalidArgumentError, match="no oracle"):
            worker.take(Case("graph", "oracle"), 0)
        assert worker.take(SLICE, 1).total_ms > 0, "an error does not end it"
        worker._process.kill()
        with pytest.raises(MissingCapabilityError, match=r"its process died \(signal 9"):
            worker.take(SLICE, 2)


def test_a_worker_passes_on_why_it_cannot_open(setup, tmp_path) -> None:
    with pytest.raises(BundleError, match=r"manifest\.json"), Worker(replace(setup, bundle=str(tmp_path))):
        pass


def test_a_worker_tells_what_its_engine_compiles_and_takes_trust_along(setup, tmp_path) -> None:
    """torch's packages are the only engines here that are compiled and kept; a digest that is none ends it in time."""
    pytest.importorskip("torch")
    bundle = shutil.copytree(setup.bundle, tmp_path / "bundle")
    packaged = replace(setup, bundle=str(bundle), engine="torch+package", trusted_engines=("ab",))
    told = []
    with Worker(packaged, told.append) as worker, pytest.raises(InvalidArgumentError, match="'ab' is no SHA-256"):
        worker.take(Case("graph", "encoder"), 0)
    assert told == [Progress("compile", 0, 1, "encoder.onnx for 1 tiles")]


def test_an_error_is_passed_on_as_the_branch_that_it_belongs_to(setup, monkeypatch) -> None:
    class HangError(MissingCapabilityError):
        """Of a file that the other side does not know."""

    def hangs(setup, progress):
        raise HangError("the GPU did not answer")

    monkeypatch.setattr(latency_worker, "open_bench", hangs)
    (answer,) = converse({"do": "open", "setup": asdict(setup)})
    assert answer == {"error": "MissingCapabilityError", "message": "the GPU did not answer"}

"""ONNX Runtime behind the runner's seam: results, refusals, and no foreign exception."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from sum_graph import SPEC, write_sum_graph

from dendsam_deploy.errors import BundleError, InvalidArgumentError, MissingCapabilityError
from dendsam_deploy.runtimes import portable
from dendsam_deploy.runtimes.portable import OnnxRunner, RunnerOptions, canonical_device


@pytest.fixture
def graph_file(tmp_path: Path) -> Path:
    return write_sum_graph(tmp_path / "graph.onnx")


def test_runs_a_graph_with_a_free_batch_axis(graph_file: Path):
    tiles = np.arange(24, dtype=np.uint8).reshape(4, 2, 3)
    with OnnxRunner(graph_file, SPEC, RunnerOptions(threads=1)) as runner:
        for batch in (tiles, tiles[:1], tiles[:0]):
            np.testing.assert_array_equal(runner.run({"tiles": batch})["sums"], batch.sum(axis=(1, 2)))
        assert (runner.engine, runner.device, runner.borrows_outputs) == ("onnxruntime", "cpu", False)


@pytest.mark.parametrize(
    "inputs",
    [{}, {"tiles": np.zeros((1, 2, 3), np.float32)}, {"tiles": np.zeros((1, 2, 4), np.uint8)}, {"other": np.zeros(1)}],
    ids=["missing", "dtype", "shape", "name"],
)
def test_wrong_inputs_are_refused_in_one_line(graph_file: Path, inputs: dict[str, np.ndarray]):
    refused = pytest.raises(InvalidArgumentError, match=r"graph\.onnx")
    with OnnxRunner(graph_file, SPEC, RunnerOptions(threads=1)) as runner, refused as caught:
        runner.run(inputs)
    assert "\n" not in str(caught.value)


def test_a_closed_runner_says_so(graph_file: Path):
    runner = OnnxRunner(graph_file, SPEC, RunnerOptions())
    with pytest.raises(InvalidArgumentError, match="not open"):
        runner.run({"tiles": np.zeros((1, 2, 3), np.uint8)})


@pytest.mark.parametrize("content", [None, b"", b"text", b"\x08\x0a" * 40], ids=["absent", "empty", "text", "noise"])
def test_a_file_that_is_no_graph_is_a_bundle_error(tmp_path: Path, content: bytes | None):
    path = tmp_path / "broken.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BundleError, match=r"broken\.onnx.*export the bundle again"):
        OnnxRunner(path, SPEC, RunnerOptions()).__enter__()


def test_an_unknown_operator_is_a_bundle_error(graph_file: Path):
    model = onnx.load(graph_file)
    model.graph.node[0].op_type = "Levitate"
    onnx.save(model, graph_file)
    with pytest.raises(BundleError, match="Levitate"):
        OnnxRunner(graph_file, SPEC, RunnerOptions()).__enter__()


def test_a_failure_while_running_names_the_device(graph_file: Path):
    """A Reshape to an impossible size passes loading and fails on the first real input."""
    shape = helper.make_tensor("shape", TensorProto.INT64, [1], [5])
    model = onnx.load(graph_file)
    del model.graph.node[1:]
    model.graph.initializer.append(shape)
    model.graph.node.append(helper.make_node("Reshape", ["real", "shape"], ["sums"]))
    onnx.save(model, graph_file)
    refused = pytest.raises(MissingCapabilityError, match="failed on cpu")
    with OnnxRunner(graph_file, SPEC, RunnerOptions()) as runner, refused:
        runner.run({"tiles": np.zeros((1, 2, 3), np.uint8)})


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:x", "CPU", "tpu:0", ""])
def test_an_unknown_device_is_a_wrong_argument(device: str):
    with pytest.raises(InvalidArgumentError, match="choose cpu, cuda or cuda:N"):
        canonical_device(device)


def test_cuda_is_refused_where_no_provider_is_installed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(portable.onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(MissingCapabilityError, match="no CUDA provider"):
        canonical_device("cuda")


def test_cuda_gets_a_number_where_the_provider_is_installed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(portable.onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    assert [canonical_device(name) for name in ("cuda", "cuda:3")] == ["cuda:0", "cuda:3"]


def test_a_provider_that_vanishes_silently_is_refused(graph_file: Path, monkeypatch: pytest.MonkeyPatch):
    """ONNX Runtime drops a provider whose libraries do not load and goes on with the CPU; here it always does."""
    monkeypatch.setattr(portable.onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(portable, "_providers", lambda device, provider, precision: ["CPUExecutionProvider"])
    with pytest.raises(MissingCapabilityError, match="CUDA provider did not load"):
        OnnxRunner(graph_file, SPEC, RunnerOptions(device="cuda")).__enter__()


def test_the_library_that_a_provider_misses_is_named(
    graph_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    """A package for GPUs whose CUDA is not there; nothing is printed, and nothing else is used instead."""
    (tmp_path / "libonnxruntime_providers_cuda.so").write_bytes(b"no library")
    monkeypatch.setattr(portable.onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(portable.native, "__file__", str(tmp_path / "onnxruntime_pybind11_state.so"))
    monkeypatch.setattr(portable, "_providers", lambda device, provider, precision: ["CPUExecutionProvider"])
    with pytest.raises(MissingCapabilityError, match=r"libonnxruntime_providers_cuda\.so.*doctor"):
        OnnxRunner(graph_file, SPEC, RunnerOptions(device="cuda")).__enter__()
    assert capfd.readouterr().out == ""


def test_the_tensorrt_provider_is_part_of_the_name_of_the_engine(graph_file: Path, monkeypatch: pytest.MonkeyPatch):
    """What was proven with one provider is not proven with the other."""
    options = RunnerOptions(device="cuda:2", provider="tensorrt")
    monkeypatch.setattr(portable.onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    with pytest.raises(MissingCapabilityError, match="no TensorRT provider"):
        OnnxRunner(graph_file, SPEC, options)
    monkeypatch.setattr(portable.onnxruntime, "get_available_providers", lambda: ["TensorrtExecutionProvider"])
    runner = OnnxRunner(graph_file, SPEC, options)
    assert (runner.engine, runner.device) == ("onnxruntime+tensorrt", "cuda:2")


def test_work_that_a_gpu_leaves_to_the_cpu_is_refused(graph_file: Path):
    """Here everything runs on the CPU, so that a session on a GPU that did the same would have to be refused."""
    with OnnxRunner(graph_file, SPEC, RunnerOptions(threads=1)) as runner:
        portable._check_placement(runner._open_session(), graph_file, "cuda")  # a cast and a sum weigh nothing
    model = onnx.load(graph_file)
    model.graph.node[1].CopyFrom(helper.make_node("MatMul", ["real", "matrix"], ["sums"]))
    model.graph.initializer.append(helper.make_tensor("matrix", TensorProto.FLOAT, [3, 1], [1.0, 1.0, 1.0]))
    onnx.save(model, graph_file)
    refused = pytest.raises(MissingCapabilityError, match="would execute MatMul on the CPU")
    with OnnxRunner(graph_file, SPEC, RunnerOptions(threads=1)) as runner, refused:
        portable._check_placement(runner._open_session(), graph_file, "cuda")


@pytest.mark.parametrize(
    ("provider", "operators", "misplaced"),
    [
        ("cuda", {"CUDAExecutionProvider": {"MatMul"}, "CPUExecutionProvider": {"Shape", "Gather"}}, ""),
        ("tensorrt", {"TensorrtExecutionProvider": {"MatMul"}, "CUDAExecutionProvider": {"Cast"}}, ""),
        (
            "tensorrt",
            {"CUDAExecutionProvider": {"MatMul", "Conv", "Cast"}},
            "Conv, MatMul with CUDAExecutionProvider, not with TensorRT",
        ),
    ],
)
def test_no_provider_takes_the_place_of_another(provider: str, operators: dict[str, set[str]], misplaced: str):
    """Where TensorRT takes nothing of a graph, ONNX Runtime hands everything to CUDA and says nothing about it."""
    assert portable.misplaced_work(operators, provider) == misplaced


@pytest.mark.parametrize(
    ("reason", "is_the_gpu"),
    [
        ("[ONNXRuntimeError] : 1 : FAIL : CUDA failure 2: out of memory ; GPU=0 ; hostname=x", True),
        ("bfc_arena.cc:376 AllocateRawInternal Failed to allocate memory for requested buffer of size 1048576", True),
        ("[ONNXRuntimeError] : 10 : INVALID_GRAPH : This is an invalid model", False),
        ("[ONNXRuntimeError] : 7 : INVALID_PROTOBUF : Load model failed:Protobuf parsing failed.", False),
    ],
)
def test_a_full_gpu_is_no_fault_of_the_graph(reason: str, is_the_gpu: bool):
    assert portable.is_about_the_gpu(reason) == is_the_gpu

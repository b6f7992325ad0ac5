"""Programs compiled ahead of time: compiled once, found again, and never loaded when somebody else made them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from torch import fx

from dendsam_deploy.bundle.manifest import FileDigest, GraphSpec, TensorSpec
from dendsam_deploy.errors import MissingCapabilityError, UnsafeFileError
from dendsam_deploy.progress import Progress
from dendsam_deploy.runtimes import captured_package
from dendsam_deploy.runtimes.captured import CapturedOptions, CapturedRunner
from dendsam_deploy.runtimes.gpu_engine_cache import ENGINE_FILE, ENGINES_FOLDER, EngineCache

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

SPEC = GraphSpec(
    role="encoder",
    precision="fp32",
    opset=20,
    files=(FileDigest("graph.onnx", "digest", 0),),
    inputs=(TensorSpec("x", "float32", ("b", 32)),),
    outputs=(TensorSpec("y", "float32", ("b", 32)),),
)
PACKAGED = CapturedOptions(threads=1, is_packaged=True)


@pytest.fixture
def graph_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A product with weights; what is compiled is sealed with a key of its own, not with that of the user."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "state"))
    weights = np.random.default_rng(0).normal(size=(32, 32)).astype(np.float32)
    nodes = [helper.make_node("MatMul", ["x", "w"], ["p"]), helper.make_node("Relu", ["p"], ["y"])]
    infos = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["b", 32]) for name in "xy"]
    graph = helper.make_graph(nodes, "product", infos[:1], infos[1:], [numpy_helper.from_array(weights, "w")])
    path = tmp_path / "bundle" / "graph.onnx"
    path.parent.mkdir()
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def compile_nothing(program: fx.GraphModule, inputs: tuple[Tensor, ...]) -> bytes:
    raise AssertionError("it was compiled before")


@pytest.mark.slow
def test_a_package_is_compiled_once_and_trusted_only_as_it_was_made(graph_file: Path, monkeypatch: pytest.MonkeyPatch):
    x = np.random.default_rng(1).normal(size=(4, 32)).astype(np.float32)
    with CapturedRunner(graph_file, SPEC, CapturedOptions(threads=1)) as plain:
        expected = plain.run({"x": x})["y"]
    told: list[Progress] = []
    with CapturedRunner(graph_file, SPEC, replace(PACKAGED, progress=told.append)) as runner:
        assert runner.engine == "torch+package"
        for _ in range(2):
            np.testing.assert_allclose(runner.run({"x": x})["y"], expected, atol=1e-5)
    assert told == [Progress("compile", done, 1, "graph.onnx for 4 b") for done in (0, 1)]
    (package,) = (graph_file.parent / ENGINES_FOLDER).rglob(ENGINE_FILE)

    monkeypatch.setattr(captured_package, "_compiled", compile_nothing)
    with CapturedRunner(graph_file, SPEC, PACKAGED) as runner:
        for given in (x, -x, x[:3]):  # three are padded to four
            np.testing.assert_allclose(runner.run({"x": given})["y"], _product(graph_file, given), atol=1e-5)
        with pytest.raises(AssertionError, match="compiled before"):
            runner.run({"x": x[:2]})  # another shape is another program

    package.write_bytes(package.read_bytes()[:-1] + b"x")
    with CapturedRunner(graph_file, SPEC, PACKAGED) as runner, pytest.raises(UnsafeFileError, match="altered since"):
        runner.run({"x": x})


def _product(graph_file: Path, x: np.ndarray) -> np.ndarray:
    weights = numpy_helper.to_array(onnx.load(graph_file).graph.initializer[0])
    return np.maximum(x @ weights, 0)


def test_a_compiler_that_fails_is_a_missing_capability(graph_file: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(program: fx.GraphModule, inputs: tuple[Tensor, ...]) -> bytes:
        raise RuntimeError("no C++ compiler\nfound")

    monkeypatch.setattr(captured_package, "_compiled", fail)
    refused = pytest.raises(MissingCapabilityError, match=r"failed on cpu \(no C\+\+ compiler found\)")
    with CapturedRunner(graph_file, SPEC, PACKAGED) as runner, refused:
        runner.run({"x": np.zeros((1, 32), np.float32)})
    assert not list((graph_file.parent / ENGINES_FOLDER).rglob(ENGINE_FILE))


def program_of(work) -> fx.GraphModule:
    return fx.symbolic_trace(work)


def test_a_package_is_for_one_processor_and_one_translation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Compiled code uses whatever instructions it finds: on an older processor of a cluster it would end the process.

    And another version of this program may translate the same graph in another way.
    """
    packages = captured_package.Packages(EngineCache(tmp_path, state=tmp_path), SPEC, torch.device("cpu"))
    inputs = (torch.zeros(4, 32),)
    double, triple = (program_of(work) for work in (lambda x: x + x, lambda x: x + x + x))
    here = packages.identity(double, inputs, "None")
    assert packages.identity(program_of(lambda x: x + x), inputs, "None").key == here.key
    assert packages.identity(triple, inputs, "None").key != here.key
    assert packages.identity(double, inputs, "widened").key != here.key
    assert packages.identity(double, (torch.zeros(8, 32),), "None").key != here.key
    host = captured_package.examine_host()
    for other in (
        replace(host, processor="abacus"),
        replace(host, instructions=("avx2",)),
        replace(host, system="VMS"),
    ):
        monkeypatch.setattr(captured_package, "examine_host", lambda other=other: other)
        assert packages.identity(double, inputs, "None").key != here.key

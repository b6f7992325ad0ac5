"""OpenVINO behind the runner's seam: the same results as ONNX Runtime, refusals, and no foreign exception."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sum_graph import SPEC, write_sum_graph

from dendsam_deploy.bundle.bundle import Bundle
from dendsam_deploy.bundle.reference import load_reference
from dendsam_deploy.errors import BundleError, InvalidArgumentError, MissingCapabilityError
from dendsam_deploy.runtimes.session import SessionOptions, open_session

pytest.importorskip("openvino", reason="needs the extra openvino")
from dendsam_deploy.runtimes.compiled_cpu import CompiledRunner


@pytest.fixture
def graph_file(tmp_path: Path) -> Path:
    return write_sum_graph(tmp_path / "graph.onnx")


def test_runs_a_graph_with_a_free_batch_axis(graph_file: Path):
    tiles = np.arange(24, dtype=np.uint8).reshape(4, 2, 3)
    with CompiledRunner(graph_file, SPEC, threads=1) as runner:
        for batch in (tiles, tiles[:1], tiles[:0]):
            np.testing.assert_array_equal(runner.run({"tiles": batch})["sums"], batch.sum(axis=(1, 2)))
        assert (runner.engine, runner.device, runner.borrows_outputs) == ("openvino", "cpu", True)


@pytest.mark.parametrize(
    "inputs",
    [
        {},
        {"tiles": np.zeros((1, 2, 3), np.float32)},
        {"tiles": np.zeros((1, 2, 4), np.uint8)},
        {"tiles": np.zeros((1, 3, 2), np.uint8).transpose(0, 2, 1)},
        {"other": np.zeros(1)},
    ],
    ids=["missing", "dtype", "shape", "strides", "name"],
)
def test_wrong_inputs_are_refused_in_one_line(graph_file: Path, inputs: dict[str, np.ndarray]):
    refused = pytest.raises(InvalidArgumentError, match=r"graph\.onnx")
    with CompiledRunner(graph_file, SPEC, threads=1) as runner, refused as caught:
        runner.run(inputs)
    assert "\n" not in str(caught.value)


def test_a_closed_runner_says_so(graph_file: Path):
    runner = CompiledRunner(graph_file, SPEC)
    with runner:
        pass
    with pytest.raises(InvalidArgumentError, match="not open"):
        runner.run({"tiles": np.zeros((1, 2, 3), np.uint8)})


@pytest.mark.parametrize("content", [None, b"", b"not a graph"], ids=["absent", "empty", "text"])
def test_a_file_that_is_no_graph_is_a_bundle_error(tmp_path: Path, content: bytes | None):
    path = tmp_path / "graph.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BundleError, match=r"graph\.onnx") as caught, CompiledRunner(path, SPEC):
        pass
    assert "\n" not in str(caught.value)


def test_gpus_are_refused_and_not_replaced(graph_file: Path):
    with pytest.raises(MissingCapabilityError, match="runs on CPUs"):
        CompiledRunner(graph_file, SPEC, "cuda:0")
    with pytest.raises(InvalidArgumentError, match="unknown"):
        CompiledRunner(graph_file, SPEC, "tpu")


def test_every_graph_of_a_bundle_agrees_with_onnx_runtime(exported):
    bundle = Bundle.open(exported.bundle)
    path = bundle.extra_path("reference.npz")
    assert path is not None
    inputs = load_reference(path, 128).inputs
    tiles = {"tiles": inputs.tiles, "sizes": inputs.sizes}
    results = []
    for engine in ("onnxruntime", "openvino"):
        with open_session(bundle, SessionOptions(engine=engine, precision="fp32", threads=1)) as session:
            embeddings = session.encoder.run(tiles)["embeddings"].copy()
            assert session.detector is not None
            found = {**session.detector.run({"tiles": inputs.tiles})}
            decoded = [
                {
                    name: array.copy()
                    for name, array in session.decoder.run(
                        {
                            "embeddings": embeddings,
                            "boxes": inputs.boxes[:count],
                            "tile_index": inputs.tile_index[:count],
                            "region": np.array([region], np.int64),
                        }
                    ).items()
                }
                for count, region in ((0, 8), (1, 4), (17, 8))
            ]
            results.append([embeddings, *found.values(), *(array for call in decoded for array in call.values())])
    for one, other in zip(*results, strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4 * max(float(np.abs(other).max(initial=0)), 1e-6))


WITHOUT_OPENVINO = """
import sys
sys.modules["openvino"] = None  # importing it now raises ImportError
from pathlib import Path
from dendsam_deploy.bundle.bundle import Bundle
from dendsam_deploy.errors import MissingCapabilityError
from dendsam_deploy.runtimes.session import SessionOptions, open_session
try:
    open_session(Bundle.open(sys.argv[1]), SessionOptions(engine="openvino"))
except MissingCapabilityError as error:
    print(error)
"""


def test_a_missing_package_is_named_with_the_line_that_installs_it(exported):
    command = [sys.executable, "-W", "error", "-c", WITHOUT_OPENVINO, str(exported.bundle)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "pip install 'dendsam-deploy[openvino]'" in result.stdout, result.stderr

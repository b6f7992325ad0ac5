"""Tensors that stay where ONNX Runtime computes. The CPU serves as the device: the code is the same for a GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from dendsam_deploy.bundle.manifest import FileDigest, GraphSpec, TensorSpec
from dendsam_deploy.errors import InvalidArgumentError, MissingCapabilityError
from dendsam_deploy.runtimes import portable
from dendsam_deploy.runtimes.portable import OnnxRunner, RunnerOptions
from dendsam_deploy.runtimes.portable_binding import BoundRunner, portable_runner
from dendsam_deploy.runtimes.runner import keeps_tensors, share_memory

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

FILES = (FileDigest("graph.onnx", "", 0),)
DOUBLE = GraphSpec(
    role="encoder",
    precision="fp32",
    opset=17,
    files=FILES,
    inputs=(TensorSpec("tiles", "uint8", ("b", 2, 3)),),
    outputs=(TensorSpec("twice", "float32", ("b", 2, 3)),),
)
PICK = GraphSpec(
    role="decoder",
    precision="fp32",
    opset=17,
    files=FILES,
    inputs=(TensorSpec("twice", "float32", ("b", 2, 3)), TensorSpec("index", "int64", ("n",))),
    outputs=(TensorSpec("picked", "float32", ("n", 2, 3)),),
)


def save_graph(path: Path, spec: GraphSpec, nodes: list[onnx.NodeProto]) -> Path:
    kinds = {"uint8": TensorProto.UINT8, "float32": TensorProto.FLOAT, "int64": TensorProto.INT64}
    infos = [
        [helper.make_tensor_value_info(tensor.name, kinds[tensor.dtype], tensor.shape) for tensor in tensors]
        for tensors in (spec.inputs, spec.outputs)
    ]
    model = helper.make_model(
        helper.make_graph(nodes, "graph", *infos), opset_imports=[helper.make_opsetid("", 17)], ir_version=10
    )
    onnx.save(model, path)
    return path


@pytest.fixture
def double_file(tmp_path: Path) -> Path:
    nodes = [
        helper.make_node("Cast", ["tiles"], ["real"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["real", "real"], ["twice"]),
    ]
    return save_graph(tmp_path / "double.onnx", DOUBLE, nodes)


@pytest.fixture
def double(double_file: Path) -> Iterator[BoundRunner]:
    with BoundRunner(double_file, DOUBLE, RunnerOptions(threads=1)) as runner:
        yield runner


@pytest.fixture
def pick(tmp_path: Path) -> Iterator[BoundRunner]:
    path = save_graph(tmp_path / "pick.onnx", PICK, [helper.make_node("Gather", ["twice", "index"], ["picked"])])
    with BoundRunner(path, PICK, RunnerOptions(threads=1)) as runner:
        yield runner


TILES = np.arange(24, dtype=np.uint8).reshape(4, 2, 3)


def test_results_stay_and_serve_the_next_graph(double: BoundRunner, pick: BoundRunner):
    uploaded, room = double.upload(TILES), double.allocate("twice", 4)
    for rows in (slice(0, 3), slice(3, 4)):
        double.run_into({"tiles": uploaded[rows]}, {"twice": room[rows]})
    assert (room.shape, room.dtype) == ((4, 2, 3), np.float32)
    np.testing.assert_array_equal(room.numpy(), TILES * 2.0)
    np.testing.assert_array_equal(room[1:3].numpy(), TILES[1:3] * 2.0)
    np.testing.assert_array_equal(room[1:][1:].numpy(), TILES[2:] * 2.0)
    index = np.array([1, 1, 0])
    picked = pick.run({"twice": room[1:3], "index": index})["picked"]
    np.testing.assert_array_equal(picked, TILES[1:3][index] * 2.0)


@pytest.mark.parametrize("count", [4, 1, 0])
def test_arrays_give_what_the_plain_runner_gives(double_file: Path, double: BoundRunner, count: int):
    with OnnxRunner(double_file, DOUBLE, RunnerOptions(threads=1)) as plain:
        expected = plain.run({"tiles": TILES[:count]})["twice"]
    np.testing.assert_array_equal(double.run({"tiles": TILES[:count]})["twice"], expected)


def test_what_came_down_is_not_overwritten_by_the_next_call(double: BoundRunner):
    first = double.run({"tiles": TILES})["twice"]
    double.run({"tiles": TILES + np.uint8(7)})
    np.testing.assert_array_equal(first, TILES * 2.0)
    assert not double.borrows_outputs


def test_memory_lives_as_long_as_a_view_of_it(double: BoundRunner):
    view = double.upload(TILES.copy())[2:]
    np.testing.assert_array_equal(double.run({"tiles": view})["twice"], TILES[2:] * 2.0)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "'tiles' is missing"),
        ({"tiles": np.zeros((1, 2, 3), np.float32)}, r"float32\[1, 2, 3\], expected contiguous uint8\['b', 2, 3\]"),
        ({"tiles": np.zeros((1, 2, 4), np.uint8)}, r"uint8\[1, 2, 4\], expected"),
        ({"tiles": np.zeros((2, 3), np.uint8)}, r"uint8\[2, 3\], expected"),
    ],
    ids=["missing", "dtype", "shape", "rank"],
)
def test_wrong_inputs_are_refused_in_one_line(double: BoundRunner, inputs: dict[str, np.ndarray], message: str):
    with pytest.raises(InvalidArgumentError, match=message) as caught:
        double.run(inputs)
    assert "\n" not in str(caught.value)


def test_every_output_needs_a_place_that_fits(double: BoundRunner, pick: BoundRunner):
    with pytest.raises(InvalidArgumentError, match="'twice' is missing"):
        double.run_into({"tiles": TILES}, {})
    with pytest.raises(InvalidArgumentError, match="'twice' is uint8"):
        double.run_into({"tiles": TILES}, {"twice": double.upload(TILES)})
    for rows in (3, 5):
        with pytest.raises(InvalidArgumentError, match=rf"float32\[{rows}, 2, 3\], expected float32\[4, 2, 3\]"):
            double.run_into({"tiles": TILES}, {"twice": double.allocate("twice", rows)})
    with pytest.raises(InvalidArgumentError, match="no output of which only the rows are open"):
        double.allocate("thrice", 4)


def test_a_tensor_of_another_device_is_refused(double: BoundRunner):
    """Its address would be read on the wrong one: even a second GPU has another memory."""
    elsewhere = replace(double.upload(TILES), device="cuda:1")
    with pytest.raises(InvalidArgumentError, match="'tiles' lies on cuda:1; run all graphs on cpu by onnxruntime"):
        double.run({"tiles": elsewhere})
    room = replace(double.allocate("twice", 4), device="cuda:1")
    with pytest.raises(InvalidArgumentError, match="'twice' lies on cuda:1"):
        double.run_into({"tiles": TILES}, {"twice": room})


def test_rows_that_are_not_consecutive_are_refused(double: BoundRunner):
    with pytest.raises(InvalidArgumentError, match="not consecutive"):
        double.upload(TILES)[::2]


def test_a_failure_while_running_names_the_device(pick: BoundRunner):
    with pytest.raises(MissingCapabilityError, match="failed on cpu"):
        pick.run({"twice": np.zeros((1, 2, 3), np.float32), "index": np.array([9])})


def test_memory_that_is_not_there_is_a_missing_capability(double: BoundRunner):
    with pytest.raises(MissingCapabilityError, match=r"failed on cpu.*free memory or choose another device"):
        double.allocate("twice", 1 << 55)


def test_only_bound_runners_share_memory(double_file: Path, double: BoundRunner, pick: BoundRunner):
    plain = OnnxRunner(double_file, DOUBLE, RunnerOptions(threads=1))
    assert keeps_tensors(double)
    assert not keeps_tensors(plain)
    assert share_memory(double, pick)
    assert not share_memory(double, plain)
    assert double.rows_per_call > 1


def test_a_gpu_gets_the_bound_runner_and_the_cpu_the_plain_one(double_file: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(portable.onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    made = [portable_runner(double_file, DOUBLE, RunnerOptions(device)) for device in ("cpu", "cuda:1")]
    assert [type(runner) for runner in made] == [OnnxRunner, BoundRunner]
    assert made[1].device == "cuda:1"

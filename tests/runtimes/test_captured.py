"""torch as an engine: the graphs of a bundle give what ONNX Runtime makes of them; attention fused, batches padded."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx.parser
import pytest
import torch
from onnx import helper, numpy_helper
from sum_graph import SPEC, write_sum_graph

from dendsam_deploy.bundle.bundle import Bundle
from dendsam_deploy.bundle.manifest import FileDigest, GraphSpec, TensorSpec
from dendsam_deploy.errors import BundleError, InvalidArgumentError, MissingCapabilityError
from dendsam_deploy.runtimes import captured
from dendsam_deploy.runtimes.captured import CapturedOptions, CapturedRunner, DeviceTensor
from dendsam_deploy.runtimes.captured_attention import attend_in_kernel, attend_widened, fuse_attention
from dendsam_deploy.runtimes.captured_graph import read_graph
from dendsam_deploy.runtimes.captured_program import program_of
from dendsam_deploy.runtimes.portable import OnnxRunner, RunnerOptions
from dendsam_deploy.runtimes.runner import keeps_tensors, share_memory

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from dendsam_deploy.bundle.manifest import Role

CPU = CapturedOptions(threads=1)
KERNELS = pytest.mark.parametrize("kernel", ["in_kernel", "widened"])
UNCOMPILED = pytest.mark.filterwarnings(
    "ignore:flex_attention called without torch.compile", "ignore:.*_FLEX_ATTENTION"
)


@pytest.fixture
def sums(tmp_path: Path) -> Iterator[CapturedRunner]:
    with CapturedRunner(write_sum_graph(tmp_path / "graph.onnx"), SPEC, CPU) as runner:
        yield runner


TILES = np.arange(30, dtype=np.uint8).reshape(5, 2, 3)


@pytest.mark.parametrize("count", [5, 4, 1, 0])
def test_a_batch_of_any_size_gives_as_many_results(sums: CapturedRunner, count: int):
    found = sums.run({"tiles": TILES[:count]})["sums"]
    np.testing.assert_array_equal(found, TILES[:count].sum(axis=(1, 2)))
    assert found.dtype == np.float32


def test_batches_are_padded_to_few_sizes(sums: CapturedRunner):
    for count in (1, 2, 3, 4, 5, 4, 3):
        sums.run({"tiles": TILES[:count]})
    assert len(sums._programs) == 3, "for 1, 2 and 4: five are cut"


def test_what_came_down_is_not_overwritten_by_the_next_call(sums: CapturedRunner):
    first = sums.run({"tiles": TILES})["sums"]
    sums.run({"tiles": TILES + np.uint8(7)})
    np.testing.assert_array_equal(first, TILES.sum(axis=(1, 2)))
    assert not sums.borrows_outputs


def test_results_stay_where_they_were_made(sums: CapturedRunner):
    uploaded, room = sums.upload(TILES), sums.allocate("sums", 5)
    for rows in (slice(0, 3), slice(3, 5)):
        sums.run_into({"tiles": uploaded[rows]}, {"sums": room[rows]})
    assert (uploaded.dtype, uploaded.shape, room.dtype, room.shape) == (np.uint8, (5, 2, 3), np.float32, (5,))
    np.testing.assert_array_equal(room.numpy(), TILES.sum(axis=(1, 2)))
    np.testing.assert_array_equal(room[1:3].numpy(), TILES[1:3].sum(axis=(1, 2)))
    assert keeps_tensors(sums)
    assert share_memory(sums, sums)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "'tiles' is missing"),
        ({"tiles": np.zeros((1, 2, 3), np.float32)}, "float32"),
        ({"tiles": np.zeros((1, 2, 4), np.uint8)}, "expected contiguous uint8"),
    ],
    ids=["missing", "dtype", "shape"],
)
def test_wrong_inputs_are_refused_in_one_line(sums: CapturedRunner, inputs: dict[str, np.ndarray], message: str):
    with pytest.raises(InvalidArgumentError, match=message) as caught:
        sums.run(inputs)
    assert "\n" not in str(caught.value)


def test_tensors_of_other_engines_and_rooms_of_another_size_are_refused(sums: CapturedRunner):
    class Foreign:
        shape, dtype = (5, 2, 3), np.dtype(np.uint8)

    with pytest.raises(InvalidArgumentError, match="another engine or device"):
        sums.run({"tiles": Foreign()})
    with pytest.raises(InvalidArgumentError, match="room for 'sums' is missing"):
        sums.run_into({"tiles": TILES}, {})
    with pytest.raises(InvalidArgumentError, match=r"float32\[3\], expected float32\[5\] from `allocate`"):
        sums.run_into({"tiles": TILES}, {"sums": sums.allocate("sums", 3)})
    with pytest.raises(InvalidArgumentError, match="no output"):
        sums.allocate("products", 3)


def test_memory_that_is_not_there_is_a_missing_capability(sums: CapturedRunner):
    with pytest.raises(MissingCapabilityError, match=r"failed on cpu.*free memory") as caught:
        sums.allocate("sums", 1 << 55)
    assert "\n" not in str(caught.value)


def test_a_closed_runner_says_so_and_threads_are_given_back(tmp_path: Path):
    before = torch.get_num_threads()
    with CapturedRunner(write_sum_graph(tmp_path / "graph.onnx"), SPEC, replace(CPU, threads=before + 1)) as runner:
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
    with pytest.raises(InvalidArgumentError, match="not open"):
        runner.run({"tiles": TILES})


@pytest.mark.parametrize("content", [b"", b"text"], ids=["empty", "text"])
def test_a_file_that_is_no_graph_is_a_bundle_error(tmp_path: Path, content: bytes):
    (tmp_path / "broken.onnx").write_bytes(content)
    with pytest.raises(BundleError, match=r"broken\.onnx.*export the bundle again"):
        CapturedRunner(tmp_path / "broken.onnx", SPEC, CPU).__enter__()


def test_a_graph_that_only_others_execute_is_no_damaged_bundle(tmp_path: Path):
    """A detector from elsewhere that takes single images runs in a loop, which is a graph inside the graph."""
    model = onnx.parser.parse_model(
        """
        <ir_version: 10, opset_import: ["" : 20]>
        loop (float[1] x) => (float[n, 1] y) {
            count = Constant <value_int: int = 3> ()
            yes = Cast <to = 9> (count)
            y = Loop (count, yes) <body = each_turn (int64 turn, bool go_on) => (bool again, float[1] each) {
                again = Identity (go_on)
                each = Identity (x)
            }>
        }
        """
    )
    path = tmp_path / "loop.onnx"
    onnx.save(model, path)
    with pytest.raises(MissingCapabilityError, match=r"loop\.onnx: the engine torch does not.*inside.*--engine onnx"):
        CapturedRunner(path, SPEC, CPU).__enter__()


@pytest.mark.parametrize("device", ["gpu", "cuda:", "CPU", ""])
def test_an_unknown_device_is_a_wrong_argument(tmp_path: Path, device: str):
    with pytest.raises(InvalidArgumentError, match="choose cpu, cuda or cuda:N"):
        CapturedRunner(tmp_path, SPEC, CapturedOptions(device))


def test_a_gpu_that_is_not_there_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(captured.torch.cuda, "is_available", lambda: False)
    with pytest.raises(MissingCapabilityError, match=r"device cuda:1: torch .* sees 0 GPUs"):
        CapturedRunner(tmp_path, SPEC, CapturedOptions("cuda:1"))


def graph_of(exported, role: Role) -> tuple[Path, GraphSpec]:
    bundle = Bundle.open(exported.bundle)
    spec = bundle.manifest.graph(role, "fp32")
    assert spec is not None
    return bundle.graph_path(role, "fp32"), spec


def inputs_of(role: Role) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    tiles = rng.integers(0, 256, (3, 128, 128), np.uint8)
    if role == "detector":
        return {"tiles": tiles}
    if role == "encoder":
        return {"tiles": tiles, "sizes": np.array([[128, 128], [100, 60], [128, 31]])}
    corners = rng.uniform(0, 80, (5, 2))
    return {
        "embeddings": rng.normal(size=(3, 256, 8, 8)).astype(np.float32),
        "boxes": np.concatenate([corners, corners + rng.uniform(5, 48, (5, 2))], axis=1).astype(np.float32),
        "tile_index": np.array([0, 0, 1, 2, 2]),
        "region": np.array([4]),
    }


@pytest.mark.parametrize("role", ["detector", "encoder", "decoder"])
def test_the_graphs_of_a_bundle_give_what_onnx_runtime_makes_of_them(exported, role: Role):
    path, spec = graph_of(exported, role)
    inputs = inputs_of(role)
    with OnnxRunner(path, spec, RunnerOptions(threads=1)) as plain, CapturedRunner(path, spec, CPU) as runner:
        for region in (4, 8) if role == "decoder" else (4,):
            given = {name: np.array([region]) if name == "region" else values for name, values in inputs.items()}
            expected, found = plain.run(given), runner.run(given)
            for name, values in expected.items():
                assert (found[name].shape, found[name].dtype) == (values.shape, values.dtype)
                assert found[name].flags.c_contiguous, "the next graph takes nothing else"
                np.testing.assert_allclose(found[name], values, atol=1e-4 * max(values.std(), 1e-3), rtol=1e-4)


@pytest.mark.parametrize("spread", ["everywhere", "far away"])
def test_many_boxes_of_many_tiles_are_cut_and_put_together_again(exported, spread: str):
    """A program holds room for all that it takes: of a slice with a hundred tiles that would be gigabytes."""
    path, spec = graph_of(exported, "decoder")
    rng = np.random.default_rng(3)
    tiles, boxes = 40, 150
    corners = rng.uniform(0, 60, (boxes, 2))
    inputs = {
        "embeddings": rng.normal(size=(tiles, 256, 8, 8)).astype(np.float32),
        "boxes": np.concatenate([corners, corners + rng.uniform(8, 40, (boxes, 2))], axis=1).astype(np.float32),
        "tile_index": rng.integers(0 if spread == "everywhere" else 33, tiles, boxes),
        "region": np.array([4]),
    }
    with OnnxRunner(path, spec, RunnerOptions(threads=1)) as plain, CapturedRunner(path, spec, CPU) as runner:
        expected, found = plain.run(inputs), runner.run(inputs)
        assert {dict(key[1:])["tiles"] for key in runner._programs} <= {8, 16}
        assert {dict(key[1:])["boxes"] for key in runner._programs} <= {32, 64}
    np.testing.assert_array_equal(found["origin"], expected["origin"])
    for name in ("logits", "iou"):
        np.testing.assert_allclose(found[name], expected[name], atol=1e-4 * max(1.0, float(expected[name].std())))


def test_no_boxes_give_no_masks(exported):
    path, spec = graph_of(exported, "decoder")
    none = {
        name: values[:0] if name in ("boxes", "tile_index") else values for name, values in inputs_of("decoder").items()
    }
    with CapturedRunner(path, spec, CPU) as runner:
        assert {name: values.shape for name, values in runner.run(none).items()} == {
            "logits": (0, 16, 16), "origin": (0, 2), "iou": (0,)
        }  # fmt: skip


@UNCOMPILED
@KERNELS
def test_every_attention_of_an_encoder_is_fused_and_changes_nothing(exported, kernel: str):
    graph = read_graph(graph_of(exported, "encoder")[0])
    inputs = {name: torch.from_numpy(values) for name, values in inputs_of("encoder").items()}
    described = {name: value.to("meta") for name, value in inputs.items()}
    plain, fused = (program_of(graph, described, graph.weights, torch.device("cpu")) for _ in range(2))
    depth = sum(node.operator == "Softmax" for node in graph.nodes)
    assert fuse_attention(fused, kernel) == depth == 8
    with torch.inference_mode():
        expected, found = (program(*inputs.values())[0] for program in (plain, fused))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@UNCOMPILED
@KERNELS
@pytest.mark.parametrize("form", ["added", "widened"])
@pytest.mark.parametrize("side", [8, 5])
def test_both_forms_of_relative_position_are_recognised(tmp_path: Path, kernel: str, form: str, side: int):
    """The nodes as the exporter writes them, with heads of a width that no kernel takes as it is."""
    path = tmp_path / "attention.onnx"
    save_attention(path, form, side)
    graph = read_graph(path)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 3, side * side, 12, generator=generator) for _ in range(3))
    rows, columns = (3 * torch.randn(2, 3, side, side, side, generator=generator) for _ in range(2))
    inputs = dict(zip(graph.inputs, (query, key, value, rows, columns), strict=True))
    described = {name: tensor.to("meta") for name, tensor in inputs.items()}
    program = program_of(graph, described, graph.weights, torch.device("cpu"))
    expected = program(*inputs.values())[0]
    assert fuse_attention(program, kernel) == 1
    assert not [node for node in program.graph.nodes if "softmax" in node.name]
    torch.testing.assert_close(program(*inputs.values())[0], expected, atol=1e-5, rtol=1e-4)


@UNCOMPILED
@pytest.mark.parametrize("attend", [attend_in_kernel, attend_widened])
def test_rows_and_columns_are_not_mistaken_for_each_other(attend):
    """All weight goes to the one key in the row and the column that the query asks for."""
    side = 4
    rows, columns = (torch.zeros(1, 1, side * side, side) for _ in range(2))
    rows[..., 2], columns[..., 1] = 90.0, 90.0
    value = torch.arange(float(side * side)).reshape(1, 1, -1, 1).expand(-1, -1, -1, 8)
    zeros = torch.zeros(1, 1, side * side, 8)
    assert torch.equal(attend(zeros, zeros, value, rows, columns), torch.full_like(zeros, 2 * side + 1))


def save_attention(path: Path, form: str, side: int) -> None:
    """Attention of 2 x 3 heads on side x side tokens; rows and columns have the axes (n, h, y, x, key)."""
    tokens = side * side
    nodes = []
    if form == "added":
        nodes += [
            helper.make_node("Transpose", ["key"], ["across"], perm=[0, 1, 3, 2]),
            helper.make_node("MatMul", ["query", "across"], ["product"]),
            helper.make_node("Reshape", ["product", "grid"], ["scores"]),
            helper.make_node("Unsqueeze", ["rows", "last"], ["by_row"]),
            helper.make_node("Add", ["scores", "by_row"], ["first"]),
            helper.make_node("Unsqueeze", ["columns", "before"], ["by_column"]),
            helper.make_node("Add", ["first", "by_column"], ["total"]),
            helper.make_node("Reshape", ["total", "square"], ["logits"]),
        ]
    else:
        nodes += [
            helper.make_node("Reshape", ["rows", "flat"], ["by_row"]),
            helper.make_node("Reshape", ["columns", "flat"], ["by_column"]),
            helper.make_node("Concat", ["query", "by_row", "by_column"], ["asking"], axis=-1),
            helper.make_node("Expand", ["places", "heads"], ["known"]),
            helper.make_node("Concat", ["key", "known"], ["asked"], axis=-1),
            helper.make_node("Transpose", ["asked"], ["across"], perm=[0, 1, 3, 2]),
            helper.make_node("MatMul", ["asking", "across"], ["logits"]),
        ]
    nodes += [
        helper.make_node("Softmax", ["logits"], ["weights"], axis=-1),
        helper.make_node("MatMul", ["weights", "value"], ["attended"]),
    ]
    place = np.arange(tokens)
    constants = {
        "grid": np.array([2, 3, side, side, side, side]),
        "square": np.array([2, 3, tokens, tokens]),
        "flat": np.array([2, 3, tokens, side]),
        "heads": np.array([2, 3, tokens, 2 * side]),
        "last": np.array([-1]),
        "before": np.array([-2]),
        "places": np.concatenate([np.eye(side)[place // side], np.eye(side)[place % side]], axis=1).astype(np.float32),
    }
    used = {name for node in nodes for name in node.input}
    shapes = dict.fromkeys(("query", "key", "value"), (2, 3, tokens, 12))
    shapes |= dict.fromkeys(("rows", "columns"), (2, 3, side, side, side))
    graph = helper.make_graph(
        nodes,
        form,
        [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name, shape in shapes.items()],
        [helper.make_tensor_value_info("attended", onnx.TensorProto.FLOAT, [2, 3, tokens, 12])],
        [numpy_helper.from_array(value, name) for name, value in constants.items() if name in used],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)


@pytest.mark.slow
def test_a_compiled_program_gives_the_same(tmp_path: Path):
    """The compiler of the CPU stands in for that of GPUs."""
    save_attention(tmp_path / "attention.onnx", "added", 8)
    names = ("query", "key", "value")
    inputs = tuple(TensorSpec(name, "float32", (2, 3, 64, 12)) for name in names)
    places = tuple(TensorSpec(name, "float32", (2, 3, 8, 8, 8)) for name in ("rows", "columns"))
    output = TensorSpec("attended", "float32", (2, 3, 64, 12))
    spec = GraphSpec("encoder", "fp32", 20, (FileDigest("attention.onnx", "", 0),), (*inputs, *places), (output,))
    rng = np.random.default_rng(0)
    given = {tensor.name: rng.normal(size=tensor.shape).astype(np.float32) for tensor in spec.inputs}
    compiled = CapturedOptions(threads=1, is_compiled=True)
    with CapturedRunner(tmp_path / "attention.onnx", spec, CPU) as plain:
        expected = plain.run(given)["attended"]
    with CapturedRunner(tmp_path / "attention.onnx", spec, compiled) as runner:
        np.testing.assert_allclose(runner.run(given)["attended"], expected, atol=1e-5, rtol=1e-4)


def test_a_device_tensor_names_its_type_as_numpy_does():
    for dtype in (torch.float32, torch.uint8, torch.int64):
        tensor = DeviceTensor(torch.zeros(2, 3, dtype=dtype))
        assert tensor.dtype == tensor.numpy().dtype

"""What TensorRT's parser would refuse is found, by name; what our own exports hold is not."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from dendsam_deploy.errors import BundleError
from dendsam_deploy.export.parser_support import unsupported_nodes

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import Exported

FLOAT, HALF, BRAIN, DOUBLE = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE
INT64, INT8, UINT8, BOOL = TensorProto.INT64, TensorProto.INT8, TensorProto.UINT8, TensorProto.BOOL


def save(
    path: Path,
    nodes: list[onnx.NodeProto],
    inputs: dict[str, tuple[int, list[int | str]]],
    outputs: dict[str, tuple[int, list[int | str]]],
    *,
    constants: dict[str, np.ndarray] | None = None,
    opset: int = 20,
) -> Path:
    ends = [[helper.make_tensor_value_info(n, *kind) for n, kind in side.items()] for side in (inputs, outputs)]
    initializers = [numpy_helper.from_array(array, name) for name, array in (constants or {}).items()]
    graph = helper.make_graph(nodes, "test", *ends, initializers)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10), path)
    return path


def one_node(path: Path, operator: str, kinds: list[int], out: int) -> Path:
    """A graph of one node, whose inputs have the types given."""
    names = [f"x{number}" for number in range(len(kinds))]
    node = helper.make_node(operator, names, ["y"], name="the_node")
    inputs = {name: (kind, ["n", 4]) for name, kind in zip(names, kinds, strict=True)}
    return save(path, [node], inputs, {"y": (out, ["p", "q"])})


@pytest.mark.parametrize("role", ["detector", "encoder", "decoder", "points"])
def test_exported_graphs_are_taken(exported: Exported, role: str) -> None:
    files = [file for file in sorted(exported.bundle.glob(f"{role}*.onnx")) if ".int8." not in file.name]
    assert files
    assert {file.name: unsupported_nodes(file) for file in files} == {file.name: [] for file in files}


@pytest.mark.parametrize("kind", [FLOAT, HALF, BRAIN])
@pytest.mark.parametrize("operator", ["MatMul", "Softmax", "Gelu", "Sin", "LayerNormalization"])
def test_real_arithmetic_is_taken(tmp_path: Path, operator: str, kind: int) -> None:
    kinds = [kind] * (1 if operator in ("Softmax", "Gelu", "Sin") else 2)
    assert unsupported_nodes(one_node(tmp_path / "g.onnx", operator, kinds, kind)) == []


@pytest.mark.parametrize(
    ("operator", "kinds", "out", "complaint"),
    [
        ("Unique", [FLOAT], FLOAT, "no such operator"),
        ("Det", [FLOAT], FLOAT, "no such operator"),
        ("Add", [DOUBLE, DOUBLE], DOUBLE, "'x0' is double"),
        ("Floor", [DOUBLE], DOUBLE, "'x0' is double"),
        ("Clip", [INT64], INT64, "'x0' is int64"),
        ("And", [BOOL, BOOL], BOOL, ""),
        ("Add", [INT64, INT64], INT64, ""),
        ("Where", [BOOL, FLOAT, FLOAT], FLOAT, ""),
        ("Add", [INT8, INT8], INT8, "'x0' is int8"),
        ("Transpose", [UINT8], UINT8, "'x0' is uint8"),
        ("Gather", [FLOAT, INT64], FLOAT, ""),
        ("Gather", [UINT8, INT64], UINT8, "'x0' is uint8"),
        ("GridSample", [BRAIN, BRAIN], BRAIN, "'x0' is bfloat16"),
    ],
)
def test_operators_and_types(tmp_path: Path, operator: str, kinds: list[int], out: int, complaint: str) -> None:
    found = [line for line in unsupported_nodes(one_node(tmp_path / "g.onnx", operator, kinds, out)) if "node" in line]
    assert len(found) == bool(complaint)
    for line in found:
        assert line.startswith(f"{operator} 'the_node': ")
        assert complaint in line


@pytest.mark.parametrize(
    ("operator", "constants", "attributes", "complaint"),
    [
        ("TopK", {"k": np.array([3840])}, {}, ""),
        ("TopK", {"k": np.array([3841])}, {}, "K is 3841, at most 3840"),
        ("TopK", {"k": np.array([5])}, {"sorted": 0}, "sorted is 0"),
        ("Resize", {"": np.zeros(0, np.float32), "scales": np.ones(2, np.float32)}, {"mode": "linear"}, ""),
        ("Resize", {"": np.zeros(0, np.float32), "scales": np.ones(2, np.float32)}, {"mode": "cubic"}, "mode is cubic"),
        ("Resize", {"": np.zeros(0, np.float32), "scales": np.ones(2, np.float32)}, {"antialias": 1}, "antialias is 1"),
        ("QuantizeLinear", {"s": np.float32(0.1), "z": np.int8(0)}, {}, ""),
        ("QuantizeLinear", {"s": np.float32(0.1), "z": np.uint8(128)}, {}, "its input 'z' is uint8"),
        ("QuantizeLinear", {"s": np.float32(0.1), "z": np.int8(3)}, {}, "not constantly 0"),
        ("QuantizeLinear", {"s": np.float32(0.1)}, {}, "no zero point"),
        ("ReduceSum", {"axes": np.array([1])}, {}, ""),
        ("GridSample", {"grid": np.zeros((1, 2, 2, 2), np.float32)}, {"mode": "linear"}, "mode is linear"),
    ],
)
def test_restrictions(tmp_path: Path, operator: str, constants: dict, attributes: dict, complaint: str) -> None:
    path = tmp_path / "g.onnx"
    outputs = ["y", "z_out"][: 2 if operator == "TopK" else 1]
    node = helper.make_node(operator, ["x", *constants], outputs, name="the_node", **attributes)
    kept = {name: array for name, array in constants.items() if name}
    kind = UINT8 if operator == "QuantizeLinear" and "uint8" in str(constants.get("z", np.uint8(0)).dtype) else FLOAT
    kind = INT8 if operator == "QuantizeLinear" and kind != UINT8 else kind
    shape = ["n", 1, 4, 4] if operator == "GridSample" else ["n", 4]
    save(path, [node], {"x": (FLOAT, shape)}, {"y": (kind, ["p", "q"])}, constants=kept)
    found = [line for line in unsupported_nodes(path) if "the_node" in line]
    assert len(found) == bool(complaint)
    assert all(complaint in line for line in found)


def test_axes_that_are_computed_are_refused(tmp_path: Path) -> None:
    node = helper.make_node("ReduceSum", ["x", "axes"], ["y"], name="sum")
    path = save(tmp_path / "g.onnx", [node], {"x": (FLOAT, ["n", 4]), "axes": (INT64, [1])}, {"y": (FLOAT, ["p", "q"])})
    assert unsupported_nodes(path) == ["ReduceSum 'sum': its input 'axes' is not constant"]


def test_a_normalisation_that_learns_is_refused(tmp_path: Path) -> None:
    names = ["scale", "bias", "mean", "variance"]
    node = helper.make_node("BatchNormalization", ["x", *names], ["y", "m", "v"], name="norm", training_mode=1)
    constants = {name: np.ones(4, np.float32) for name in names}
    path = save(tmp_path / "g.onnx", [node], {"x": (FLOAT, ["n", 4])}, {"y": (FLOAT, ["p", "q"])}, constants=constants)
    assert unsupported_nodes(path) == ["BatchNormalization 'norm': training_mode is 1"]


def cast(source: str, target: str, to: int) -> onnx.NodeProto:
    return helper.make_node("Cast", [source], [target], name=f"to_{target}", to=to)


def test_uint8_comes_in_and_goes_out_through_casts_only(tmp_path: Path) -> None:
    inputs = {"tiles": (UINT8, ["b", 4])}
    right = [cast("tiles", "real", FLOAT), helper.make_node("Sqrt", ["real"], ["root"]), cast("root", "out", UINT8)]
    assert unsupported_nodes(save(tmp_path / "a.onnx", right, inputs, {"out": (UINT8, ["b", 4])})) == []
    inside = [*right, cast("out", "again", FLOAT)]
    assert unsupported_nodes(save(tmp_path / "b.onnx", inside, inputs, {"again": (FLOAT, ["b", 4])})) == [
        "Cast 'to_out': uint8 is allowed at inputs and outputs of the graph only",
        "Cast 'to_again': uint8 is allowed at inputs and outputs of the graph only",
    ]
    whole = [cast("tiles", "number", INT64)]
    assert "float32 and float16 only" in unsupported_nodes(
        save(tmp_path / "c.onnx", whole, inputs, {"number": (INT64, ["b", 4])})
    )[0]  # fmt: skip


def test_the_order_that_torch_writes_by_itself_is_found(tmp_path: Path) -> None:
    """``tiles[:, None].float()`` moves uint8 data before it is converted."""
    nodes = [helper.make_node("Unsqueeze", ["tiles", "axes"], ["moved"], name="move"), cast("moved", "real", FLOAT)]
    constants = {"axes": np.array([1])}
    path = save(
        tmp_path / "g.onnx", nodes, {"tiles": (UINT8, ["b", 4])}, {"real": (FLOAT, ["p", "q"])}, constants=constants
    )
    assert unsupported_nodes(path)[0] == "Unsqueeze 'move': its input 'tiles' is uint8"


def test_nodes_inside_control_flow_are_seen(tmp_path: Path) -> None:
    branches = {}
    for name, operator in (("then_branch", "Unique"), ("else_branch", "Identity")):
        out = helper.make_tensor_value_info(f"{name}_y", FLOAT, ["n"])
        node = helper.make_node(operator, ["x"], [f"{name}_y"], name=f"in_{name}")
        branches[name] = helper.make_graph([node], name, [], [out])
    node = helper.make_node("If", ["c"], ["y"], name="choice", **branches)
    path = save(tmp_path / "g.onnx", [node], {"c": (BOOL, []), "x": (FLOAT, ["n"])}, {"y": (FLOAT, ["p", "q"])})
    assert unsupported_nodes(path) == ["Unique 'in_then_branch': the parser has no such operator"]


def test_an_operator_of_somebody_else_is_refused(tmp_path: Path) -> None:
    node = helper.make_node("FastGelu", ["x"], ["y"], name="fast", domain="com.microsoft")
    graph = helper.make_graph(
        [node],
        "test",
        [helper.make_tensor_value_info("x", FLOAT, [1])],
        [helper.make_tensor_value_info("y", FLOAT, [1])],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), tmp_path / "g.onnx")
    assert unsupported_nodes(tmp_path / "g.onnx") == ["FastGelu 'fast': is an operator of com.microsoft"]


@pytest.mark.parametrize(("opset", "taken"), [(8, False), (9, True), (20, True), (24, True), (25, False)])
def test_versions_of_the_operators(tmp_path: Path, opset: int, taken: bool) -> None:
    node = helper.make_node("MatMul", ["x", "x"], ["y"])
    path = save(tmp_path / "g.onnx", [node], {"x": (FLOAT, [2, 2])}, {"y": (FLOAT, [2, 2])}, opset=opset)
    assert unsupported_nodes(path) == ([] if taken else [f"opset {opset}: the parser takes 9 to 24"])


def test_inputs_and_outputs_of_other_types_are_named(tmp_path: Path) -> None:
    path = save(tmp_path / "g.onnx", [cast("x", "y", DOUBLE)], {"x": (FLOAT, [1])}, {"y": (DOUBLE, [1])})
    assert unsupported_nodes(path) == ["output 'y': is double", "Cast 'to_y': its output 'y' is double"]


@pytest.mark.parametrize("content", [None, b"", b"text", b"\x08\x0a" * 40], ids=["absent", "empty", "text", "noise"])
def test_a_file_that_is_no_graph_is_a_bundle_error(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "broken.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BundleError, match=r"broken\.onnx.*export it again") as caught:
        unsupported_nodes(path)
    assert "\n" not in str(caught.value)

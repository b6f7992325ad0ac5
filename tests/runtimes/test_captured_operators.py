"""Every ONNX operator in the words of torch, against ONNX Runtime."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper, numpy_helper

from dendsam_deploy.errors import BundleError, MissingCapabilityError
from dendsam_deploy.runtimes.captured_graph import read_graph
from dendsam_deploy.runtimes.captured_operators import OPERATORS
from dendsam_deploy.runtimes.captured_program import program_of

if TYPE_CHECKING:
    from pathlib import Path

RNG = np.random.default_rng(0)


@dataclass
class Case:
    """One node: its inputs, of which the first `given` are the graph's and the others constants, and its attributes."""

    operator: str
    inputs: list[np.ndarray | None]
    attributes: dict[str, object] = field(default_factory=dict)
    given: int = 1
    outputs: int = 1
    opset: int = 20

    def __str__(self) -> str:
        shapes = "x".join("-" if value is None else str(list(value.shape)) for value in self.inputs)
        return f"{self.operator}-{shapes}-{'-'.join(map(str, self.attributes.values()))}"


def real(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


def positive(*shape: int) -> np.ndarray:
    return (np.abs(real(*shape)) + 0.1).astype(np.float32)


def numbers(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def truth(*shape: int) -> np.ndarray:
    return RNG.random(shape) < 0.5


ELEMENTWISE = ("Abs", "Ceil", "Cos", "Erf", "Exp", "Floor", "Gelu", "Identity", "Neg", "Relu", "Sigmoid", "Sin", "Tanh")
PAIRS = ("Add", "Div", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Mul", "Sub", "Max", "Min")
SCALAR = np.array(0.25, np.float32)

CASES = [
    *(Case(name, [2 * real(3, 4)]) for name in ELEMENTWISE),
    *(Case(name, [positive(3, 4)]) for name in ("Sqrt", "Log")),
    *(Case(name, [np.round(2 * real(3, 4)), np.round(2 * real(4)) + 0.5]) for name in PAIRS),
    Case("Div", [numbers(7, -7, 9), numbers(2, 2, -4)]),
    Case("Max", [real(3), real(3), real(3)], given=3),
    Case("Pow", [positive(3), np.array(2.0, np.float32)]),
    Case("Gelu", [real(9)], {"approximate": "tanh"}),
    Case("And", [truth(3, 4), truth(4)]),
    Case("Or", [truth(3, 4), truth(4)]),
    Case("Not", [truth(5)]),
    Case("Where", [truth(3, 4), real(3, 4), real(4)], given=3),
    Case("Cast", [4 * positive(5)], {"to": onnx.TensorProto.UINT8}),
    Case("Cast", [real(5)], {"to": onnx.TensorProto.INT64}),
    Case("Cast", [real(5)], {"to": onnx.TensorProto.BOOL}),
    Case("Clip", [real(9), SCALAR - 1, SCALAR]),
    Case("Clip", [real(9), None, SCALAR]),
    Case("Concat", [real(2, 3), real(2, 1)], {"axis": -1}),
    Case("ConstantOfShape", [numbers(2, 3)], {"value": numpy_helper.from_array(np.array([7], np.int64))}, given=0),
    Case("Range", [np.array(2, np.int64), np.array(9, np.int64), np.array(3, np.int64)], given=0),
    Case("Conv", [real(2, 3, 9, 8), real(4, 3, 3, 3), real(4)], {"pads": [1, 1, 1, 1], "strides": [2, 2]}),
    Case("Conv", [real(2, 4, 9, 8), real(4, 1, 3, 3)], {"pads": [0, 1, 2, 1], "group": 4}),
    Case("Conv", [real(1, 2, 9), real(3, 2, 3)], {"dilations": [2]}),
    Case("MaxPool", [real(1, 2, 9, 8)], {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "strides": [2, 2]}),
    Case("MaxPool", [real(1, 2, 9, 8)], {"kernel_shape": [2, 2], "pads": [0, 0, 1, 0], "strides": [2, 2]}),
    Case("Einsum", [real(2, 3, 4), real(3, 4, 5)], {"equation": "bhw,hwk->bhk"}),
    Case("Expand", [real(3, 1), numbers(2, 1, 4)]),
    Case("Expand", [real(2, 3, 1), numbers(3, 4)]),
    Case("Flatten", [real(2, 3, 4)], {"axis": 2}),
    Case("Gather", [real(4, 5), numbers(3, -1, 0)], {"axis": 1}),
    Case("Gather", [real(4, 5), np.array(2, np.int64)]),
    Case("GatherElements", [real(3, 5), np.array([[0, -1], [2, 1], [4, 4]])], {"axis": 1}),
    Case("GatherND", [real(3, 4, 5), np.array([[0, 1], [-1, 2]])]),
    Case("GatherND", [real(3, 4), np.array([[[0, 1]], [[2, 3]]])]),
    Case("Gemm", [real(3, 4), real(4, 5), real(5)]),
    Case("Gemm", [real(4, 3), real(5, 4)], {"transA": 1, "transB": 1, "alpha": 0.5}),
    Case("LayerNormalization", [real(2, 3, 8), real(8), real(8)], {"axis": -1, "epsilon": 1e-3}),
    Case("LayerNormalization", [real(2, 3, 8), real(3, 8)], {"axis": 1}),
    Case("MatMul", [real(2, 1, 3, 4), real(5, 4, 6)]),
    Case("Pad", [real(2, 3, 4), numbers(0, 1, 0, 0, 2, 3), SCALAR]),
    Case("Pad", [real(2, 3), numbers(1, 2), None, numbers(-1)]),
    *(
        Case(name, [positive(2, 3, 4), numbers(1, -1)], {"keepdims": keep})
        for name, keep in (("ReduceMax", 1), ("ReduceMean", 0), ("ReduceMin", 0), ("ReduceSum", 1))
    ),
    Case("ReduceMean", [real(2, 3, 4)], {"axes": [1], "keepdims": 1}, opset=17),
    Case("ReduceSum", [real(2, 3)], {"keepdims": 0}),
    Case("ReduceMax", [real(2, 3)], {"noop_with_empty_axes": 1}),
    Case("Reshape", [real(2, 3, 4), numbers(0, -1)]),
    Case("Reshape", [real(0, 3, 4), numbers(0, 12)], {"allowzero": 1}),
    Case("Resize", [real(1, 2, 5, 6), None, np.array([1, 1, 2, 2], np.float32)],
         {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}),
    Case("Resize", [real(1, 2, 5, 6), None, None, numbers(1, 2, 8, 11)], {"mode": "linear"}),
    Case("Slice", [real(6, 7), numbers(1, -3), numbers(5, 2**63 - 1), numbers(0, 1)]),
    Case("Slice", [real(6, 7), numbers(-1), numbers(-(2**63)), numbers(1), numbers(-2)]),
    Case("Softmax", [real(2, 3, 4)], {"axis": 1}),
    Case("Split", [real(2, 6), numbers(1, 2, 3)], {"axis": 1}, outputs=3),
    Case("Split", [real(7)], {"num_outputs": 3}, outputs=3),
    Case("Squeeze", [real(1, 3, 1, 4), numbers(0, -2)]),
    Case("Squeeze", [real(1, 3, 1)]),
    Case("TopK", [np.round(2 * real(3, 9)), numbers(4)], {"axis": 1}, outputs=2),
    Case("TopK", [real(9, 2), numbers(3)], {"axis": 0, "largest": 0}, outputs=2),
    Case("Transpose", [real(2, 3, 4)], {"perm": [2, 0, 1]}),
    Case("Transpose", [real(2, 3)]),
    Case("Unsqueeze", [real(3, 4), numbers(0, -1)]),
]  # fmt: skip


def save_case(case: Case, path: Path) -> None:
    """Write the graph of one node."""
    names = ["" if value is None else f"x{place}" for place, value in enumerate(case.inputs)]
    outputs = [f"y{place}" for place in range(case.outputs)]
    graph = helper.make_graph(
        [helper.make_node(case.operator, names, outputs, **case.attributes)],
        "case",
        [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
            for name, value in list(zip(names, case.inputs, strict=True))[: case.given]
            if value is not None
        ],
        [onnx.ValueInfoProto(name=name) for name in outputs],
        [
            numpy_helper.from_array(value, name)
            for name, value in list(zip(names, case.inputs, strict=True))[case.given :]
            if value is not None
        ],
    )
    opsets = [helper.make_opsetid("", case.opset)]
    onnx.save(onnx.shape_inference.infer_shapes(helper.make_model(graph, opset_imports=opsets, ir_version=10)), path)


def execute(path: Path, inputs: dict[str, np.ndarray]) -> tuple[np.ndarray, ...]:
    """Translate a graph and run the program."""
    graph = read_graph(path)
    described = {name: torch.from_numpy(value).to("meta") for name, value in inputs.items()}
    program = program_of(graph, described, graph.weights, torch.device("cpu"))
    return tuple(value.numpy() for value in program(*(torch.from_numpy(inputs[name]) for name in graph.inputs)))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_operator_does_what_onnx_runtime_does(case: Case, tmp_path: Path):
    save_case(case, tmp_path / "case.onnx")
    inputs = {f"x{place}": value for place, value in enumerate(case.inputs[: case.given]) if value is not None}
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    expected = onnxruntime.InferenceSession(tmp_path / "case.onnx", options).run(None, inputs)
    found = execute(tmp_path / "case.onnx", inputs)
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_every_operator_has_a_case():
    assert {case.operator for case in CASES} == OPERATORS.keys()


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (Case("Mod", [numbers(5), numbers(3)]), "does not know Mod"),
        (Case("Conv", [real(1, 1, 5, 5), real(1, 1, 3, 3)], {"auto_pad": "SAME_UPPER"}), "auto_pad=SAME_UPPER"),
        (Case("Pad", [real(3, 3), numbers(1, 1, 1, 1)], {"mode": "reflect"}), "padding mode reflect"),
        (Case("Resize", [real(1, 1, 4, 4), None, np.array([1, 1, 2, 2], np.float32)], {"mode": "cubic"}), "Resize by"),
        (Case("Reshape", [real(2, 3), numbers(3, 2)], given=2), "depends on the values of tensors"),
    ],
    ids=str,
)
def test_what_is_not_translated_is_named(case: Case, message: str, tmp_path: Path):
    save_case(case, tmp_path / "case.onnx")
    inputs = {f"x{place}": value for place, value in enumerate(case.inputs[: case.given]) if value is not None}
    with pytest.raises(MissingCapabilityError, match=rf"case\.onnx.*{message}.*--engine onnxruntime") as caught:
        execute(tmp_path / "case.onnx", inputs)
    assert "\n" not in str(caught.value)


def test_a_graph_that_contradicts_itself_is_a_bundle_error(tmp_path: Path):
    save_case(Case("MatMul", [real(2, 3), real(3, 2)]), tmp_path / "case.onnx")
    with pytest.raises(BundleError, match=r"case\.onnx: MatMul -> y0 does not fit its inputs"):
        execute(tmp_path / "case.onnx", {"x0": real(2, 4)})


def test_shapes_are_computed_beforehand(tmp_path: Path):
    """What is left of a reshape to the shape of another tensor is the reshape alone."""
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Gather", ["shape", "zero"], ["rows"]),
        helper.make_node("Mul", ["rows", "rows"], ["square"]),
        helper.make_node("Concat", ["square", "rest"], ["wanted"], axis=0),
        helper.make_node("Reshape", ["x", "wanted"], ["y"]),
    ]
    kinds = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["a", "b"]) for name in "xy"]
    constants = [numpy_helper.from_array(numbers(0), "zero"), numpy_helper.from_array(numbers(-1), "rest")]
    graph = helper.make_graph(nodes, "shapes", kinds[:1], kinds[1:], constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), tmp_path / "s.onnx")
    read = read_graph(tmp_path / "s.onnx")
    program = program_of(read, {"x": torch.empty(2, 6, device="meta")}, read.weights, torch.device("cpu"))
    assert [node.op for node in program.graph.nodes] == ["placeholder", "call_function", "output"]
    assert program(torch.zeros(2, 6))[0].shape == (4, 3)


@pytest.mark.parametrize("content", [None, b"", b"text"], ids=["absent", "empty", "text"])
def test_a_file_that_is_no_graph_is_a_bundle_error(tmp_path: Path, content: bytes | None):
    if content is not None:
        (tmp_path / "broken.onnx").write_bytes(content)
    with pytest.raises(BundleError, match=r"broken\.onnx: cannot be read as an ONNX graph"):
        read_graph(tmp_path / "broken.onnx")


@pytest.mark.parametrize("precision", ["FLOAT16", "BFLOAT16"])
def test_weights_of_half_precision_arrive_unchanged(tmp_path: Path, precision: str):
    values = real(5)
    tensor = helper.make_tensor("w", getattr(onnx.TensorProto, precision), [5], values.tolist())
    nodes = [helper.make_node("Cast", ["w"], ["y"], to=onnx.TensorProto.FLOAT)]
    info = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [5])
    graph = helper.make_graph(nodes, "weights", [], [info], [tensor])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), tmp_path / "w.onnx")
    weight = read_graph(tmp_path / "w.onnx").weights["w"]
    assert weight.dtype == getattr(torch, precision.lower())
    np.testing.assert_array_equal(weight.float(), torch.from_numpy(values).to(weight.dtype).float())

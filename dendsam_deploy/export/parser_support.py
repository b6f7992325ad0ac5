"""What in an ONNX file TensorRT's parser would refuse, found without TensorRT.

The tables follow the parser's own documentation for version 10.15 (opsets 9 to 24); those of later versions only add to
it. Random numbers, signal windows and the like, which no graph of a bundle has, are left out and therefore reported.

References
----------
docs/operators.md at github.com/onnx/onnx-tensorrt. uint8 inputs: github.com/NVIDIA/TensorRT/issues/3985.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import onnx
from onnx import TensorProto, numpy_helper

from dendsam_deploy.errors import BundleError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path
    from typing import TypeAlias

    import numpy as np
    from numpy.typing import NDArray

    Check: TypeAlias = Callable[[onnx.NodeProto, "_Facts"], str]

_OPSETS = range(9, 25)
_MOST_CANDIDATES = 3840  # of TopK

_REAL = frozenset({TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16})
_OLDER_REAL = frozenset({TensorProto.FLOAT, TensorProto.FLOAT16})
_WHOLE = frozenset({TensorProto.INT32, TensorProto.INT64})
_LOGICAL = frozenset({TensorProto.BOOL})
_ANY = _REAL | _WHOLE | _LOGICAL

_TYPES_OF: dict[frozenset[int], str] = {
    _REAL: """
        Acos Acosh Asin Asinh Atan Atanh Attention AveragePool BatchNormalization Ceil Celu Clip Conv ConvTranspose Cos
        Cosh CumSum Dropout Einsum Elu Erf Exp Floor Gemm GlobalAveragePool GlobalLpPool GlobalMaxPool
        GroupNormalization GRU HardSigmoid HardSwish Hardmax InstanceNormalization IsInf LayerNormalization LeakyRelu
        Log LogSoftmax LRN LSTM LpNormalization LpPool MatMul MaxPool MeanVarianceNormalization PRelu QuantizeLinear
        Reciprocal Resize RMSNormalization RNN Round Selu Sigmoid Sin Sinh Softmax Softplus Softsign Sqrt Tan Tanh
        ThresholdedRelu Upsample
    """,
    _OLDER_REAL: "DeformConv GridSample Mish NonMaxSuppression NonZero RoiAlign",
    _REAL | _WHOLE: """
        Abs Add ArgMax ArgMin DepthToSpace Div Equal Gelu Greater GreaterOrEqual IsNaN Less LessOrEqual Max Mean Min Mod
        Mul Neg Pad Pow Range ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd
        ReduceSum ReduceSumSquare Relu Scatter ScatterElements ScatterND Shrink Sign SpaceToDepth Sub Sum TopK
    """,
    _LOGICAL: "And Not Or Xor",
    _ANY: """
        Concat Constant ConstantOfShape Expand EyeLike Flatten Gather GatherElements GatherND Identity If Loop OneHot
        Reshape ReverseSequence Shape Size Slice Split Squeeze Tile Transpose Trilu Unsqueeze Where
    """,
    _ANY | {TensorProto.UINT8}: "Cast CastLike",
    frozenset({TensorProto.INT8}): "DequantizeLinear",
}
_ALLOWED = {operator: types for types, operators in _TYPES_OF.items() for operator in operators.split()}

# Inputs that are no data: positions, sizes and switches, whatever the types of the data may be.
_SIDE_INPUTS = {
    "ConstantOfShape": {0},
    "CumSum": {1},
    "DequantizeLinear": {1, 2},
    "Dropout": {1, 2},
    "Expand": {1},
    "Gather": {1},
    "GatherElements": {1},
    "GatherND": {1},
    "NonMaxSuppression": {2},
    "OneHot": {0, 1},
    "Pad": {1, 3},
    "QuantizeLinear": {1, 2},
    "Reshape": {1},
    "Resize": {1, 2, 3},
    "ReverseSequence": {1},
    "RoiAlign": {2},
    "Scatter": {1},
    "ScatterElements": {1},
    "ScatterND": {1},
    "Slice": {1, 2, 3, 4},
    "Split": {1},
    "Squeeze": {1},
    "Tile": {1},
    "TopK": {1},
    "Trilu": {1},
    "Unsqueeze": {1},
}


def unsupported_nodes(path: Path) -> list[str]:
    """List what TensorRT's parser does not take, one line for each node or tensor, in the order of the file.

    Parameters
    ----------
    path : Path
        An ONNX file; external data is not read.

    Returns
    -------
    list of str
        Empty where the parser takes everything.

    Raises
    ------
    BundleError
        Where the file is no valid graph.
    """
    try:
        onnx.checker.check_model(str(path))
        model = onnx.shape_inference.infer_shapes(onnx.load(path, load_external_data=False))
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        raise BundleError(f"{path}: cannot be read as an ONNX graph ({reason}); export it again") from error
    facts = _Facts.of(model)
    return [*_about_opset(model), *_about_ends(model.graph), *_about_nodes(model.graph, facts)]


@dataclass(frozen=True, slots=True)
class _Facts:
    """What is known about the values of a model, those inside its control flow included.

    Parameters
    ----------
    types : dict
        Value -> ONNX's number of its element type.
    constants : dict
        Value that is known when the graph is parsed -> its tensor.
    inputs, outputs : frozenset of str
        Of the whole graph.
    """

    types: dict[str, int]
    constants: dict[str, TensorProto]
    inputs: frozenset[str]
    outputs: frozenset[str]

    @classmethod
    def of(cls, model: onnx.ModelProto) -> _Facts:
        """Collect them."""
        types: dict[str, int] = {}
        constants: dict[str, TensorProto] = {}
        for graph in _graphs(model.graph):
            for value in (*graph.input, *graph.value_info, *graph.output):
                types[value.name] = value.type.tensor_type.elem_type
            for tensor in graph.initializer:
                types[tensor.name], constants[tensor.name] = tensor.data_type, tensor
            for node in graph.node:
                if node.op_type == "Constant":
                    made = {attribute.name: attribute for attribute in node.attribute}
                    constants[node.output[0]] = made["value"].t if "value" in made else TensorProto()
        ends = (frozenset(value.name for value in side) for side in (model.graph.input, model.graph.output))
        return cls(types, constants, *ends)

    def type_name(self, value: str) -> str:
        """Return the type of a value as ONNX calls it."""
        return str(TensorProto.DataType.Name(self.types.get(value, 0))).lower()

    def array(self, value: str) -> NDArray[np.generic] | None:
        """Return a constant that lies in the file itself; None where it does not."""
        tensor = self.constants.get(value)
        if tensor is None or not tensor.data_type or tensor.data_location == TensorProto.EXTERNAL:
            return None
        array: NDArray[np.generic] = numpy_helper.to_array(tensor)
        return array


def _about_opset(model: onnx.ModelProto) -> list[str]:
    """Return what is wrong with the version of the operators."""
    versions = [entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")]
    return [
        f"opset {version}: the parser takes {_OPSETS.start} to {_OPSETS.stop - 1}"
        for version in versions
        if version not in _OPSETS
    ]


def _about_ends(graph: onnx.GraphProto) -> list[str]:
    """Return the inputs and outputs of a graph whose type no network has."""
    kept = {tensor.name for tensor in graph.initializer}
    return [
        f"{side} {value.name!r}: is {TensorProto.DataType.Name(value.type.tensor_type.elem_type).lower()}"
        for side, values in (("input", graph.input), ("output", graph.output))
        for value in values
        if value.name not in kept and value.type.tensor_type.elem_type not in _ANY | {TensorProto.UINT8}
    ]


def _about_nodes(graph: onnx.GraphProto, facts: _Facts) -> Iterator[str]:
    """Yield what is wrong with the nodes of a graph and of those inside its control flow."""
    for inner in _graphs(graph):
        for node in inner.node:
            complaint = _complaint(node, facts)
            if complaint:
                yield f"{node.op_type} {(node.name or node.output[0])!r}: {complaint}"


def _complaint(node: onnx.NodeProto, facts: _Facts) -> str:
    """Return what is wrong with a node, or nothing."""
    if node.domain not in ("", "ai.onnx"):
        return f"is an operator of {node.domain}"
    allowed = _ALLOWED.get(node.op_type)
    if allowed is None:
        return "the parser has no such operator"
    beside = _SIDE_INPUTS.get(node.op_type, set())
    for number, name in enumerate(node.input):
        found = facts.types.get(name, 0)
        expected = _ANY | {TensorProto.INT8} if number in beside else allowed
        if found and found not in expected:
            return f"its input {name!r} is {facts.type_name(name)}"
    for name in node.output:
        if facts.types.get(name, 0) in (TensorProto.DOUBLE, TensorProto.STRING):
            return f"its output {name!r} is {facts.type_name(name)}"
    restriction = _RESTRICTIONS.get(node.op_type)
    return restriction(node, facts) if restriction else ""


def _cast(node: onnx.NodeProto, facts: _Facts) -> str:
    """uint8 is a type of inputs and outputs of the network alone, converted there from or to a real type."""
    source, target = node.input[0], node.output[0]
    kinds = facts.types.get(source, 0), facts.types.get(target, 0)
    for kind, other, is_end in (
        (kinds[0], kinds[1], source in facts.inputs),
        (kinds[1], kinds[0], target in facts.outputs),
    ):
        if kind == TensorProto.UINT8 and not is_end:
            return "uint8 is allowed at inputs and outputs of the graph only"
        if kind == TensorProto.UINT8 and other and other not in _OLDER_REAL:
            return "uint8 is converted from and to float32 and float16 only"
    return "" if not kinds[1] or kinds[1] in _ALLOWED["Cast"] else f"its output {target!r} is {facts.type_name(target)}"


def _constant_inputs(*positions: int) -> Check:
    """Return a check that some inputs are known when the graph is parsed."""

    def check(node: onnx.NodeProto, facts: _Facts) -> str:
        names = [node.input[number] for number in positions if number < len(node.input) and node.input[number]]
        return next((f"its input {name!r} is not constant" for name in names if name not in facts.constants), "")

    return check


def _attributes(wanted: dict[str, set[object]], *, outputs: int | None = None) -> Check:
    """Return a check that attributes have one of some values where they are given, and of the number of outputs."""

    def check(node: onnx.NodeProto, facts: _Facts) -> str:
        for attribute in node.attribute:
            value = onnx.helper.get_attribute_value(attribute)
            values = value if isinstance(value, list) else [value]
            read = [item.decode() if isinstance(item, bytes) else item for item in values]
            if attribute.name in wanted and not wanted[attribute.name].issuperset(read):
                return f"{attribute.name} is {read if isinstance(value, list) else read[0]}"
        if outputs is not None and sum(map(bool, node.output)) > outputs:
            return f"has {len(node.output)} outputs, of which the parser gives {outputs}"
        return ""

    return check


def _dropout(node: onnx.NodeProto, facts: _Facts) -> str:
    """Return a complaint unless the node does nothing."""
    training = node.input[2] if len(node.input) > 2 else ""
    array = facts.array(training) if training else None
    return "is_training is not constantly false" if training and (array is None or bool(array.any())) else ""


def _top_k(node: onnx.NodeProto, facts: _Facts) -> str:
    """Return a complaint about too many candidates, or about their order."""
    array = facts.array(node.input[1]) if len(node.input) > 1 else None
    if array is not None and int(array.max()) > _MOST_CANDIDATES:
        return f"K is {int(array.max())}, at most {_MOST_CANDIDATES}"
    return _attributes({"sorted": {1}})(node, facts)


def _quantized(node: onnx.NodeProto, facts: _Facts) -> str:
    """Return a complaint about a zero point: quantisation is symmetric, to int8."""
    zero = node.input[2] if len(node.input) > 2 else ""
    if not zero:
        return "has no zero point, which means uint8" if node.op_type == "QuantizeLinear" else ""
    array = facts.array(zero)
    return "its zero point is not constantly 0" if array is None or bool(array.any()) else ""


def _attention(node: onnx.NodeProto, facts: _Facts) -> str:
    """Return a complaint about what fused attention does not have."""
    if any(node.input[4:]):
        return "takes keys and values of earlier calls"
    return _attributes({"softcap": {0.0}, "qk_matmul_output_mode": {0}}, outputs=1)(node, facts)


_RESIZES = _attributes(
    {
        "coordinate_transformation_mode": {
            "half_pixel",
            "pytorch_half_pixel",
            "tf_half_pixel_for_nn",
            "asymmetric",
            "align_corners",
        },
        "mode": {"nearest", "linear"},
        "nearest_mode": {"floor", "ceil", "round_prefer_floor", "round_prefer_ceil"},
        "keep_aspect_ratio_policy": {"stretch"},
        "antialias": {0},
    }
)
_POOLS = _attributes({"dilations": {1}}, outputs=1)

_RESTRICTIONS: dict[str, Check] = {
    "Attention": _attention,
    "AveragePool": _POOLS,
    "BatchNormalization": _attributes({"training_mode": {0}}, outputs=1),
    "Cast": _cast,
    "CumSum": _constant_inputs(1),
    "DequantizeLinear": _quantized,
    "Dropout": _dropout,
    "GridSample": _attributes({"mode": {"bilinear", "nearest"}}),  # the parser takes `linear` for `nearest`
    "LayerNormalization": _attributes({}, outputs=1),
    "LpPool": _POOLS,
    "LSTM": _attributes({"input_forget": {0}, "layout": {0}}),
    "MaxPool": _POOLS,
    "OneHot": _constant_inputs(1),
    "QuantizeLinear": _quantized,
    "Resize": _RESIZES,
    "ScatterND": _attributes({"reduction": {"none"}}),
    "Squeeze": _constant_inputs(1),
    "TopK": _top_k,
    "Unsqueeze": _constant_inputs(1),
    **{operator: _constant_inputs(1) for operator in _ALLOWED if operator.startswith("Reduce")},
}


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """Yield a graph and those inside its control flow."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs) if attribute.type in _GRAPHS else ():
                yield from _graphs(inner)


_GRAPHS = (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS)

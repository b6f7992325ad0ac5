"""An ONNX file as plain nodes and torch tensors: what `captured_program` makes programs of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx
import torch

from dendsam_deploy.errors import BundleError, MissingCapabilityError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

DTYPES: Mapping[int, torch.dtype] = {
    onnx.TensorProto.FLOAT: torch.float32,
    onnx.TensorProto.FLOAT16: torch.float16,
    onnx.TensorProto.BFLOAT16: torch.bfloat16,
    onnx.TensorProto.DOUBLE: torch.float64,
    onnx.TensorProto.UINT8: torch.uint8,
    onnx.TensorProto.INT8: torch.int8,
    onnx.TensorProto.INT32: torch.int32,
    onnx.TensorProto.INT64: torch.int64,
    onnx.TensorProto.BOOL: torch.bool,
}
"""Types of elements by their number in ONNX."""


@dataclass(frozen=True, slots=True)
class Node:
    """One node of a graph; an absent optional input is the empty name."""

    operator: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Graph:
    """An ONNX graph.

    Parameters
    ----------
    path : Path
        The file.
    inputs, outputs : tuple of str
        Names of its tensors.
    nodes : tuple of Node
        In an order in which they can be executed.
    weights : mapping
        Constants by name, on the host.
    """

    path: Path
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    nodes: tuple[Node, ...]
    weights: Mapping[str, Tensor]


def read_graph(path: Path) -> Graph:
    """Read an ONNX file and the weights beside it.

    Raises
    ------
    BundleError
        Where the file cannot be read.
    MissingCapabilityError
        Where it holds what only ONNX's own runtimes understand, as a detector from elsewhere may.
    """
    try:
        onnx.checker.check_model(str(path))
        graph = onnx.load(path).graph
        weights = {tensor.name: _tensor(tensor) for tensor in graph.initializer}
        nodes = tuple(_node(node) for node in graph.node)
    except NotImplementedError as error:
        raise MissingCapabilityError(
            f"{path}: the engine torch does not execute the graph ({error}); choose --engine onnxruntime"
        ) from error
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, onnx.checker.ValidationError) as error:
        reason = " ".join((str(error) or type(error).__name__).split())[:200]
        raise BundleError(f"{path}: cannot be read as an ONNX graph ({reason}); export the bundle again") from error
    inputs = tuple(value.name for value in graph.input if value.name not in weights)
    return Graph(path, inputs, tuple(value.name for value in graph.output), nodes, weights)


def _node(node: onnx.NodeProto) -> Node:
    """Translate one node."""
    if node.domain not in ("", "ai.onnx"):
        raise NotImplementedError(f"the operator {node.domain}.{node.op_type} is not ONNX's own")
    attributes = {attribute.name: _attribute(attribute) for attribute in node.attribute}
    return Node(node.op_type, tuple(node.input), tuple(node.output), attributes)


def _attribute(attribute: onnx.AttributeProto) -> object:
    """Return the value of an attribute: a number, text, a tensor, or a tuple of numbers."""
    value = onnx.helper.get_attribute_value(attribute)
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, onnx.TensorProto):
        return _tensor(value)
    if isinstance(value, onnx.GraphProto):
        raise NotImplementedError(f"a graph inside the graph, as {attribute.name}")
    return value if isinstance(value, int | float) else tuple(value)


def _tensor(tensor: onnx.TensorProto) -> Tensor:
    """Return a constant; torch has no way in for numpy's stand-in of bfloat16."""
    dtype = DTYPES[tensor.data_type]
    array = onnx.numpy_helper.to_array(tensor)
    if dtype == torch.bfloat16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())

"""A graph for one set of shapes, as a straight torch program: what can be known beforehand is no longer computed.

An ONNX graph carries the arithmetic of its own shapes. For given shapes that arithmetic has one result, so it is done
once, on the host, while the rest is translated. What remains is a list of operators on tensors of known shape, which
torch can compile, capture or package.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from dendsam_deploy.errors import BundleError, MissingCapabilityError
from dendsam_deploy.runtimes.captured_operators import OPERATORS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from dendsam_deploy.runtimes.captured_graph import Graph, Node


_FEW = 64
"""Constants of no more elements may be shapes, axes or indices: they are at hand while a graph is translated."""


@dataclass(frozen=True, slots=True)
class _Traced:
    """A tensor of the program: the node that makes it, and its shape and type on the device ``meta``."""

    node: fx.Node
    meta: Tensor


def program_of(
    graph: Graph, inputs: Mapping[str, Tensor], weights: Mapping[str, Tensor], device: torch.device
) -> fx.GraphModule:
    """Translate a graph for given inputs.

    Parameters
    ----------
    graph : Graph
        What to translate.
    inputs : mapping
        Inputs by name. Of one on the device ``meta`` only shape and type count, and the program takes it, in the
        graph's order; any other is a number that the program is made for.
    weights : mapping
        The graph's weights on `device`; they are shared, not copied.
    device : torch.device
        What is to execute the program.

    Returns
    -------
    fx.GraphModule
        Takes the inputs and returns the tuple of outputs.

    Raises
    ------
    MissingCapabilityError
        Where the graph holds an operator, or a variant of one, that is not translated.
    BundleError
        Where it contradicts itself.
    """
    translation = _Translation(graph, weights, device)
    for name in graph.inputs:
        translation.add_input(name, inputs[name])
    for node in graph.nodes:
        try:
            translation.add_node(node)
        except (NotImplementedError, KeyError) as error:
            raise MissingCapabilityError(
                f"{graph.path}: the engine torch does not know {node.operator} ({error}); choose --engine onnxruntime"
            ) from error
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            reason = " ".join(str(error).split())[:200]
            raise BundleError(
                f"{graph.path}: {node.operator} -> {node.outputs[0]} does not fit its inputs ({reason}); "
                "export the bundle again"
            ) from error
    return translation.finished()


class _Translation:
    """A program in the making."""

    def __init__(self, graph: Graph, weights: Mapping[str, Tensor], device: torch.device) -> None:
        self._graph = graph
        self._weights = weights
        self._device = device
        self._program = fx.Graph()
        self._held: dict[str, Tensor] = {}
        self._known = {name: value for name, value in graph.weights.items() if value.numel() <= _FEW}
        self._constants: dict[str, _Traced] = {}
        self._traced: dict[str, _Traced] = {}

    def add_input(self, name: str, value: Tensor) -> None:
        """Take an input: one of known numbers, or one that the program will be given."""
        if value.device.type == "meta":
            self._traced[name] = _traced(self._program.placeholder(f"input_{len(self._traced)}"), value)
        else:
            self._known[name] = value

    def add_node(self, node: Node) -> None:
        """Compute a node whose inputs are known, and translate any other."""
        if node.operator == "Constant":
            self._known[node.outputs[0]] = _constant(node.attributes)
        elif node.operator == "Shape":
            self._known[node.outputs[0]] = torch.tensor(self._shape_of(node.inputs[0]))[_span(node.attributes)]
        elif all(name in self._known for name in node.inputs if name):
            self._compute(node)
        else:
            self._translate(node)

    def finished(self) -> fx.GraphModule:
        """Return the program."""
        self._program.output(tuple(self._operand(name)[0] for name in self._graph.outputs))
        self._program.eliminate_dead_code()
        module = fx.GraphModule(self._held, self._program)
        module.eval()
        return module

    def _compute(self, node: Node) -> None:
        """Execute a node now, on the host."""
        operator = OPERATORS[node.operator]
        arguments = [
            None if not name else self._numbers(name) if place in operator.static else self._known[name]
            for place, name in enumerate(node.inputs)
        ]
        results = operator.function(*arguments, **node.attributes)
        for name, value in zip(node.outputs, results if isinstance(results, tuple) else (results,), strict=False):
            self._known[name] = value

    def _translate(self, node: Node) -> None:
        """Append a node to the program, and find out the shapes of what it makes."""
        operator = OPERATORS[node.operator]
        arguments: list[Any] = []
        metas: list[Any] = []
        for place, name in enumerate(node.inputs):
            if not name or place in operator.static:
                argument = meta = self._numbers(name) if name else None
            else:
                argument, meta = self._operand(name)
            arguments.append(argument)
            metas.append(meta)
        results = operator.function(*metas, **node.attributes)
        named: dict[str, Any] = dict(node.attributes)
        made = self._program.call_function(operator.function, tuple(arguments), named)
        if not isinstance(results, tuple):
            self._traced[node.outputs[0]] = _traced(made, results)
            return
        for place, (name, value) in enumerate(zip(node.outputs, results, strict=False)):
            self._traced[name] = _traced(self._program.call_function(_part, (made, place)), value)

    def _operand(self, name: str) -> tuple[fx.Node, Tensor]:
        """Return a tensor as the program sees it; weights and known numbers become constants of the program."""
        found = self._traced.get(name) or self._constants.get(name)
        if found is None:
            value = self._weights[name] if name in self._weights else self._known[name].to(self._device)
            key = f"constant_{len(self._held)}"
            self._held[key] = value
            found = self._constants[name] = _traced(self._program.get_attr(key), value.to("meta"))
        return found.node, found.meta

    def _numbers(self, name: str) -> Any:  # noqa: ANN401 - as deep as the tensor has axes
        """Return what has to be known beforehand."""
        value = self._known.get(name, self._graph.weights.get(name))
        if value is None:
            raise NotImplementedError(f"{name} depends on the values of tensors")
        return value.tolist()

    def _shape_of(self, name: str) -> list[int]:
        """Return the shape of any tensor."""
        if name in self._traced:
            return list(self._traced[name].meta.shape)
        return list((self._known[name] if name in self._known else self._graph.weights[name]).shape)


def _span(attributes: Mapping[str, Any]) -> slice:
    """Return the part of a shape that a ``Shape`` asks for."""
    return slice(attributes.get("start", 0), attributes.get("end"))


def _constant(attributes: Mapping[str, object]) -> Tensor:
    """Return the value of a ``Constant``."""
    (value,) = attributes.values()
    return value if isinstance(value, torch.Tensor) else torch.tensor(value)


def _traced(node: fx.Node, meta: Tensor) -> _Traced:
    """Describe what a node makes, for whoever looks at the program later as well."""
    node.meta["val"] = meta
    return _Traced(node, meta)


def _part(results: tuple[Tensor, ...], place: int) -> Tensor:
    """Return one of several results."""
    return results[place]

"""From a torch module to an ONNX file that keeps the contract of its role; the home of ``onnx``."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import TYPE_CHECKING

import onnx
import onnx_ir
import torch

from dendsam_deploy.bundle.bundle import digest_file
from dendsam_deploy.bundle.contract import graph_inputs, graph_outputs
from dendsam_deploy.bundle.external_data import external_data_locations
from dendsam_deploy.bundle.manifest import GraphSpec
from dendsam_deploy.durable import storage_errors
from dendsam_deploy.errors import BundleError
from dendsam_deploy.geometry import EMBEDDING_STRIDE_PX

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

    from dendsam_deploy.bundle.manifest import AttentionForm, Precision, Role, TensorSpec

OPSET = 20
"""Version of the operators: old enough for every engine in use, new enough for LayerNormalization and Gelu."""

IR_VERSION = 10
"""Version of the file format; onnx itself would write its newest, which released engines refuse."""

_EXTERNAL_ABOVE_BYTES = 1_800_000_000  # a protocol buffer ends at 2 GiB; ViT-H has 2.5 GB of weights
_SMALLEST_EXTERNAL_BYTES = 1024  # shapes and scalars stay in the graph, where shape inference finds them


@dataclass(frozen=True, slots=True)
class GraphExport:
    """What one ONNX file is to be.

    Parameters
    ----------
    role : str
        ``detector``, ``encoder``, ``decoder`` or ``points``; decides the names, dtypes and shapes.
    tile_size_px : int
        Side of the square tiles.
    precision : str
        What the graph computes in; what enters and leaves is float32 or uint8 all the same.
    attention : str or None
        How it computes relative position, for the manifest.
    external_above_bytes : int
        Weights beyond this size are put into a second file.
    """

    role: Role
    tile_size_px: int
    precision: Precision = "fp32"
    attention: AttentionForm | None = None
    external_above_bytes: int = _EXTERNAL_ABOVE_BYTES

    @property
    def file(self) -> str:
        """Name of the file in a bundle, such as ``encoder.onnx`` or ``encoder.bf16.onnx``."""
        return f"{self.role}.onnx" if self.precision == "fp32" else f"{self.role}.{self.precision}.onnx"


def onnx_from_torch(module: nn.Module, export: GraphExport, path: Path) -> GraphSpec:
    """Write a module as an ONNX file.

    Parameters
    ----------
    module : nn.Module
        Takes and returns the tensors of its role in the contract's order.
    export : GraphExport
        What the file is to be.
    path : Path
        The file to write; weights that do not fit go to ``<path>.data``.

    Returns
    -------
    GraphSpec
        Description of the files, named relative to their folder.

    Raises
    ------
    BundleError
        Where the module cannot be exported, or the result breaks the contract.
    StorageError
        Where the file system refuses.
    """
    model = _model_from_torch(module.eval(), export)
    model.ir_version = IR_VERSION
    _keep_the_contract_only(model, export)
    weights = sum(
        value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None
    )
    data_file = f"{path.name}.data" if weights > export.external_above_bytes else None
    with storage_errors(path):
        onnx_ir.save(model, path, external_data=data_file, size_threshold_bytes=_SMALLEST_EXTERNAL_BYTES)
    del model
    gc.collect()  # exported programs hold themselves, and copies of the weights, in cycles
    return describe_graph(path, export)


def describe_graph(path: Path, export: GraphExport) -> GraphSpec:
    """Check an ONNX file, see `check_graph`, and describe it for the manifest, together with its external data."""
    opset = check_graph(path, export)
    names = (path.name, *sorted(external_data_locations(path)))
    return GraphSpec(
        role=export.role,
        precision=export.precision,
        opset=opset,
        files=tuple(digest_file(path.parent, name) for name in names),
        inputs=graph_inputs(export.role, export.tile_size_px),
        outputs=graph_outputs(export.role, export.tile_size_px),
        attention=export.attention,
    )


def check_graph(path: Path, export: GraphExport) -> int:
    """Check an ONNX file against the contract of its role.

    Parameters
    ----------
    path : Path
        The graph.
    export : GraphExport
        What it should be.

    Returns
    -------
    int
        Version of the operators that the file uses.

    Raises
    ------
    BundleError
        Names the first thing that is wrong: an invalid graph, another signature, or an operator that is not ONNX's own.
    """
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        reason = str(error).strip().splitlines()[0]
        raise BundleError(f"{path}: not a valid ONNX graph ({reason}); export it again") from error
    model = onnx.load(path, load_external_data=False)
    foreign = {
        f"{node.domain}.{node.op_type}" for node in _all_nodes(model.graph) if node.domain not in {"", "ai.onnx"}
    }
    if foreign or model.functions:
        names = sorted(foreign) or [function.name for function in model.functions]
        raise BundleError(f"{path}: uses operators that are not ONNX's own ({', '.join(names)}); export without them")
    for have, want in (
        (model.graph.input, graph_inputs(export.role, export.tile_size_px)),
        (model.graph.output, graph_outputs(export.role, export.tile_size_px)),
    ):
        _check_tensors(path, list(have), want)
    return next(int(entry.version) for entry in model.opset_import if entry.domain in {"", "ai.onnx"})


def _model_from_torch(module: nn.Module, export: GraphExport) -> onnx_ir.Model:
    """Trace a module and translate it."""
    inputs = graph_inputs(export.role, export.tile_size_px)
    free = torch.export.Dim.DYNAMIC
    shapes = tuple({axis: free for axis, n in enumerate(spec.shape) if isinstance(n, str)} for spec in inputs)
    try:
        with torch.no_grad():
            program = torch.export.export(module, _example_inputs(export), dynamic_shapes=shapes)
        exported = torch.onnx.export(
            program,
            (),
            dynamo=True,
            opset_version=OPSET,
            input_names=[spec.name for spec in inputs],
            output_names=[spec.name for spec in graph_outputs(export.role, export.tile_size_px)],
            verbose=False,
        )
    except (RuntimeError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise BundleError(
            f"the {export.role} ({type(module).__name__}) cannot be written as ONNX: {reason}; "
            "use another architecture or another version of torch"
        ) from error
    if exported is None:  # torch returns nothing only when it writes the file itself
        raise AssertionError
    return exported.model


def _example_inputs(export: GraphExport) -> tuple[Tensor, ...]:
    """Return inputs for tracing; free axes get lengths above 1, because torch takes 0 and 1 for constants."""
    lengths = {"tiles": 2, "boxes": 3, "prompts": 3, "points": 2}
    inputs = []
    for spec in graph_inputs(export.role, export.tile_size_px):
        shape = [n if isinstance(n, int) else lengths[n] for n in spec.shape]
        inputs.append(torch.zeros(shape, dtype=getattr(torch, spec.dtype)))
        if spec.name == "region":
            inputs[-1] += max(1, export.tile_size_px // EMBEDDING_STRIDE_PX // 2)
    return tuple(inputs)


def _keep_the_contract_only(model: onnx_ir.Model, export: GraphExport) -> None:
    """Name the free axes as the contract does, and drop the exporter's notes.

    The notes hold source lines and paths of the machine that exported; they double the size of a graph, and the digest
    of a bundle would depend on where the package is installed.
    """
    tensors = graph_inputs(export.role, export.tile_size_px) + graph_outputs(export.role, export.tile_size_px)
    specs = {spec.name: spec for spec in tensors}
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for node in onnx_ir.traversal.RecursiveGraphIterator(model.graph):
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
            # Shapes with the exporter's own symbols are left to shape inference.
            if value.shape is not None and not value.shape.is_static():
                value.shape = None
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.metadata_props.clear()
        value.shape = onnx_ir.Shape(specs[value.name or ""].shape)
    for value in model.graph.initializers.values():
        value.metadata_props.clear()


def _all_nodes(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """Return the nodes of a graph and of the graphs inside its control flow."""
    nodes = list(graph.node)
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                nodes += _all_nodes(inner)
    return nodes


def _check_tensors(path: Path, have: list[onnx.ValueInfoProto], want: tuple[TensorSpec, ...]) -> None:
    """Check names, dtypes and fixed axes of a graph's inputs or outputs."""
    found = ", ".join(_describe(value) for value in have)
    fits = len(have) == len(want) and all(_fits(value, spec) for value, spec in zip(have, want, strict=True))
    if not fits:
        expected = ", ".join(f"{spec.name} {spec.dtype}{list(spec.shape)}" for spec in want)
        raise BundleError(f"{path}: has the tensors {found}, expected {expected}; export it again")


def _fits(value: onnx.ValueInfoProto, spec: TensorSpec) -> bool:
    """Tell whether one tensor is the contract's; an axis that the contract leaves free must be free."""
    tensor = value.type.tensor_type
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name if tensor.elem_type else "unknown"
    dims = tensor.shape.dim
    return (
        value.name == spec.name
        and dtype == spec.dtype
        and len(dims) == len(spec.shape)
        and all(
            (not dim.HasField("dim_value")) if isinstance(n, str) else dim.dim_value == n
            for dim, n in zip(dims, spec.shape, strict=True)
        )
    )


def _describe(value: onnx.ValueInfoProto) -> str:
    """Write a tensor's name, dtype and shape."""
    tensor = value.type.tensor_type
    dtype = onnx.TensorProto.DataType.Name(tensor.elem_type).lower()
    shape = [dim.dim_param or dim.dim_value for dim in tensor.shape.dim]
    return f"{value.name} {dtype}{shape}"

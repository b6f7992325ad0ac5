"""The encoder at int8: its linear layers quantised from the ranges that they have on real tiles; the rest stays fp32.

Weights are symmetric int8, a scale for each output channel; inputs are uint8, a scale for each tensor. Weights use 7 of
their 8 bits, because the 8-bit products of processors without VNNI saturate otherwise. Attention, norms and the
residual stream stay float32, and so do decoder and detector: they take little time, and decide about borders.

References
----------
https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html, on formats, ranges and saturation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnxruntime
from onnxruntime.quantization import QuantType
from onnxruntime.quantization.calibrate import CalibrationMethod, TensorData, TensorsData
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

from dendsam_deploy.errors import BundleError
from dendsam_deploy.export.draft import differences, failed_engines, is_refused
from dendsam_deploy.export.graphs import GraphExport, describe_graph
from dendsam_deploy.export.reference import ReferenceOptions, reference_inputs

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from dendsam_deploy.bundle.manifest import GraphSpec
    from dendsam_deploy.bundle.reference import ReferenceInputs
    from dendsam_deploy.export.draft import Draft

_CALIBRATION_TILES = 4
_CALIBRATION_SEED = 21  # other tiles than those of the stored reference, which judges


@dataclass(frozen=True, slots=True)
class _Layer:
    """A linear layer of a graph: its node, the tensor that enters it, and the lengths of its input and output."""

    node: str
    tensor: str
    inputs: int
    outputs: int


_MIXTURES: tuple[tuple[str, Callable[[_Layer], bool]], ...] = (
    ("all linear layers", lambda layer: True),
    # What comes out of a GELU has a long tail, so one scale fits it badly.
    ("all linear layers but the second ones of the perceptrons", lambda layer: layer.inputs <= layer.outputs),
    ("the first linear layers of the perceptrons", lambda layer: layer.inputs < layer.outputs),
)
"""What is quantised: as much as possible first, less where that fails its proof."""


def with_int8(draft: Draft, tell: Callable[[str], None]) -> Draft:
    """Add an encoder at int8 to a bundle, quantised as far as its proof allows.

    Parameters
    ----------
    draft : Draft
        The bundle.
    tell : callable
        Told what failed and what took its place.
    """
    source = draft.manifest.graph("encoder", "fp32")
    assert source is not None, "every draft has its fp32 graphs"
    folder = draft.writer.folder
    export = GraphExport("encoder", draft.weights.preprocessing.tile_size_px, "int8", source.attention)
    options = ReferenceOptions(
        export.tile_size_px, draft.weights.volume, tiles=_CALIBRATION_TILES, boxes=1, seed=_CALIBRATION_SEED
    )
    tiles = reference_inputs(options)
    for name, is_quantised in _MIXTURES:
        made = quantised(folder / source.files[0].file, folder / export.file, export, tiles, is_quantised)
        candidate, found = draft.with_graphs((made,)).judged("int8")
        if not is_refused(found):
            for sentence in failed_engines(found):
                tell(sentence)
            if draft.gate is not None and not found.rows:
                tell("int8: no engine of this machine runs it, so it is unproven; run `dendsam-deploy verify`")
            return candidate
        tell(f"int8 in {name} {differences(found)}; not published")
        draft.discard((made,))
    tell("int8: no mixture passed its proof; the bundle does without")
    return draft


def quantised(
    source: Path, out: Path, export: GraphExport, tiles: ReferenceInputs, is_quantised: Callable[[_Layer], bool]
) -> GraphSpec:
    """Write a quantised copy of an encoder.

    Parameters
    ----------
    source, out : Path
        The fp32 graph, and the file to write.
    export : GraphExport
        What the copy is to be.
    tiles : ReferenceInputs
        What it is calibrated on.
    is_quantised : callable
        Chooses among the linear layers.

    Raises
    ------
    BundleError
        Where the graph cannot be quantised.
    """
    layers = [layer for layer in linear_layers(source) if is_quantised(layer)]
    try:
        ranges = _input_ranges(source, layers, tiles)
        quantizer = QDQQuantizer(
            onnx.load(source),
            per_channel=True,
            reduce_range=True,
            weight_qType=QuantType.QInt8,
            activation_qType=QuantType.QUInt8,
            tensors_range=TensorsData(CalibrationMethod.MinMax, ranges),
            nodes_to_quantize=[layer.node for layer in layers],
            nodes_to_exclude=[],
            op_types_to_quantize=["MatMul"],
            extra_options={"WeightSymmetric": True, "OpTypesToExcludeOutputQuantization": ["MatMul"]},
        )
        quantizer.quantize_model()
        quantizer.model.topological_sort()
        onnx.save(quantizer.model.model, out)
    except (RuntimeError, ValueError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise BundleError(f"{source}: cannot be quantised ({reason}); leave --precision int8 out") from error
    return describe_graph(out, export)


def _input_ranges(source: Path, layers: list[_Layer], tiles: ReferenceInputs) -> dict[str, TensorData]:
    """Return the least and the largest value that enters each layer, over all tiles.

    onnxruntime's own calibrator keeps every tensor of a run, which takes ViT-B at 1024 px beyond 20 GB; here the graph
    itself returns nothing but the extremes.
    """
    names = list(dict.fromkeys(layer.tensor for layer in layers))
    model = onnx.load(source, load_external_data=False)
    del model.graph.output[:]
    for name in names:
        for reduce in ("ReduceMin", "ReduceMax"):
            model.graph.node.append(onnx.helper.make_node(reduce, [name], [f"{name}/{reduce}"], keepdims=0))
            output = onnx.helper.make_tensor_value_info(f"{name}/{reduce}", onnx.TensorProto.FLOAT, [])
            model.graph.output.append(output)
    path = source.with_name(f".{source.name}.ranges")  # beside the graph, whose external data it shares
    try:
        onnx.save(model, path)
        options = onnxruntime.SessionOptions()
        options.enable_mem_pattern = False  # as in `runtimes.portable`: the arena would hold the peak twice
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        extremes = [
            session.run(None, {"tiles": tiles.tiles[i : i + 1], "sizes": tiles.sizes[i : i + 1]})
            for i in range(len(tiles.tiles))
        ]
    finally:
        path.unlink(missing_ok=True)
    pairs = np.array(extremes, np.float32).reshape(len(tiles.tiles), len(names), 2)
    lowest, highest = pairs[..., 0].min(axis=0), pairs[..., 1].max(axis=0)
    return {name: TensorData(lowest=lowest[i], highest=highest[i]) for i, name in enumerate(names)}


def linear_layers(path: Path) -> list[_Layer]:
    """Return the products of an ONNX graph with a constant matrix."""
    graph = onnx.load(path, load_external_data=False).graph
    matrices = {constant.name: tuple(constant.dims) for constant in graph.initializer if len(constant.dims) == 2}
    return [
        _Layer(node.name, node.input[0], *matrices[node.input[1]])
        for node in graph.node
        if node.op_type == "MatMul" and node.input[1] in matrices
    ]

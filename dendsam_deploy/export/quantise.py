"""The encoder at int8: its linear layers quantised from the ranges that they have on real tiles; the rest stays fp32.

Weights are symmetric int8, a scale for each output channel; inputs are uint8, a scale for each tensor. Weights use 7 of
their 8 bits, because the 8-bit products of processors without VNNI saturate otherwise. Attention, norms and the
residual stream stay float32, and so do decoder and detector: they take little time, and decide about borders.

References
----------
https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html, on formats, ranges and saturation.
"""

from __future__ import annotations

import logging
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import onnx
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

from dendsam_deploy.errors import BundleError
from dendsam_deploy.export.draft import differences, failed_engines, is_refused
from dendsam_deploy.export.graphs import GraphExport, describe_graph
from dendsam_deploy.export.reference import ReferenceOptions, reference_inputs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from dendsam_deploy.bundle.manifest import GraphSpec
    from dendsam_deploy.bundle.reference import ReferenceInputs
    from dendsam_deploy.export.draft import Draft

_CALIBRATION_TILES = 6
_CALIBRATION_SEED = 21  # other tiles than those of the stored reference, which judges


@dataclass(frozen=True, slots=True)
class _Layer:
    """A linear layer of a graph: its node, and the lengths of its input and output."""

    node: str
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
    nodes = [layer.node for layer in linear_layers(source) if is_quantised(layer)]
    try:
        with _quiet():
            quantize_static(
                source,
                out,
                _Tiles(tiles),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=["MatMul"],
                nodes_to_quantize=nodes,
                per_channel=True,
                reduce_range=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                extra_options={"WeightSymmetric": True, "OpTypesToExcludeOutputQuantization": ["MatMul"]},
            )
    except (RuntimeError, ValueError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise BundleError(f"{source}: cannot be quantised ({reason}); leave --precision int8 out") from error
    return describe_graph(out, export)


def linear_layers(path: Path) -> list[_Layer]:
    """Return the products of an ONNX graph with a constant matrix."""
    graph = onnx.load(path, load_external_data=False).graph
    matrices = {constant.name: tuple(constant.dims) for constant in graph.initializer if len(constant.dims) == 2}
    return [
        _Layer(node.name, *matrices[node.input[1]])
        for node in graph.node
        if node.op_type == "MatMul" and node.input[1] in matrices
    ]


class _Tiles(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no types
    """Hands tiles to onnxruntime's calibration one by one."""

    def __init__(self, inputs: ReferenceInputs) -> None:
        self._inputs = inputs
        self._next = 0

    def get_next(self) -> dict[str, NDArray[np.generic]] | None:
        """Return the inputs of the next tile, or None after the last."""
        place, self._next = slice(self._next, self._next + 1), self._next + 1
        if place.start >= len(self._inputs.tiles):
            return None
        return {"tiles": self._inputs.tiles[place], "sizes": self._inputs.sizes[place]}


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep advice about preparing models, which does not apply, off the terminal."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)

"""How much arithmetic a graph needs: floating-point operations of its matrix products, two for each multiply-add.

Only products are counted (matrix products, attention, convolutions): they are what a processor's peak is quoted for,
and nearly all of the arithmetic. Two counts exist for the image encoder, because "achieved FLOP/s" depends on which of
them stands in the numerator:

useful
    What has to be computed: one grey channel, no projection of padding, no query that is padding. It does not depend on
    how a graph is written, so a graph that wastes arithmetic gets no credit for it.
reference
    What segment_anything's own modules compute, three equal channels and padded windows included. It is what published
    figures are relative to: 972 GFLOP for ViT-B at 1024 px.

Other graphs are counted by running them once and adding up what each of their operators did.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from dendsam_deploy.geometry import EMBEDDING_STRIDE_PX
from dendsam_deploy.runtimes.portable_trace import NodeRun, trace_nodes

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from dendsam_deploy.models.architectures import EncoderShape

_NECK_CHANNELS = 256
_MLP_RATIO = 4
_CHANNELS_RGB = 3

_WEIGHT_INPUT = {"Conv": 1, "ConvInteger": 1, "ConvTranspose": 1, "QLinearConv": 3}
"""Operators that slide a kernel, and which of their inputs it is."""

_UNCOUNTED = frozenset({"Attention", "MultiHeadAttention", "Einsum", "LSTM", "GRU"})
"""Operators that hold products whose extent their shapes alone do not tell."""


def useful_encoder_flop(shape: EncoderShape, image_size_px: int) -> int:
    """Return the operations that a plain vision transformer of SAM needs for one grey image.

    Parameters
    ----------
    shape : EncoderShape
        Its dimensions.
    image_size_px : int
        Side of its square input.
    """
    return _encoder_flop(shape, image_size_px, channels=1, padded=False)


def reference_encoder_flop(shape: EncoderShape, image_size_px: int) -> int:
    """Return the operations that segment_anything's ``ImageEncoderViT`` performs for one image.

    References
    ----------
    segment_anything/modeling/image_encoder.py at github.com/facebookresearch/segment-anything.
    """
    return _encoder_flop(shape, image_size_px, channels=_CHANNELS_RGB, padded=True)


def _encoder_flop(shape: EncoderShape, image_size_px: int, *, channels: int, padded: bool) -> int:
    """Count patch embedding, blocks and neck."""
    side, width = image_size_px // EMBEDDING_STRIDE_PX, shape.width
    tokens = side**2
    patches = tokens * width * channels * EMBEDDING_STRIDE_PX**2
    neck = tokens * _NECK_CHANNELS * (width + 9 * _NECK_CHANNELS)
    mlp = 2 * tokens * width * _MLP_RATIO * width
    blocks = 0
    for block in range(shape.depth):
        window = side if block in shape.global_blocks else shape.window
        queries = (-(-side // window) * window) ** 2 if padded else tokens
        projections = queries * width * 4 * width  # queries, keys, values, output
        scores_and_values = 2 * queries * window**2 * width
        relative_position = queries * 2 * window * width
        blocks += projections + scores_and_values + relative_position + mlp
    return 2 * (patches + blocks + neck)


def graph_flop(path: Path, inputs: Mapping[str, NDArray[np.generic]]) -> int | None:
    """Return the operations of one call of a graph, measured by running it; None where an operator hides them.

    Parameters
    ----------
    path : Path
        Any ONNX file.
    inputs : mapping
        Its inputs by name. Where shapes depend on values, so does the result.

    Raises
    ------
    InputFileError
        If the graph cannot be run on the CPU.
    """
    counts = [node_flop(node) for node in trace_nodes(path, inputs)]
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None


def node_flop(node: NodeRun) -> int | None:
    """Return the operations of the products of one operator, 0 for one that has none, None where they are unknown.

    Examples
    --------
    >>> node_flop(NodeRun("MatMul", ((8, 7, 256), (256, 128)), ((8, 7, 128),)))
    3670016
    """
    if node.operator in _UNCOUNTED:
        return None
    if node.operator in ("MatMul", "MatMulInteger", "QLinearMatMul"):
        return 2 * math.prod(node.output_shapes[0]) * node.input_shapes[0][-1]
    if node.operator == "Gemm":
        rows = node.output_shapes[0][0]
        return 2 * math.prod(node.input_shapes[0]) * node.output_shapes[0][1] if rows else 0
    if node.operator in _WEIGHT_INPUT:
        kernel = node.input_shapes[_WEIGHT_INPUT[node.operator]]
        # A kernel meets every output cell of a convolution, and every input cell of a transposed one.
        cells = node.input_shapes[0] if node.operator == "ConvTranspose" else node.output_shapes[0]
        return 2 * math.prod(cells) * math.prod(kernel[1:])
    return 0

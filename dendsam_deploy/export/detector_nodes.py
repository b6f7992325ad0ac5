"""The operators around a foreign detector, in ONNX's text format: tiles to its image, its outputs to the best boxes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import onnx
import onnx.parser
from onnx import TensorProto

if TYPE_CHECKING:
    from dendsam_deploy.export.detector_layouts import DetectorLayout

_MARGIN_GREY = 114  # what YOLO's letterbox puts around an image


@dataclass(frozen=True, slots=True)
class NetworkImage:
    """What a network takes.

    Parameters
    ----------
    height, width : int
        Pixels. A tile is scaled to the shorter of the two; the rest is filled with grey at the right or the bottom.
    channels : int
        All get the same grey values.
    element_type : int
        ONNX's number of the element type.
    white : float
        Value of a pixel of 255.
    """

    height: int
    width: int
    channels: int
    element_type: int
    white: float


def image_from_tiles(image: NetworkImage, tile_size_px: int, tiles: str) -> list[onnx.NodeProto]:
    """Make the nodes from `tiles` (b, S, S), float32 of 0 to 255, to ``image`` (b, c, H, W)."""
    side = min(image.height, image.width)
    steps = [
        f"factor = Constant <value_float: float = {image.white / 255:.9g}> ()",
        f"scaled = Mul ({tiles}, factor)",
        "channel_axis = Constant <value_ints = [1]> ()",
        "grey = Unsqueeze (scaled, channel_axis)",
    ]
    grey = "grey"
    if side != tile_size_px:
        steps += [
            f"network_size = Constant <value_ints = [{side}, {side}]> ()",
            f'resized = Resize <mode = "linear", axes = [2, 3]> ({grey}, , , network_size)',
        ]
        grey = "resized"
    if image.height != image.width:
        steps += [
            f"margins = Constant <value_ints = [0, 0, 0, 0, 0, 0, {image.height - side}, {image.width - side}]> ()",
            f"margin_grey = Constant <value_float: float = {_MARGIN_GREY * image.white / 255:.9g}> ()",
            f"padded = Pad ({grey}, margins, margin_grey)",
        ]
        grey = "padded"
    if image.element_type == TensorProto.UINT8:
        steps.append(f"whole = Round ({grey})")
        grey = "whole"
    steps.append(f"copies = Concat <axis = 1> ({', '.join([grey] * image.channels)})")
    steps.append(f"image = Cast <to = {image.element_type}> (copies)")
    return nodes_from_text("\n".join(steps))


def boxes_from_outputs(
    layout: DetectorLayout, count: int, tile_side: tuple[int, float], names: tuple[str, str]
) -> list[onnx.NodeProto]:
    """Make the nodes from a network's outputs to its best boxes and their scores.

    Parameters
    ----------
    layout : DetectorLayout
        What its outputs ``raw_0``, ``raw_1``, ... mean.
    count : int
        How many boxes to keep; missing ones are zeros.
    tile_side : (int, float)
        Side of the tile, and tile px per px of the network's image.
    names : (str, str)
        Names for the boxes (b, k, 4) and scores (b, k).
    """
    rows = {"dense": _dense_rows, "selected": _selected_rows, "counted": _counted_rows}[layout.kind](layout)
    corners, scores = "corners", "row_scores"
    if layout.rows is None:
        rows += f"""
        images = Shape <start = 0, end = 1> (row_scores)
        spare = Constant <value_ints = [{count}]> ()
        sides = Constant <value_ints = [4]> ()
        spare_scores_shape = Concat <axis = 0> (images, spare)
        spare_corners_shape = Concat <axis = 0> (images, spare, sides)
        spare_scores = ConstantOfShape (spare_scores_shape)
        spare_corners = ConstantOfShape (spare_corners_shape)
        enough_scores = Concat <axis = 1> (row_scores, spare_scores)
        enough_corners = Concat <axis = 1> (corners, spare_corners)
        """
        corners, scores = "enough_corners", "enough_scores"
    return nodes_from_text(
        rows
        + f"""
        best_count = Constant <value_ints = [{count}]> ()
        {names[1]}, best = TopK <axis = 1> ({scores}, best_count)
        side_axis = Constant <value_ints = [2]> ()
        best_rows = Unsqueeze (best, side_axis)
        four_sides = Constant <value_ints = [1, 1, 4]> ()
        best_sides = Expand (best_rows, four_sides)
        best_corners = GatherElements <axis = 1> ({corners}, best_sides)
        to_tile = Constant <value_float: float = {tile_side[1]:.9g}> ()
        in_tile = Mul (best_corners, to_tile)
        lowest = Constant <value_float: float = 0> ()
        highest = Constant <value_float: float = {tile_side[0]}> ()
        {names[0]} = Clip (in_tile, lowest, highest)
        """
    )


def nodes_from_text(text: str) -> list[onnx.NodeProto]:
    """Parse nodes written in ONNX's text format, one to a line."""
    lines = (line.strip() for line in text.splitlines())
    return [onnx.parser.parse_node(line) for line in lines if line]


def _dense_rows(layout: DetectorLayout) -> str:
    """Write the nodes from rows (xc, yc, w, h, [objectness,] class scores) to ``corners`` and ``row_scores``."""
    first = 5 if layout.has_objectness else 4
    order = "[0, 2, 1]" if layout.channels_first else "[0, 1, 2]"
    multiply = """
        at_5 = Constant <value_ints = [5]> ()
        objectness = Slice (rows, at_4, at_5, last_axis)
        lone_objectness = Squeeze (objectness, last_axis)
        row_scores = Mul (class_score, lone_objectness)
        """
    return f"""
        table = Cast <to = {TensorProto.FLOAT}> (raw_0)
        rows = Transpose <perm = {order}> (table)
        last_axis = Constant <value_ints = [2]> ()
        at_0 = Constant <value_ints = [0]> ()
        at_2 = Constant <value_ints = [2]> ()
        at_4 = Constant <value_ints = [4]> ()
        centre = Slice (rows, at_0, at_2, last_axis)
        size = Slice (rows, at_2, at_4, last_axis)
        a_half = Constant <value_float: float = 0.5> ()
        reach = Mul (size, a_half)
        low = Sub (centre, reach)
        high = Add (centre, reach)
        corners = Concat <axis = 2> (low, high)
        first_class = Constant <value_ints = [{first}]> ()
        behind_classes = Constant <value_ints = [{first + layout.classes}]> ()
        classes = Slice (rows, first_class, behind_classes, last_axis)
        class_score = ReduceMax <keepdims = 0> (classes, last_axis)
        {multiply if layout.has_objectness else "row_scores = Identity (class_score)"}
        """


def _selected_rows(layout: DetectorLayout) -> str:
    """Write the nodes from rows (x0, y0, x1, y1, score, class) to ``corners`` and ``row_scores``."""
    return f"""
        table = Cast <to = {TensorProto.FLOAT}> (raw_0)
        at_0 = Constant <value_ints = [0]> ()
        at_4 = Constant <value_ints = [4]> ()
        at_5 = Constant <value_ints = [5]> ()
        last_axis = Constant <value_ints = [2]> ()
        rows = {"Identity (table)" if layout.has_batch else "Unsqueeze (table, at_0)"}
        corners = Slice (rows, at_0, at_4, last_axis)
        score = Slice (rows, at_4, at_5, last_axis)
        row_scores = Squeeze (score, last_axis)
        """


def _counted_rows(_: DetectorLayout) -> str:
    """Write the nodes from a count, boxes and scores to ``corners`` and ``row_scores``, 0 for rows beyond the count."""
    return f"""
        corners = Cast <to = {TensorProto.FLOAT}> (raw_1)
        given_scores = Cast <to = {TensorProto.FLOAT}> (raw_2)
        row_count = Shape <start = 1, end = 2> (given_scores)
        row_limit = Squeeze (row_count)
        first_row = Constant <value_int = 0> ()
        next_row = Constant <value_int = 1> ()
        row = Range (first_row, row_limit, next_row)
        column = Constant <value_ints = [-1, 1]> ()
        whole_count = Cast <to = {TensorProto.INT64}> (raw_0)
        count = Reshape (whole_count, column)
        is_valid = Less (row, count)
        nothing = Constant <value_float: float = 0> ()
        row_scores = Where (is_valid, given_scores, nothing)
        """

"""What the outputs of a detector made elsewhere mean, told from their names, their shapes and the number of classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dendsam_deploy.errors import CheckpointError

Size = int | None
"""Length of an axis; None where it is free."""

LAYOUTS = (
    "[b, 4 + classes, n] (YOLOv8, YOLO11), [b, n, 5 + classes] (YOLOv5, YOLOv6), [b, n, 4 + classes], "
    "[b, n, 6] and [n, 6] (x0, y0, x1, y1, score, class), or num_dets, det_boxes, det_scores, det_classes"
)
_COUNTED = ("num_dets", "det_boxes", "det_scores")
_MOST_SELECTED = 1000


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """Name and shape of one output of a graph."""

    name: str
    shape: tuple[Size, ...]


@dataclass(frozen=True, slots=True)
class DetectorLayout:
    """How boxes and scores lie in a detector's outputs.

    Parameters
    ----------
    kind : str
        ``dense``: one row ``(xc, yc, w, h, scores)`` for each anchor; ``selected``: rows ``(x0, y0, x1, y1, score,
        class)`` of what the graph's own suppression kept; ``counted``: the same as separate tensors with a number of
        valid rows.
    outputs : tuple of str
        The outputs that hold it; for ``counted`` the number, the boxes and the scores.
    rows : int or None
        Rows per image, where fixed.
    channels_first : bool
        Whether a dense row runs along the second axis.
    has_objectness : bool
        Whether a dense row has, before the class scores, a score by which they are multiplied.
    classes : int
        Class scores in a dense row.
    has_batch : bool
        Whether the first axis counts images.
    """

    kind: Literal["dense", "selected", "counted"]
    outputs: tuple[str, ...]
    rows: Size
    channels_first: bool = False
    has_objectness: bool = False
    classes: int = 0
    has_batch: bool = True


def recognise_layout(
    outputs: tuple[OutputTensor, ...], classes: int | None, input_hw: tuple[int, int], source: str
) -> DetectorLayout:
    """Tell the layout of a detector's outputs.

    Parameters
    ----------
    outputs : tuple of OutputTensor
        All outputs of the graph.
    classes : int or None
        Number of classes, where the file records it.
    input_hw : (int, int)
        Height and width of the network's input, px.
    source : str
        The file, for messages.

    Raises
    ------
    CheckpointError
        If no layout fits, or several do; lists what was found.
    """
    by_name = {output.name: output for output in outputs}
    if all(name in by_name for name in _COUNTED):
        return DetectorLayout("counted", _COUNTED, by_name["det_boxes"].shape[1])
    anchors = _anchor_counts(input_hw)
    # Segmentation and YOLOv5 files have further outputs of four and five axes.
    fitting = [
        layout
        for output in outputs
        if len(output.shape) in (2, 3)
        for layout in _table_layouts(output, classes, anchors)
    ]
    if len(fitting) == 1:
        return fitting[0]
    found = ", ".join(f"{output.name} {['?' if n is None else n for n in output.shape]}" for output in outputs)
    known = f"{classes} classes" if classes is not None else "an unrecorded number of classes"
    problem = "fit no known layout" if not fitting else f"fit {len(fitting)} layouts"
    raise CheckpointError(
        f"{source}: its outputs {found} with {known} at {input_hw[0]} x {input_hw[1]} px {problem}; expected {LAYOUTS}"
    )


def _table_layouts(output: OutputTensor, classes: int | None, anchors: frozenset[int]) -> list[DetectorLayout]:
    """Return every layout that one output of two or three axes could have."""
    name, shape = (output.name,), output.shape
    if len(shape) == 2:
        return [DetectorLayout("selected", name, shape[0], has_batch=False)] if shape[1] == 6 else []
    _, second, third = shape
    fitting = []
    if second is not None and _is_row(second, 4, classes) and _may_be_anchors(third, anchors):
        count = classes or second - 4
        fitting.append(DetectorLayout("dense", name, third, channels_first=True, classes=count))
    if third is not None and _may_be_anchors(second, anchors):
        # Without a record of the classes only rows with objectness are written this way round.
        if _is_row(third, 5, classes):
            count = classes or third - 5
            fitting.append(DetectorLayout("dense", name, second, has_objectness=True, classes=count))
        elif classes is not None and _is_row(third, 4, classes):
            fitting.append(DetectorLayout("dense", name, second, classes=classes))
    if third == 6 and second not in anchors and (second is None or second <= _MOST_SELECTED):
        fitting = [fit for fit in fitting if second is None]
        fitting.append(DetectorLayout("selected", name, second))
    return fitting


def _is_row(length: int, before_scores: int, classes: int | None) -> bool:
    """Tell whether an axis can hold a dense row; without a record of the classes, any number up to 200."""
    if classes is not None:
        return length == before_scores + classes
    return before_scores < length <= before_scores + 200


def _may_be_anchors(length: Size, anchors: frozenset[int]) -> bool:
    """Tell whether an axis can count the anchors of the network's input."""
    return length is None or length in anchors


def _anchor_counts(input_hw: tuple[int, int]) -> frozenset[int]:
    """Return how many anchors detectors have on an input: one or three per cell of the grids in use."""
    cells = {stride: (input_hw[0] // stride) * (input_hw[1] // stride) for stride in (4, 8, 16, 32, 64)}
    grids = ((8, 16, 32), (8, 16, 32, 64), (4, 8, 16, 32))
    return frozenset(per_cell * sum(cells[stride] for stride in grid) for grid in grids for per_cell in (1, 3))

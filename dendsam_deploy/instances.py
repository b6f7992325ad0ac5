"""What is found in one slice: detections, masks and labelled instances. Plain numpy records, checked once when made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dendsam_deploy.errors import InvalidArgumentError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dendsam_deploy.geometry import Window


@dataclass(frozen=True, slots=True)
class Detections:
    """Boxes that a detector (or a person) drew on one slice.

    Parameters
    ----------
    boxes_xyxy : ndarray, shape (N, 4), float32
        Corners ``(x0, y0, x1, y1)`` in slice px, pixel edges.
    scores : ndarray, shape (N,), float32
        Confidence between 0 and 1.
    """

    boxes_xyxy: NDArray[np.float32]
    scores: NDArray[np.float32]

    def __post_init__(self) -> None:
        _check_array(self.boxes_xyxy, "boxes_xyxy", np.float32, (None, 4))
        _check_array(self.scores, "scores", np.float32, (len(self.boxes_xyxy),))

    def __len__(self) -> int:
        return len(self.scores)

    @classmethod
    def none(cls) -> Detections:
        """Return no detections at all."""
        return cls(np.zeros((0, 4), np.float32), np.zeros(0, np.float32))

    def take(self, index: NDArray[np.intp] | NDArray[np.bool_]) -> Detections:
        """Return the detections that an index or a boolean selection names, in that order."""
        return Detections(self.boxes_xyxy[index], self.scores[index])


@dataclass(frozen=True, slots=True)
class Masks:
    """Decoded masks of one slice, still at the network's resolution.

    Parameters
    ----------
    logits : tuple of ndarray, each of shape (4 * region, 4 * region), float32
        Mask logits on each box's own region of the S/4 grid; regions differ in size.
    origins_yx : ndarray, shape (N, 2), int64
        First row and column of each region in its tile's S/4 grid.
    tile_index : ndarray, shape (N,), int64
        The tile in whose frame each mask lies.
    predicted_iou : ndarray, shape (N,), float32
        The model's own estimate of each mask's IoU.
    box_index : ndarray, shape (N,), int64
        The box that prompted each mask, ascending. A box that no tile shows whole prompts one mask in each of several.
    """

    logits: tuple[NDArray[np.float32], ...]
    origins_yx: NDArray[np.int64]
    tile_index: NDArray[np.int64]
    predicted_iou: NDArray[np.float32]
    box_index: NDArray[np.int64]

    def __post_init__(self) -> None:
        count = len(self.logits)
        _check_array(self.origins_yx, "origins_yx", np.int64, (count, 2))
        _check_array(self.tile_index, "tile_index", np.int64, (count,))
        _check_array(self.predicted_iou, "predicted_iou", np.float32, (count,))
        _check_array(self.box_index, "box_index", np.int64, (count,))

    def __len__(self) -> int:
        return len(self.logits)


@dataclass(frozen=True, slots=True)
class RunLengths:
    """A mask as runs of foreground pixels, row by row, inside a window of its slice.

    Parameters
    ----------
    window : Window
        Bounding window of the mask, slice px.
    runs : ndarray, shape (R, 3), int32
        ``(row, first column, length)`` relative to the window, sorted.
    """

    window: Window
    runs: NDArray[np.int32]

    def __post_init__(self) -> None:
        _check_array(self.runs, "runs", np.int32, (None, 3))

    @property
    def area_px(self) -> int:
        """Number of foreground pixels."""
        return int(self.runs[:, 2].sum(dtype=np.int64))

    @classmethod
    def from_mask(cls, mask: NDArray[np.bool_], window: Window) -> RunLengths:
        """Encode a boolean mask of the window's shape."""
        if mask.shape != (window.height, window.width):
            raise InvalidArgumentError(f"a mask of shape {mask.shape} does not fill {window}")
        padded = np.zeros((mask.shape[0], mask.shape[1] + 2), np.int8)
        padded[:, 1:-1] = mask
        edges = np.diff(padded, axis=1)
        rows, starts = np.nonzero(edges == 1)
        _, ends = np.nonzero(edges == -1)
        return cls(window, np.stack([rows, starts, ends - starts], axis=1).astype(np.int32))

    def to_mask(self) -> NDArray[np.bool_]:
        """Decode to a boolean mask of the window's shape."""
        mask = np.zeros((self.window.height, self.window.width), bool)
        for row, start, length in self.runs:
            mask[row, start : start + length] = True
        return mask


@dataclass(frozen=True, slots=True)
class Instances:
    """The labelled objects of one slice after painting; row ``i`` describes label ``ids[i]``.

    Parameters
    ----------
    ids : ndarray, shape (N,), uint32
        Labels in the slice, ascending, from 1.
    boxes_xyxy : ndarray, shape (N, 4), float32
        The boxes that prompted the masks, slice px.
    scores : ndarray, shape (N,), float32
        Detection scores.
    predicted_iou : ndarray, shape (N,), float32
        Predicted IoU of the masks.
    areas_px : ndarray, shape (N,), int64
        Painted area, slice px.
    run_lengths : tuple of RunLengths
        The painted pixels.
    """

    ids: NDArray[np.uint32]
    boxes_xyxy: NDArray[np.float32]
    scores: NDArray[np.float32]
    predicted_iou: NDArray[np.float32]
    areas_px: NDArray[np.int64]
    run_lengths: tuple[RunLengths, ...]

    def __post_init__(self) -> None:
        count = len(self.run_lengths)
        _check_array(self.ids, "ids", np.uint32, (count,))
        _check_array(self.boxes_xyxy, "boxes_xyxy", np.float32, (count, 4))
        _check_array(self.scores, "scores", np.float32, (count,))
        _check_array(self.predicted_iou, "predicted_iou", np.float32, (count,))
        _check_array(self.areas_px, "areas_px", np.int64, (count,))

    def __len__(self) -> int:
        return len(self.run_lengths)


_BOXES_COMPARED_AT_ONCE = 128
"""Bounds the memory of the suppression; comparing box by box takes many times longer."""


def box_iou(first_xyxy: NDArray[np.float32], second_xyxy: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the intersection over union of every pair of two sets of boxes.

    Parameters
    ----------
    first_xyxy, second_xyxy : ndarray, shapes (N, 4) and (M, 4)
        Boxes in a common frame.

    Returns
    -------
    ndarray, shape (N, M), float32
        Zero for a pair without area in its union.
    """
    a, b = first_xyxy.astype(np.float64)[:, None], second_xyxy.astype(np.float64)[None]
    width = np.clip(np.minimum(a[..., 2], b[..., 2]) - np.maximum(a[..., 0], b[..., 0]), 0, None)
    height = np.clip(np.minimum(a[..., 3], b[..., 3]) - np.maximum(a[..., 1], b[..., 1]), 0, None)
    intersection = width * height
    union = box_area(first_xyxy)[:, None] + box_area(second_xyxy)[None] - intersection
    ratio: NDArray[np.float64] = np.divide(intersection, union, out=np.zeros_like(intersection), where=union > 0)
    return ratio.astype(np.float32)


def box_area(boxes_xyxy: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the areas of boxes ``(N, 4)`` in the square of their unit; inverted boxes have none."""
    sides = np.clip(boxes_xyxy[:, 2:].astype(np.float64) - boxes_xyxy[:, :2], 0, None)
    area: NDArray[np.float64] = sides[:, 0] * sides[:, 1]
    return area


def suppress_duplicates(detections: Detections, iou_limit: float) -> NDArray[np.intp]:
    """Run the canonical non-maximum suppression of a slice.

    Boxes are taken in the order ``(-score, y0, x0, y1, x1)``; each one that overlaps an already kept box by more than
    `iou_limit` is dropped. The order is total but for identical boxes, so the result does not depend on the order of
    the input.

    Parameters
    ----------
    detections : Detections
        Boxes of all tiles of one slice.
    iou_limit : float
        Largest IoU that two kept boxes may have.

    Returns
    -------
    ndarray of intp
        Indices of the kept detections in canonical order.
    """
    boxes = detections.boxes_xyxy
    order = np.lexsort((boxes[:, 2], boxes[:, 3], boxes[:, 0], boxes[:, 1], -detections.scores))
    ranked = boxes[order]
    alive = np.ones(len(order), bool)
    for start in range(0, len(order), _BOXES_COMPARED_AT_ONCE):
        some = ranked[start : start + _BOXES_COMPARED_AT_ONCE]
        distinct = box_iou(some, ranked[start:]) <= iou_limit
        for row in range(len(some)):
            if alive[start + row]:
                alive[start + row + 1 :] &= distinct[row, row + 1 :]
    return order[alive]


def _check_array(array: NDArray[np.generic], name: str, dtype: type[np.generic], shape: tuple[int | None, ...]) -> None:
    """Raise unless an array has exactly the given dtype and shape (None = any length)."""
    fits = array.ndim == len(shape) and all(
        want is None or have == want for have, want in zip(array.shape, shape, strict=False)
    )
    if array.dtype != dtype or not fits:
        expected = f"{np.dtype(dtype).name}{tuple('any' if n is None else n for n in shape)}"
        raise InvalidArgumentError(f"{name} is {array.dtype}{array.shape}, expected {expected}")

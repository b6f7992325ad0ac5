"""Prompts of one training step: drawn from the truth at first, then where the prediction is wrong."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from scipy import ndimage

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

NEGATIVE_MARGIN_PX = 3
"""How far around an object's box a negative point is looked for where nothing is wrongly predicted."""


class Corrections(NamedTuple):
    """Two further points for each of n objects: `points_xy` (n, 2, 2), tile px, labelled `labels` (n, 2), 1 then 0."""

    points_xy: NDArray[np.float32]
    labels: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class PromptSet:
    """What n objects are prompted with.

    Parameters
    ----------
    points_xy : Tensor, shape (n, k, 2), float32, or None
        Points in tile px; a pixel is named by its index, SAM adds the half pixel to its centre itself.
    labels : Tensor, shape (n, k), int64, or None
        1 for a point in the object, 0 for one beside it.
    boxes_xyxy : Tensor, shape (n, 4), float32, or None
        Boxes in tile px.
    masks : Tensor, shape (n, 1, S/4, S/4), float32, or None
        Mask logits of an earlier prediction.
    """

    points_xy: Tensor | None = None
    labels: Tensor | None = None
    boxes_xyxy: Tensor | None = None
    masks: Tensor | None = None

    def take(self, rows: Tensor) -> PromptSet:
        """Return the prompts of some of the objects, in the order of `rows`, without their masks."""
        picked = (None if part is None else part[rows] for part in (self.points_xy, self.labels, self.boxes_xyxy))
        return PromptSet(*picked)

    def corrected(self, points_xy: Tensor, labels: Tensor) -> PromptSet:
        """Return these prompts and further points ``(n, k, 2)`` with their labels ``(n, k)``."""
        if self.points_xy is None or self.labels is None:
            return PromptSet(points_xy, labels, self.boxes_xyxy)
        return PromptSet(
            torch.cat([self.points_xy, points_xy], 1), torch.cat([self.labels, labels], 1), self.boxes_xyxy
        )


def random_points(
    objects: NDArray[np.int32],
    numbers: NDArray[np.int64],
    boxes_xyxy: NDArray[np.float32],
    rng: np.random.Generator,
    thickest_fraction: float = 0.5,
) -> NDArray[np.float32]:
    """Draw one pixel ``(x, y)`` of each object, ``(N, 2)``.

    A pixel is named by its index, as in SAM's point prompts, which add the half pixel to its centre themselves.

    Parameters
    ----------
    objects : ndarray, shape (S, S), int32
        Numbered objects of a tile.
    numbers : ndarray, shape (N,)
        The objects to point at.
    boxes_xyxy : ndarray, shape (N, 4)
        Their tight boxes, tile px.
    rng : numpy.random.Generator
        Source of all choices.
    thickest_fraction : float
        Part of the points that lie where the object is thickest; all pixels are equally likely for the others.
    """
    points = np.zeros((len(numbers), 2), np.float32)
    for row, (number, box) in enumerate(zip(numbers, boxes_xyxy.astype(int), strict=True)):
        x0, y0, x1, y1 = box
        inside = objects[y0:y1, x0:x1] == number
        if rng.random() < thickest_fraction:
            y, x = thickest_pixel(inside)
        else:
            y, x = np.argwhere(inside)[rng.integers(inside.sum())]
        points[row] = x0 + x, y0 + y
    return points


def thickest_pixel(inside: NDArray[np.bool_]) -> tuple[int, int]:
    """Return the pixel ``(y, x)`` of a mask ``(h, w)`` that lies farthest from what is not in it."""
    depth = ndimage.distance_transform_edt(np.pad(inside, 1))[1:-1, 1:-1]
    y, x = np.unravel_index(int(depth.argmax()), depth.shape)
    return int(y), int(x)


def corrective_points(
    truth: NDArray[np.bool_],
    predicted: NDArray[np.bool_],
    sizes_hw: NDArray[np.int64],
    rng: np.random.Generator,
) -> Corrections:
    """Draw two points for each object, one positive and one negative, where its mask is wrong.

    The positive point is a pixel of the object that was missed; where none was missed, one that was found. The negative
    point is a pixel that was taken for the object; where there is none, one beside the object within
    `NEGATIVE_MARGIN_PX` of its box, and at last any pixel beside it.

    Parameters
    ----------
    truth, predicted : ndarray, shape (n, S, S), bool
        Objects, each with at least one pixel, and their masks.
    sizes_hw : ndarray, shape (n, 2)
        Valid height and width of the tile that each object lies on; there are no points in the padding.
    rng : numpy.random.Generator
        Source of all choices.

    References
    ----------
    Kirillov et al. 2023, "Segment Anything", arXiv:2304.02643, appendix A (interactive training), as
    micro-sam trains it: Archit et al. 2025, doi:10.1038/s41592-024-02580-4.
    """
    points = np.zeros((len(truth), 2, 2), np.float32)
    for row, (true, mask, (height, width)) in enumerate(zip(truth, predicted, sizes_hw, strict=True)):
        true, mask = true[:height, :width], mask[:height, :width]  # noqa: PLW2901 - the valid part is all that counts
        points[row, 0] = _random_pixel(rng, true & ~mask, true)
        points[row, 1] = _random_pixel(rng, mask & ~true, _around(true) & ~true, ~true, true)
    return Corrections(points, np.tile(np.array([1, 0], np.int64), (len(truth), 1)))


def _around(true: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return the box of an object, grown by `NEGATIVE_MARGIN_PX`, as a mask."""
    box = np.zeros_like(true)
    rows, columns = np.nonzero(true.any(1))[0], np.nonzero(true.any(0))[0]
    margin = NEGATIVE_MARGIN_PX
    first_y, first_x = max(rows[0] - margin, 0), max(columns[0] - margin, 0)
    box[first_y : rows[-1] + 1 + margin, first_x : columns[-1] + 1 + margin] = True
    return box


def _random_pixel(rng: np.random.Generator, *regions: NDArray[np.bool_]) -> tuple[int, int]:
    """Return a random pixel ``(x, y)`` of the first region that has one."""
    for region in regions:
        places = np.flatnonzero(region)
        if len(places):
            y, x = divmod(int(places[rng.integers(len(places))]), region.shape[1])
            return x, y
    raise ValueError("an object without a pixel has no point")

"""Mask logits from the network's S/4 grid to the pixels of the slice, each inside its own small window."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dendsam_deploy.geometry import LOGIT_STRIDE_PX, Window, bilinear_matrix

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dendsam_deploy.instances import Masks
    from dendsam_deploy.pipeline.prepare import TilePlan


@dataclass(frozen=True, slots=True)
class LogitWindow:
    """The logits of one mask at full resolution.

    Parameters
    ----------
    window : Window
        Where they lie, slice px.
    logits : ndarray, shape (window.height, window.width), float32
        Interpolated logits. Outside the window the mask has no foreground.
    """

    window: Window
    logits: NDArray[np.float32]


def upsample_mask(masks: Masks, index: int, plan: TilePlan, mask_logit: float) -> LogitWindow:
    """Interpolate one mask's logits wherever they can exceed a threshold.

    Interpolation is bilinear between cell centres, without antialiasing; at zoom 1 it equals
    ``torch.nn.functional.interpolate(mode="bilinear", align_corners=False)`` of the whole S/4 grid, cut to the window.
    Beyond the outermost cell centres of a region its neighbours are unknown, so nothing is said there, unless the tile
    ends.

    Parameters
    ----------
    masks : Masks
        Decoded masks of a slice.
    index : int
        Which of them.
    plan : TilePlan
        How the slice was cut.
    mask_logit : float
        The threshold.
    """
    tile = plan.tiles[int(masks.tile_index[index])].read
    logits = masks.logits[index]
    origin_y, origin_x = masks.origins_yx[index].tolist()
    above = logits > mask_logit
    if not above.any():
        return LogitWindow(Window(0, 0, 0, 0), np.zeros((0, 0), np.float32))
    rows = _Axis.around(np.any(above, axis=1), origin_y, plan.tile_size_px // LOGIT_STRIDE_PX)
    columns = _Axis.around(np.any(above, axis=0), origin_x, plan.tile_size_px // LOGIT_STRIDE_PX)

    scale_y, scale_x = plan.frame.scale_yx
    height, width = plan.frame.slice_hw
    y0, y1 = rows.pixels(tile.y0, scale_y, height)
    x0, x1 = columns.pixels(tile.x0, scale_x, width)
    vertical = rows.matrix(tile.y0, scale_y, y0, y1)
    horizontal = columns.matrix(tile.x0, scale_x, x0, x1)
    cells = logits[rows.cells(origin_y), columns.cells(origin_x)]
    fine = vertical @ cells @ horizontal.T
    return LogitWindow(Window(y0, x0, y1 - y0, x1 - x0), fine.astype(np.float32, copy=False))


@dataclass(frozen=True, slots=True)
class _Axis:
    """Cells ``first ... last - 1`` of one axis of a tile's S/4 grid of `length` cells."""

    first: int
    last: int
    length: int

    @classmethod
    def around(cls, above: NDArray[np.bool_], origin: int, length: int) -> _Axis:
        """Return the cells above the threshold and one more on each side, towards which they are interpolated."""
        (hits,) = np.nonzero(above)
        first, last = max(int(hits[0]) - 1, 0), min(int(hits[-1]) + 2, len(above))
        return cls(origin + first, origin + last, length)

    def cells(self, origin: int) -> slice:
        """Return the cells as an index into a region that begins at cell `origin`."""
        return slice(self.first - origin, self.last - origin)

    def pixels(self, tile_start: int, scale: float, limit: int) -> tuple[int, int]:
        """Return the half-open range of slice px whose centres lie between the outermost known cell centres.

        `tile_start` is the tile's first model px, `scale` model px per slice px, `limit` the length of the slice.
        """
        start = self.first * LOGIT_STRIDE_PX + (LOGIT_STRIDE_PX / 2 if self.first > 0 else 0)
        stop = self.last * LOGIT_STRIDE_PX - (LOGIT_STRIDE_PX / 2 if self.last < self.length else 0)
        first, last = (math.ceil((tile_start + edge) / scale - 0.5) for edge in (start, stop))
        return min(max(first, 0), limit), min(max(last, first, 0), limit)

    def matrix(self, tile_start: int, scale: float, first: int, last: int) -> NDArray[np.float32]:
        """Return the matrix that samples the cells at the centres of slice px ``first ... last - 1``."""
        centres = (np.arange(first, last, dtype=np.float64) + 0.5) * scale - tile_start
        return bilinear_matrix(self.last - self.first, centres, self.first * LOGIT_STRIDE_PX, LOGIT_STRIDE_PX)

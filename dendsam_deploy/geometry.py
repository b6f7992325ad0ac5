"""Frames, windows and tiles: the only place where coordinates are converted.

Four frames exist. *Slice px* is the frame of the file on disk. *Model px* is the slice resampled to the pixel size at
which the model was trained. *Tile px* is model px relative to a tile's corner; a tile is exactly as large as the
model's input, so one tile px is one pixel of the network. *Grid cells* are the network's own lattices: embeddings
have one cell per 16 tile px, mask logits one per 4.

Coordinates are continuous and refer to pixel *edges*: pixel ``i`` covers ``[i, i + 1)`` and its centre lies at ``i +
0.5``. A box that just encloses the pixels ``x0 ... x1`` is ``(x0, x1 + 1)``. Scaling a coordinate is therefore a
plain multiplication, without half-pixel terms.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from dendsam_deploy.errors import InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

EMBEDDING_STRIDE_PX = 16
"""Tile pixels per cell of the embedding (the patch size of SAM's image encoder)."""

LOGIT_STRIDE_PX = 4
"""Tile pixels per cell of the low-resolution mask logits (SAM upsamples its embedding four times)."""

DEFAULT_OVERLAP_PX = 128
"""Objects up to this wide, nearly three times the typical one, are seen whole by some tile."""


@dataclass(frozen=True, slots=True)
class Window:
    """A half-open rectangle of pixels, ``[y0, y0 + height) x [x0, x0 + width)``."""

    y0: int
    x0: int
    height: int
    width: int

    def __post_init__(self) -> None:
        if self.height < 0 or self.width < 0:
            raise InvalidArgumentError(f"a window cannot have the size {self.height} x {self.width} px")

    @property
    def y1(self) -> int:
        """First row below the window."""
        return self.y0 + self.height

    @property
    def x1(self) -> int:
        """First column right of the window."""
        return self.x0 + self.width

    @property
    def slices(self) -> tuple[slice, slice]:
        """The window as an index into a ``(Y, X)`` array."""
        return slice(self.y0, self.y1), slice(self.x0, self.x1)

    def clipped(self, shape_hw: tuple[int, int]) -> Window:
        """Return the part of the window that lies inside an image of the given shape."""
        y0, x0 = min(max(self.y0, 0), shape_hw[0]), min(max(self.x0, 0), shape_hw[1])
        y1, x1 = min(max(self.y1, y0), shape_hw[0]), min(max(self.x1, x0), shape_hw[1])
        return Window(y0, x0, y1 - y0, x1 - x0)


@dataclass(frozen=True, slots=True)
class Tile:
    """What a model sees of a slice (``read``) and what it answers for (``own``), both in model px.

    The ``own`` windows of a slice partition it, so exactly one tile owns the centre of each object.
    """

    read: Window
    own: Window

    def owns(self, boxes_xyxy: NDArray[np.float32]) -> NDArray[np.bool_]:
        """Tell which boxes, ``(N, 4)`` in model px, have their centre in this tile's own window."""
        centre_x = (boxes_xyxy[:, 0] + boxes_xyxy[:, 2]) / 2
        centre_y = (boxes_xyxy[:, 1] + boxes_xyxy[:, 3]) / 2
        own = self.own
        inside: NDArray[np.bool_] = (
            (centre_x >= own.x0) & (centre_x < own.x1) & (centre_y >= own.y0) & (centre_y < own.y1)
        )
        return inside


def tile_grid(shape_hw: tuple[int, int], tile_size_px: int, overlap_px: int) -> list[Tile]:
    """Cut a slice into equally large tiles that overlap, in row-major order.

    Tiles are spread evenly: the last one ends at the slice's border instead of hanging over it, and neighbours share at
    least `overlap_px` pixels. Each overlap is divided in its middle between the two tiles that share it.

    Parameters
    ----------
    shape_hw : (int, int)
        Shape of the slice in model px.
    tile_size_px : int
        Side of the square tiles. A slice smaller than that gets one tile with a smaller ``read`` window.
    overlap_px : int
        Least overlap of neighbouring tiles; at least the size of the largest object, if each object is to be seen
        whole.

    Returns
    -------
    list of Tile
        Their ``own`` windows partition the slice.
    """
    if not 0 <= overlap_px < tile_size_px:
        raise InvalidArgumentError(
            f"an overlap of {overlap_px} px does not fit tiles of {tile_size_px} px; choose 0 to {tile_size_px - 1}"
        )
    rows, columns = (_axis_cuts(length, tile_size_px, overlap_px) for length in shape_hw)
    return [
        Tile(
            read=Window(y.read0, x.read0, y.read1 - y.read0, x.read1 - x.read0),
            own=Window(y.own0, x.own0, y.own1 - y.own0, x.own1 - x.own0),
        )
        for y in rows
        for x in columns
    ]


def default_overlap_px(tile_size_px: int) -> int:
    """Return the overlap of tiles where nobody asks for another: `DEFAULT_OVERLAP_PX`, or a third of a small tile."""
    return min(DEFAULT_OVERLAP_PX, tile_size_px // 3)


@dataclass(frozen=True, slots=True)
class _Cut:
    """One tile along one axis."""

    read0: int
    read1: int
    own0: int
    own1: int


def _axis_cuts(length: int, size: int, overlap: int) -> list[_Cut]:
    """Cut one axis; see `tile_grid`."""
    if length <= size:
        return [_Cut(0, length, 0, length)]
    count = math.ceil((length - overlap) / (size - overlap))
    starts = [round(index * (length - size) / (count - 1)) for index in range(count)]
    borders = [0, *((left + size + right) // 2 for left, right in pairwise(starts)), length]
    return [_Cut(start, start + size, borders[i], borders[i + 1]) for i, start in enumerate(starts)]


@dataclass(frozen=True, slots=True)
class Frame:
    """The relation between a slice on disk and the same slice in the model's pixels.

    Parameters
    ----------
    slice_hw : (int, int)
        Shape on disk, slice px.
    model_hw : (int, int)
        Shape after resampling, model px. The scale of an axis is the exact ratio of the two, so that the borders
        coincide.
    """

    slice_hw: tuple[int, int]
    model_hw: tuple[int, int]

    @classmethod
    def from_zoom(cls, slice_hw: tuple[int, int], zoom_yx: tuple[float, float]) -> Frame:
        """Build the frame in which `zoom_yx` model px cover one slice px, rounded to whole pixels."""
        if not all(math.isfinite(zoom) and zoom > 0 for zoom in zoom_yx):
            raise InvalidArgumentError(f"the zoom must be positive and finite, not {zoom_yx}")
        height, width = (max(1, round(length * zoom)) for length, zoom in zip(slice_hw, zoom_yx, strict=True))
        return cls(slice_hw, (height, width))

    @property
    def scale_yx(self) -> tuple[float, float]:
        """Model px per slice px."""
        return self.model_hw[0] / self.slice_hw[0], self.model_hw[1] / self.slice_hw[1]

    @property
    def is_identity(self) -> bool:
        """Whether nothing has to be resampled."""
        return self.slice_hw == self.model_hw

    def boxes_to_model(self, boxes_xyxy: NDArray[np.float32]) -> NDArray[np.float32]:
        """Convert boxes ``(N, 4)`` from slice px to model px."""
        scale_y, scale_x = self.scale_yx
        return boxes_xyxy * np.array([scale_x, scale_y, scale_x, scale_y], np.float32)

    def boxes_to_slice(self, boxes_xyxy: NDArray[np.float32]) -> NDArray[np.float32]:
        """Convert boxes ``(N, 4)`` from model px to slice px."""
        scale_y, scale_x = self.scale_yx
        boxes: NDArray[np.float32] = np.divide(boxes_xyxy, np.array([scale_x, scale_y, scale_x, scale_y], np.float32))
        return boxes

    def window_to_slice(self, window: Window) -> Window:
        """Return the smallest window of whole slice px that covers a window of model px."""
        scale_y, scale_x = self.scale_yx
        y0, x0 = math.floor(window.y0 / scale_y + 1e-6), math.floor(window.x0 / scale_x + 1e-6)
        y1, x1 = math.ceil(window.y1 / scale_y - 1e-6), math.ceil(window.x1 / scale_x - 1e-6)
        return Window(y0, x0, y1 - y0, x1 - x0).clipped(self.slice_hw)


def choose_zoom(
    slice_hw: tuple[int, int],
    voxel_size_nm: tuple[float, float, float] | None,
    model_pixel_size_nm: float | None,
    trained_zoom: float | None,
    tile_size_px: int,
) -> tuple[float, float]:
    """Decide by how much a slice is enlarged (> 1) or reduced (< 1) before a model sees it.

    Where the pixel sizes of both the volume and the model are recorded, their ratio decides. Otherwise the zoom at
    which the model was trained is used. A model that records neither gets SAM's own rule for small images: a slice
    that is smaller than one tile is enlarged until its longer side fills the tile; larger slices stay as they are.

    Parameters
    ----------
    slice_hw : (int, int)
        Shape of the slice, slice px.
    voxel_size_nm : (float, float, float) or None
        Voxel size ``(z, y, x)`` of the volume; None where it is not recorded.
    model_pixel_size_nm : float or None
        Size of a pixel as the model saw it in training.
    trained_zoom : float or None
        Zoom used in training.
    tile_size_px : int
        Side of the model's input.

    Returns
    -------
    (float, float)
        Zoom along y and x.
    """
    if voxel_size_nm is not None and model_pixel_size_nm is not None:
        return voxel_size_nm[1] / model_pixel_size_nm, voxel_size_nm[2] / model_pixel_size_nm
    if trained_zoom is not None:
        return trained_zoom, trained_zoom
    fill = max(1.0, tile_size_px / max(slice_hw))
    return fill, fill


def bilinear_matrix(
    source_length: int, target_centres: NDArray[np.float64], source_origin: float, source_step: float
) -> NDArray[np.float32]:
    """Return the matrix that samples a regularly spaced signal at given positions by linear interpolation.

    Cell ``i`` of the signal is centred at ``source_origin + (i + 0.5) * source_step``. Positions beyond the outermost
    centres take the outermost value, as in ``torch.nn.functional.interpolate(mode="bilinear", align_corners=False)``,
    to which this is equal along one axis.

    Parameters
    ----------
    source_length : int
        Number of cells of the signal.
    target_centres : ndarray, shape (M,)
        Where to sample, in the frame of `source_origin` and `source_step`.
    source_origin, source_step : float
        Left edge of the first cell and width of a cell.

    Returns
    -------
    ndarray, shape (M, source_length), float32
        Rows sum to one; at most two entries of a row differ from zero.
    """
    position = np.clip((target_centres - source_origin) / source_step - 0.5, 0.0, source_length - 1.0)
    lower = np.minimum(position.astype(np.int64), max(source_length - 2, 0))
    weight = (position - lower).astype(np.float32)
    matrix = np.zeros((len(position), source_length), np.float32)
    rows = np.arange(len(position))
    matrix[rows, lower] = 1.0 - weight
    if source_length > 1:
        matrix[rows, lower + 1] = weight
    return matrix


def region_cells(box_xyxy: Sequence[float], margin_px: float, region_sizes: Sequence[int]) -> int:
    """Choose the smallest decoder region, in embedding cells, that holds a box and its margin.

    Parameters
    ----------
    box_xyxy : sequence of 4 floats
        Box in tile px.
    margin_px : float
        Margin wanted on every side, tile px.
    region_sizes : sequence of int
        Sides on offer, ascending; the last one is the whole grid.
    """
    longest_px = max(box_xyxy[2] - box_xyxy[0], box_xyxy[3] - box_xyxy[1]) + 2 * margin_px
    # The region's corner is rounded to a whole cell, which can cost half a cell on either side.
    needed = math.ceil(longest_px / EMBEDDING_STRIDE_PX) + 1
    return next((size for size in region_sizes if size >= needed), region_sizes[-1])


def region_origins(boxes_xyxy: NDArray[np.float32], region: int, cells: int) -> NDArray[np.int64]:
    """Place the decoder's regions: each centred on its box, rounded to whole embedding cells, moved into the grid.

    Parameters
    ----------
    boxes_xyxy : ndarray, shape (N, 4), float32
        Boxes in tile px.
    region : int
        Side of the regions in embedding cells.
    cells : int
        Side of the grid in embedding cells.

    Returns
    -------
    ndarray, shape (N, 2), int64
        First row and column of each region in the tile's S/4 grid of mask logits.
    """
    centre_yx = (boxes_xyxy[:, [1, 0]] + boxes_xyxy[:, [3, 2]]) / np.float32(2 * EMBEDDING_STRIDE_PX)
    first = np.floor(centre_yx - np.float32(region / 2) + np.float32(0.5)).astype(np.int64)
    origins: NDArray[np.int64] = np.clip(first, 0, cells - region) * (EMBEDDING_STRIDE_PX // LOGIT_STRIDE_PX)
    return origins


def cut_regions(logits: NDArray[np.float32], origins_yx: NDArray[np.int64], region: int) -> NDArray[np.float32]:
    """Cut regions of `region` embedding cells out of whole masks.

    Parameters
    ----------
    logits : ndarray, shape (N, S/4, S/4)
        Mask logits on the whole grid.
    origins_yx : ndarray, shape (N, 2), int64
        First row and column of each region in that grid.
    region : int
        Side of the regions in embedding cells.

    Returns
    -------
    ndarray, shape (N, 4 * region, 4 * region)
    """
    side = region * EMBEDDING_STRIDE_PX // LOGIT_STRIDE_PX
    cut = np.zeros((len(logits), side, side), logits.dtype)
    for index, (y, x) in enumerate(origins_yx.tolist()):
        cut[index] = logits[index, y : y + side, x : x + side]
    return cut

"""From a slice as it lies on disk to the tiles that the graphs take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dendsam_deploy.errors import InvalidArgumentError
from dendsam_deploy.geometry import Frame, Tile, choose_zoom, tile_grid
from dendsam_deploy.volume.raster import resize_bilinear

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dendsam_deploy.bundle.manifest import Preprocessing
    from dendsam_deploy.runtimes.runner import Tensor

LARGEST_ZOOM = 16.0
"""A slice is never enlarged or reduced by more: such a ratio comes from a wrong voxel size."""


@dataclass(frozen=True, slots=True)
class TilePlan:
    """How every slice of a volume is resampled and cut.

    Parameters
    ----------
    frame : Frame
        Relation between slice px and model px.
    tiles : tuple of Tile
        The tiles, in model px.
    tile_size_px : int
        Side of the model's square input; tiles of smaller slices are padded with zeros at the right and at the bottom.
    """

    frame: Frame
    tiles: tuple[Tile, ...]
    tile_size_px: int

    def owners(self, boxes_xyxy: NDArray[np.float32]) -> NDArray[np.int64]:
        """Return for each box ``(N, 4)`` in slice px, whose centre lies in the slice, the tile that owns it."""
        boxes = self.frame.boxes_to_model(boxes_xyxy)
        owned = np.stack([tile.owns(boxes) for tile in self.tiles])
        owner: NDArray[np.int64] = owned.argmax(axis=0).astype(np.int64)
        return owner

    def views(self, boxes_xyxy: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return which tiles are to look at which boxes.

        A box belongs to the tile that owns its centre. One that this tile does not see whole goes to every tile whose
        own window it meets, since these windows cover the slice and each tile sees some way beyond its own.

        Parameters
        ----------
        boxes_xyxy : ndarray, shape (N, 4)
            Boxes inside the slice, slice px.

        Returns
        -------
        box_index, tile_index : ndarray, shape (M,), int64
            Pairs, ordered by box; every box occurs at least once.
        """
        boxes = self.frame.boxes_to_model(boxes_xyxy)
        owners = self.owners(boxes_xyxy)
        own = np.array([(t.own.x0, t.own.y0, t.own.x1, t.own.y1) for t in self.tiles], np.float32)
        read = np.array([(t.read.x0, t.read.y0, t.read.x1, t.read.y1) for t in self.tiles], np.float32)[owners]
        beyond = np.concatenate([read[:, :2] - boxes[:, :2], boxes[:, 2:] - read[:, 2:]], axis=1).max(axis=1, initial=0)
        least = np.maximum(boxes[:, None, :2], own[:, :2])
        most = np.minimum(boxes[:, None, 2:], own[:, 2:])
        shown = (most > least).all(axis=2) & (beyond > 1)[:, None]  # what hangs over by a pixel is rounding
        shown[np.arange(len(boxes)), owners] = True
        box_index, tile_index = np.nonzero(shown)
        return box_index.astype(np.int64), tile_index.astype(np.int64)


def plan_tiles(
    slice_hw: tuple[int, int],
    preprocessing: Preprocessing,
    voxel_size_nm: tuple[float, float, float] | None,
    zoom: float | None,
) -> TilePlan:
    """Decide how the slices of a volume are resampled and cut.

    Parameters
    ----------
    slice_hw : (int, int)
        Shape of the slices, slice px.
    preprocessing : Preprocessing
        What the bundle's model was trained on.
    voxel_size_nm : (float, float, float) or None
        Voxel size ``(z, y, x)`` of the volume, where it is known.
    zoom : float or None
        Model px per slice px, if it is to be something else than `geometry.choose_zoom` says.

    Raises
    ------
    InvalidArgumentError
        Where the zoom is beyond `LARGEST_ZOOM`.
    """
    tile_size = preprocessing.tile_size_px
    model_nm = preprocessing.model_pixel_size_nm
    zoom_yx = (
        (zoom, zoom)
        if zoom is not None
        else choose_zoom(slice_hw, voxel_size_nm, model_nm, preprocessing.zoom, tile_size)
    )
    # A tiny slice may be enlarged to fill a tile whatever that takes.
    limit = max(LARGEST_ZOOM, tile_size / max(slice_hw))
    if not all(1 / LARGEST_ZOOM <= value <= limit for value in zoom_yx):
        raise InvalidArgumentError(
            f"slices would be scaled by {zoom_yx[0]:.4g} x {zoom_yx[1]:.4g} (voxel size {voxel_size_nm} nm, model "
            f"pixel {model_nm} nm), expected 1/{LARGEST_ZOOM:g} to {LARGEST_ZOOM:g}; set the voxel size or the zoom"
        )
    frame = Frame.from_zoom(slice_hw, zoom_yx)
    return TilePlan(frame, tuple(tile_grid(frame.model_hw, tile_size, preprocessing.overlap_px)), tile_size)


@dataclass(frozen=True, slots=True)
class PreparedSlice:
    """A slice in the model's pixels, cut into tiles once for all graphs.

    Parameters
    ----------
    plan : TilePlan
        How it is cut.
    tiles : ndarray or Resident, shape (T, S, S), uint8
        Intensities, zero where a tile is padded.
    sizes : ndarray, shape (T, 2), int64
        Height and width of the part of each tile that is not padding.
    """

    plan: TilePlan
    tiles: Tensor
    sizes: NDArray[np.int64]

    def tile_inputs(self, first: int, count: int = 1) -> dict[str, Tensor]:
        """Return the inputs ``tiles`` and ``sizes`` of consecutive tiles, as views."""
        rows = slice(first, first + count)
        return {"tiles": self.tiles[rows], "sizes": self.sizes[rows]}


def prepare_slice(image_u8: NDArray[np.uint8], plan: TilePlan) -> PreparedSlice:
    """Resample a slice ``(Y, X)`` to the model's pixels and cut it into tiles."""
    if image_u8.dtype != np.uint8 or image_u8.shape != plan.frame.slice_hw:
        raise InvalidArgumentError(
            f"the slice is {image_u8.dtype}{image_u8.shape}, expected uint8{plan.frame.slice_hw}; convert it first"
        )
    pixels = image_u8 if plan.frame.is_identity else resize_bilinear(image_u8, plan.frame.model_hw)
    size = plan.tile_size_px
    tiles = np.zeros((len(plan.tiles), size, size), np.uint8)
    for room, tile in zip(tiles, plan.tiles, strict=True):
        room[: tile.read.height, : tile.read.width] = pixels[tile.read.slices]
    sizes = np.array([(tile.read.height, tile.read.width) for tile in plan.tiles], np.int64)
    return PreparedSlice(plan, tiles, sizes)

"""From labelled volumes to training samples: tiles as deployment cuts them, and prompts as a detector gives them."""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from scipy import ndimage

from dendsam_deploy.errors import InvalidArgumentError, VolumeError
from dendsam_deploy.geometry import LOGIT_STRIDE_PX, Frame, default_overlap_px, region_cells, tile_grid
from dendsam_deploy.training.augment import augmented
from dendsam_deploy.training.boxes import label_components, slices_text
from dendsam_deploy.volume.intensity import to_uint8
from dendsam_deploy.volume.raster import resize_bilinear

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from dendsam_deploy.training.options import AugmentStrength
    from dendsam_deploy.volume.volume import VolumeReader

MIN_OBJECT_PX = 25
"""Least area of an object to train on, slice px; smaller ones are mostly label noise (DendriteSAM's protocol)."""

CACHE_BYTES = 2 << 30

REGION_SIZES = (8, 16)
"""Decoder regions used in training besides the whole grid, embedding cells."""

REGION_MARGIN = 0.25
"""Margin of a region around its box, as a fraction of the box's longer side."""


class LabelledSlice(NamedTuple):
    """A slice ready for sampling: grey values (Y, X) and its objects, numbered 1 to N, 0 elsewhere."""

    image: NDArray[np.uint8]
    objects: NDArray[np.int32]


class Tile(NamedTuple):
    """A training tile of side S: `image` and `objects` are zero beyond `size_hw`."""

    image: NDArray[np.uint8]
    objects: NDArray[np.int32]
    size_hw: tuple[int, int]


class TileObjects(NamedTuple):
    """Objects of a tile: their numbers (N,), tight boxes (N, 4) in tile px and areas (N,) in tile px."""

    numbers: NDArray[np.int64]
    boxes_xyxy: NDArray[np.float32]
    areas_px: NDArray[np.int64]

    def take(self, rows: NDArray[np.intp]) -> TileObjects:
        """Return some of the objects, in the order of `rows`."""
        return TileObjects(self.numbers[rows], self.boxes_xyxy[rows], self.areas_px[rows])


@dataclass(frozen=True, slots=True)
class TileRecipe:
    """How tiles are cut from a volume.

    Parameters
    ----------
    tile_size_px : int
        Side S of the model's input.
    zoom : float
        Model px per slice px at deployment.
    scale_octaves : float
        Training varies the zoom by up to this many octaves either way.
    stretch : float
        The zooms of the two axes differ by up to this fraction.
    augment : str
        How much else is varied; see `options.AUGMENT_STRENGTHS`.
    """

    tile_size_px: int
    zoom: float
    scale_octaves: float = 0.35
    stretch: float = 0.12
    augment: AugmentStrength = "light"


class LabelledVolume:
    """Random access to the slices of a labelled volume that may be used, with a bounded cache of prepared ones.

    Parameters
    ----------
    image, labels : VolumeReader
        Open readers of the same shape; they stay open as long as this object is used.
    slices : sequence of int
        The slices that may be used, ascending; a range where they are contiguous.
    background : tuple of int
        Labels that are not objects, such as a membrane class; 0 never is one.
    least_px : float
        Least area of an object in a slice, slice px; smaller ones are left out, as unlabelled.

    Raises
    ------
    VolumeError
        If the shapes differ.
    """

    def __init__(
        self,
        image: VolumeReader,
        labels: VolumeReader,
        slices: Sequence[int],
        background: tuple[int, ...] = (),
        least_px: float = MIN_OBJECT_PX,
    ) -> None:
        if image.info.shape_zyx != labels.info.shape_zyx:
            raise VolumeError(
                f"{labels.info.source}: its shape {labels.info.shape_zyx} (z, y, x) differs from "
                f"{image.info.shape_zyx} of {image.info.source}; give the labels of the same volume"
            )
        self.slices = slices
        self.cache_bytes = CACHE_BYTES
        """Prepared slices are kept up to that size, at least one."""
        self.depth = image.info.shape_zyx[0]
        self.source, self.labels_source = str(image.info.source), str(labels.info.source)
        self.least_px = least_px
        self._image, self._labels, self._background = image, labels, background
        self._cache: OrderedDict[int, LabelledSlice] = OrderedDict()
        self._cached_bytes = 0

    def __getitem__(self, z: int) -> LabelledSlice:
        """Return slice `z`, prepared; slices that may not be used are refused."""
        if z not in self.slices:
            raise InvalidArgumentError(f"slice {z} is none of the slices {slices_text(self.slices)} in use")
        if z in self._cache:
            self._cache.move_to_end(z)
            return self._cache[z]
        labels = self._labels.read(z).astype(np.uint32)
        if self._background:
            labels[np.isin(labels, self._background)] = 0
        image = to_uint8(self._image.read(z), f"{self._image.info.source}: slice {z}")
        objects = label_components(labels)[0]
        objects[(np.bincount(objects.ravel()) < self.least_px)[objects]] = 0
        prepared = LabelledSlice(image, objects)
        self._cache[z] = prepared
        self._cached_bytes += sum(array.nbytes for array in prepared)
        while self._cached_bytes > self.cache_bytes and len(self._cache) > 1:
            _, oldest = self._cache.popitem(last=False)
            self._cached_bytes -= sum(array.nbytes for array in oldest)
        return prepared

    def object_areas(self, count: int = 16) -> NDArray[np.int64]:
        """Return the areas, slice px, of the objects worth training on in up to `count` evenly spaced slices.

        Where those show none, as in a volume of which few slices are labelled, all slices are searched.
        """
        sampled = self._areas(self.slices[:: math.ceil(len(self.slices) / count)])
        return sampled if len(sampled) else self._areas(self.slices)

    def _areas(self, slices: Sequence[int]) -> NDArray[np.int64]:
        areas = [np.bincount(self[z].objects.ravel())[1:] for z in slices]
        every = np.concatenate([np.zeros(0, np.int64), *areas]).astype(np.int64)
        return every[every > 0]  # the numbers of those that were left out have none


def random_tile(volume: LabelledVolume, recipe: TileRecipe, rng: np.random.Generator) -> Tile:
    """Cut a random tile out of a random slice and vary it in every way that EM varies."""
    source = volume[int(rng.choice(volume.slices))]
    zoom = recipe.zoom * 2 ** rng.uniform(-recipe.scale_octaves, recipe.scale_octaves)
    stretch = 1 + rng.uniform(-recipe.stretch, recipe.stretch)
    zooms = np.array([zoom * stretch, zoom / stretch])
    shape = np.array(source.image.shape)
    extent = np.minimum(np.ceil(recipe.tile_size_px / zooms).astype(int), shape)
    corner = rng.integers(0, shape - extent + 1)
    window = tuple(slice(first, first + length) for first, length in zip(corner, extent, strict=True))
    target = np.clip(np.round(extent * zooms).astype(int), 1, recipe.tile_size_px)
    image, objects = _resampled(source.image[window], source.objects[window], (int(target[0]), int(target[1])))
    image, objects = augmented(image, objects, recipe.augment, rng)
    return _padded(image, objects, recipe.tile_size_px)


def deployed_tiles(source: LabelledSlice, recipe: TileRecipe) -> list[Tile]:
    """Cut a slice into the tiles of deployment, in row-major order."""
    height, width = source.image.shape
    frame = Frame.from_zoom((height, width), (recipe.zoom, recipe.zoom))
    image, objects = _resampled(source.image, source.objects, frame.model_hw)
    side = recipe.tile_size_px
    windows = [tile.read.slices for tile in tile_grid(frame.model_hw, side, default_overlap_px(side))]
    return [_padded(image[window], objects[window], side) for window in windows]


def spread_slices(volume: LabelledVolume, count: int) -> list[int]:
    """Return up to `count` evenly spaced slices of those that may be used."""
    places = np.linspace(0, len(volume.slices) - 1, min(count, len(volume.slices))).round().astype(int)
    return [volume.slices[int(place)] for place in places]


def tile_objects(tile: Tile, min_area_px: float) -> TileObjects:
    """List the objects of a tile that have at least `min_area_px` tile px."""
    areas = np.bincount(tile.objects.ravel())
    windows = ndimage.find_objects(tile.objects)
    numbers = np.array(
        [i + 1 for i, window in enumerate(windows) if window is not None and areas[i + 1] >= min_area_px], np.int64
    )
    boxes = np.array(
        [(x.start, y.start, x.stop, y.stop) for y, x in (windows[n - 1] for n in numbers)], np.float32
    ).reshape(-1, 4)
    return TileObjects(numbers, boxes, areas[numbers].astype(np.int64))


def jittered_boxes(
    boxes_xyxy: NDArray[np.float32], jitter: tuple[float, float], exact_fraction: float, rng: np.random.Generator
) -> NDArray[np.float32]:
    """Draw boxes as wrong as a detector's.

    Parameters
    ----------
    boxes_xyxy : ndarray, shape (N, 4)
        Tight boxes.
    jitter : (float, float)
        Each box gets an error between these fractions of its sides; each edge moves by up to that much.
    exact_fraction : float
        Part of the boxes that stay exact.
    rng : numpy.random.Generator
        Source of all choices.
    """
    count = len(boxes_xyxy)
    sides = boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]
    error = rng.uniform(*jitter, (count, 1)) * (rng.random((count, 1)) >= exact_fraction)
    shift = rng.uniform(-1, 1, (count, 4)) * error * np.tile(sides, 2)
    return (boxes_xyxy + shift).astype(np.float32)


def boxes_by_region(boxes_xyxy: NDArray[np.float32], grid: int) -> list[tuple[int, NDArray[np.intp]]]:
    """Group boxes ``(N, 4)`` in tile px by the decoder region, in embedding cells, that holds each with a margin.

    Returns
    -------
    list of (int, ndarray)
        Side of a region and the rows of its boxes; sides ascend up to `grid`, and groups without boxes are left out.
    """
    sizes = [*(size for size in REGION_SIZES if size < grid), grid]
    longest = (boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]).max(1, initial=0)
    chosen = np.array(
        [region_cells(box, REGION_MARGIN * side, sizes) for box, side in zip(boxes_xyxy, longest, strict=True)],
        np.int64,
    )
    return [(size, np.nonzero(chosen == size)[0]) for size in sizes if (chosen == size).any()]


def coverage(objects: NDArray[np.int32], number: int, origin_yx: NDArray[np.int64], side: int) -> NDArray[np.float32]:
    """Return which part of each mask cell of a region an object covers.

    Parameters
    ----------
    objects : ndarray, shape (S, S), int32
        Numbered objects.
    number : int
        The object.
    origin_yx : ndarray, shape (2,), int64
        First cell of the region in the S/4 grid.
    side : int
        Cells per side of the region.

    Returns
    -------
    ndarray, shape (side, side), float32
    """
    cell = LOGIT_STRIDE_PX
    y, x = (int(first) * cell for first in origin_yx)
    window = objects[y : y + side * cell, x : x + side * cell] == number
    part: NDArray[np.float32] = window.reshape(side, cell, side, cell).mean((1, 3), dtype=np.float32)
    return part


def dense_targets(tile: Tile, cell: int) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """Return borders (g, g), offsets (y, x) to the object's centre (2, g, g), tile px, and where these hold (g, g)."""
    objects = tile.objects
    border = np.zeros(objects.shape, bool)
    border[:, 1:] |= objects[:, 1:] != objects[:, :-1]
    border[1:] |= objects[1:] != objects[:-1]
    grid = objects.shape[0] // cell
    border_cells: NDArray[np.float32] = border.reshape(grid, cell, grid, cell).max((1, 3)).astype(np.float32)
    centre_of = np.zeros((2, int(objects.max()) + 1), np.float32)
    for number, window in enumerate(ndimage.find_objects(objects), start=1):
        if window is not None:
            centre_of[:, number] = [(axis.start + axis.stop) / 2 for axis in window]
    sampled = objects[cell // 2 :: cell, cell // 2 :: cell]
    position = np.mgrid[0:grid, 0:grid].astype(np.float32) * cell + cell // 2 + 0.5
    offset: NDArray[np.float32] = (centre_of[:, sampled] - position).astype(np.float32)
    return border_cells, offset, (sampled > 0).astype(np.float32)


def _resampled(
    image: NDArray[np.uint8], objects: NDArray[np.int32], shape_hw: tuple[int, int]
) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
    """Resample an image as deployment does, and its objects by nearest neighbour."""
    if image.shape == shape_hw:
        return image, objects
    rows, columns = (
        ((np.arange(new) + 0.5) * old / new).astype(int) for new, old in zip(shape_hw, objects.shape, strict=True)
    )
    return resize_bilinear(np.ascontiguousarray(image), shape_hw), objects[rows[:, None], columns]


def _padded(image: NDArray[np.uint8], objects: NDArray[np.int32], side: int) -> Tile:
    """Pad with zeros at the right and the bottom to a square tile."""
    missing = [(0, side - length) for length in image.shape]
    return Tile(np.pad(image, missing), np.pad(objects, missing), (image.shape[0], image.shape[1]))

"""The detector's training set on disk: tiles as deployment cuts them, and the boxes of the objects that they show."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dendsam_deploy.errors import StorageError
from dendsam_deploy.training.samples import (
    MIN_OBJECT_PX,
    Tile,
    TileRecipe,
    deployed_tiles,
    random_tile,
    spread_slices,
    tile_objects,
)
from dendsam_deploy.volume.raster import encode_png

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    from dendsam_deploy.training.samples import LabelledVolume


@dataclass(frozen=True, slots=True)
class BoxStatistics:
    """What the training tiles hold, to be compared with what a detector can do.

    Parameters
    ----------
    tiles : int
        Number of tiles.
    objects : int
        Number of boxes in all of them.
    most_per_tile : int
        Boxes on the fullest tile.
    short_side_px : (float, float, float)
        5th, 50th and 95th percentile of the shorter side of a box, tile px.
    """

    tiles: int
    objects: int
    most_per_tile: int
    short_side_px: tuple[float, float, float]


def write_tiles(folder: Path, split: str, tiles: Iterable[Tile], min_area_px: float) -> BoxStatistics:
    """Write tiles as PNG files and their boxes as YOLO text files.

    Parameters
    ----------
    folder : Path
        The training set; gets ``images/<split>`` and ``labels/<split>``.
    split : str
        ``train`` or ``val``.
    tiles : iterable of Tile
        Each is written before the next one is asked for.
    min_area_px : float
        Objects that show less, tile px, are left out.

    Raises
    ------
    StorageError
        If the file system refuses.
    """
    counts: list[int] = []
    sides: list[NDArray[np.float32]] = [np.zeros(0, np.float32)]
    try:
        for kind in ("images", "labels"):
            (folder / kind / split).mkdir(parents=True, exist_ok=True)
        for number, tile in enumerate(tiles):
            boxes = tile_objects(tile, min_area_px).boxes_xyxy
            (folder / "images" / split / f"{number:06d}.png").write_bytes(encode_png(tile.image))
            (folder / "labels" / split / f"{number:06d}.txt").write_text(_yolo_lines(boxes, tile.image.shape[0]))
            counts.append(len(boxes))
            sides.append((boxes[:, 2:] - boxes[:, :2]).min(axis=1))
    except OSError as error:
        raise StorageError(
            f"{folder}: cannot write the training tiles ({error.strerror or error}); free space or choose another place"
        ) from error
    every = np.concatenate(sides)
    low, middle, high = np.percentile(every, [5, 50, 95]).tolist() if len(every) else (0.0, 0.0, 0.0)
    return BoxStatistics(len(counts), len(every), max(counts, default=0), (low, middle, high))


def training_tiles(volume: LabelledVolume, recipe: TileRecipe, count: int, seed: int) -> Iterator[Tile]:
    """Yield random tiles, each varied in scale, orientation and intensity."""
    for number in range(count):
        yield random_tile(volume, recipe, np.random.default_rng([seed, number]))


def held_out_tiles(volume: LabelledVolume, recipe: TileRecipe, most: int) -> Iterator[Tile]:
    """Yield the tiles of evenly spaced slices exactly as deployment cuts them, about `most` in all."""
    per_slice = len(deployed_tiles(volume[volume.slices[0]], recipe))
    for z in spread_slices(volume, max(1, most // per_slice)):
        yield from deployed_tiles(volume[z], recipe)


def least_area_px(recipe: TileRecipe) -> float:
    """Return the least area, tile px, of an object to learn: half of the smallest one, which a border may have cut."""
    return MIN_OBJECT_PX * recipe.zoom**2 / 2


def _yolo_lines(boxes_xyxy: NDArray[np.float32], tile_size_px: int) -> str:
    """Write boxes (N, 4) in tile px as lines of class, centre and size in parts of the tile."""
    centre, size = (boxes_xyxy[:, :2] + boxes_xyxy[:, 2:]) / 2, boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]
    rows = np.concatenate([centre, size], axis=1) / tile_size_px
    return "".join(f"0 {x:.6f} {y:.6f} {w:.6f} {h:.6f}\n" for x, y, w, h in rows)

"""The detector's training set on disk: tiles as deployment cuts them, and the boxes of the objects that they show."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dendsam_deploy.errors import StorageError
from dendsam_deploy.training.samples import (
    Tile,
    TileRecipe,
    deployed_tiles,
    random_tile,
    spread_slices,
    tile_objects,
)
from dendsam_deploy.training.source import judged_volumes
from dendsam_deploy.volume.raster import encode_png

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from dendsam_deploy.training.samples import LabelledVolume
    from dendsam_deploy.training.source import TrainingSource


@dataclass(frozen=True, slots=True)
class BoxStatistics:
    """What the training tiles hold, in a few numbers.

    Parameters
    ----------
    tiles : int
        Number of tiles.
    objects : int
        Number of boxes in all of them.
    most_per_tile : int
        Boxes on the fullest tile.
    short_side_px, long_side_px, aspect : (float, float, float)
        5th, 50th and 95th percentile of the shorter and the longer side of a box, tile px, and of their ratio.
    """

    tiles: int
    objects: int
    most_per_tile: int
    short_side_px: tuple[float, float, float]
    long_side_px: tuple[float, float, float]
    aspect: tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class TileBoxes:
    """The boxes of some tiles: one array (n, 4) for each, corners in tile px."""

    per_tile: tuple[NDArray[np.float32], ...]

    @property
    def objects(self) -> int:
        """Boxes of all tiles."""
        return int(self.objects_per_tile.sum())

    @property
    def objects_per_tile(self) -> NDArray[np.int64]:
        """Boxes of each tile."""
        return np.array([len(boxes) for boxes in self.per_tile], np.int64)

    @property
    def short_side_px(self) -> NDArray[np.float32]:
        """Shorter side of every box, tile px."""
        shorter: NDArray[np.float32] = self._sides.min(axis=1)
        return shorter

    @property
    def long_side_px(self) -> NDArray[np.float32]:
        """Longer side of every box, tile px."""
        longer: NDArray[np.float32] = self._sides.max(axis=1)
        return longer

    @property
    def aspect(self) -> NDArray[np.float32]:
        """Longer by shorter side of every box."""
        ratio: NDArray[np.float32] = (self.long_side_px / np.maximum(self.short_side_px, 1)).astype(np.float32)
        return ratio

    @property
    def _sides(self) -> NDArray[np.float32]:
        every = np.concatenate([np.zeros((0, 4), np.float32), *self.per_tile])
        sides: NDArray[np.float32] = every[:, 2:] - every[:, :2]
        return sides

    def statistics(self) -> BoxStatistics:
        """Sum them up."""
        short, long, aspect = (
            tuple(np.percentile(values, [5, 50, 95]).tolist()) if len(values) else (0.0, 0.0, 0.0)
            for values in (self.short_side_px, self.long_side_px, self.aspect)
        )
        most = int(self.objects_per_tile.max(initial=0))
        return BoxStatistics(len(self.per_tile), self.objects, most, short, long, aspect)


class TileAt(NamedTuple):
    """A tile, the least area, tile px, of an object to learn or to find on it, and where it is from."""

    tile: Tile
    least_area_px: float
    place: str = ""

    @property
    def boxes_xyxy(self) -> NDArray[np.float32]:
        """Boxes (N, 4) of its objects, tile px."""
        return tile_objects(self.tile, self.least_area_px).boxes_xyxy


def write_tiles(folder: Path, split: str, tiles: Iterable[TileAt]) -> TileBoxes:
    """Write tiles as PNG files and their boxes as YOLO text files.

    Parameters
    ----------
    folder : Path
        The training set; gets ``images/<split>`` and ``labels/<split>``.
    split : str
        ``train`` or ``val``.
    tiles : iterable of TileAt
        Each is written before the next one is asked for.

    Raises
    ------
    StorageError
        If the file system refuses.
    """
    found: list[NDArray[np.float32]] = []
    try:
        for kind in ("images", "labels"):
            (folder / kind / split).mkdir(parents=True, exist_ok=True)
        for number, entry in enumerate(tiles):
            boxes, image = entry.boxes_xyxy, entry.tile.image
            (folder / "images" / split / f"{number:06d}.png").write_bytes(encode_png(image))
            (folder / "labels" / split / f"{number:06d}.txt").write_text(_yolo_lines(boxes, image.shape[0]))
            found.append(boxes)
    except OSError as error:
        raise StorageError(
            f"{folder}: cannot write the training tiles ({error.strerror or error}); free space or choose another place"
        ) from error
    return TileBoxes(tuple(found))


def training_tiles(sources: Sequence[TrainingSource], count: int, seed: int) -> Iterator[TileAt]:
    """Yield random tiles of volumes, drawn in proportion to their weights, each varied as its recipe says."""
    weights = np.array([source.weight for source in sources])
    for number in range(count):
        rng = np.random.default_rng([seed, number])
        source = sources[int(rng.choice(len(sources), p=weights / weights.sum()))]
        yield TileAt(random_tile(source.train, source.recipe, rng), least_area_px(source.train, source.recipe))


def held_out_tiles(sources: Sequence[TrainingSource], most: int) -> list[TileAt]:
    """Return the tiles of evenly spaced held-out slices exactly as deployment cuts them, about `most` in all.

    Every volume that holds slices out has the same part in them.
    """
    chosen = []
    judged = judged_volumes(sources)
    for source, volume in judged:
        per_slice = len(deployed_tiles(volume[volume.slices[0]], source.recipe))
        for z in spread_slices(volume, max(1, most // len(judged) // per_slice)):
            least_px = least_area_px(volume, source.recipe)
            for number, tile in enumerate(deployed_tiles(volume[z], source.recipe)):
                chosen.append(TileAt(tile, least_px, f"{source.name}, slice {z}, tile {number}"))
    return chosen


def least_area_px(volume: LabelledVolume, recipe: TileRecipe) -> float:
    """Return the least area, tile px, of an object to learn: half of the smallest one, which a border may have cut."""
    return max(volume.least_px * recipe.zoom**2 / 2, 1.0)


def _yolo_lines(boxes_xyxy: NDArray[np.float32], tile_size_px: int) -> str:
    """Write boxes (N, 4) in tile px as lines of class, centre and size in parts of the tile."""
    centre, size = (boxes_xyxy[:, :2] + boxes_xyxy[:, 2:]) / 2, boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]
    rows = np.concatenate([centre, size], axis=1) / tile_size_px
    return "".join(f"0 {x:.6f} {y:.6f} {w:.6f} {h:.6f}\n" for x, y, w, h in rows)

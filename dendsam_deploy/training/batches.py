"""What one training step learns from: random tiles of labelled volumes, some of their objects, and their prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dendsam_deploy.errors import VolumeError
from dendsam_deploy.training.samples import (
    MIN_OBJECT_PX,
    Tile,
    TileObjects,
    coverage,
    jittered_boxes,
    random_points,
    random_tile,
    tile_objects,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from dendsam_deploy.training.sam_options import SamTrainingOptions
    from dendsam_deploy.training.source import TrainingSource

MOST_TILES_DRAWN = 5000
"""Tiles drawn for one step, nearly all of them without an object, before training gives up."""


class Batch(NamedTuple):
    """Tiles, and n prompted objects in the order of their tiles.

    Of the objects, `numbers` (n,) are their numbers on the tile `tile_index` (n,), `boxes_xyxy` (n, 4) their tight
    boxes and `prompts` boxes (n, 4) or points (n, 2), all in tile px.
    """

    tiles: tuple[Tile, ...]
    numbers: NDArray[np.int64]
    tile_index: NDArray[np.int64]
    boxes_xyxy: NDArray[np.float32]
    prompts: NDArray[np.float32]
    use_points: bool

    def coverage(self, rows: NDArray[np.intp], origins_yx: NDArray[np.int64], side: int) -> NDArray[np.float32]:
        """Return which part of each cell of its region each object covers, ``(n, side, side)``, in S/4 cells."""
        return np.stack(
            [
                coverage(self.tiles[self.tile_index[row]].objects, int(self.numbers[row]), origin, side)
                for row, origin in zip(rows, origins_yx, strict=True)
            ]
        )


def draw_batch(sources: Sequence[TrainingSource], options: SamTrainingOptions, rng: np.random.Generator) -> Batch:
    """Draw the tiles, objects and prompts of a step.

    Parameters
    ----------
    sources : sequence of TrainingSource
        Drawn from in proportion to their weights.
    options : SamTrainingOptions
        Sizes of the batch and kinds of prompts.
    rng : numpy.random.Generator
        Source of all choices.

    Raises
    ------
    VolumeError
        If the labels are so sparse that no tile shows an object.
    """
    weights = np.array([source.weight for source in sources])
    use_points = bool(rng.random() < options.point_fraction)
    tiles: list[Tile] = []
    chosen: list[TileObjects] = []
    prompts: list[NDArray[np.float32]] = []
    for _ in range(MOST_TILES_DRAWN):
        source = sources[int(rng.choice(len(sources), p=weights / weights.sum()))]
        tile = random_tile(source.train, source.recipe, rng)
        objects = tile_objects(tile, MIN_OBJECT_PX * source.recipe.zoom**2 / 2)
        if not len(objects.numbers):
            continue  # it would teach a box decoder nothing
        objects = objects.take(rng.permutation(len(objects.numbers))[: options.objects_per_tile])
        tiles.append(tile)
        chosen.append(objects)
        if use_points:
            prompts.append(random_points(tile.objects, objects.numbers, objects.boxes_xyxy, rng))
        else:
            prompts.append(jittered_boxes(objects.boxes_xyxy, options.box_jitter, options.exact_fraction, rng))
        if len(tiles) == (options.tiles_per_step or 1):
            return Batch(
                tiles=tuple(tiles),
                numbers=np.concatenate([objects.numbers for objects in chosen]),
                tile_index=np.repeat(np.arange(len(chosen)), [len(objects.numbers) for objects in chosen]),
                boxes_xyxy=np.concatenate([objects.boxes_xyxy for objects in chosen]),
                prompts=np.concatenate(prompts),
                use_points=use_points,
            )
    raise VolumeError(f"hardly any of {MOST_TILES_DRAWN} random tiles shows an object; choose slices that are labelled")

"""What one training step learns from: random tiles of labelled volumes, some of their objects, and their prompts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dendsam_deploy.errors import VolumeError
from dendsam_deploy.training.prompts import random_points
from dendsam_deploy.training.samples import (
    MIN_OBJECT_PX,
    Tile,
    TileObjects,
    coverage,
    jittered_boxes,
    random_tile,
    tile_objects,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from dendsam_deploy.training.source import TrainingSource

MOST_TILES_DRAWN = 5000
"""Tiles drawn for one step, nearly all of them without an object, before training gives up."""


@dataclass(frozen=True, slots=True)
class BatchRecipe:
    """How a batch is drawn.

    Parameters
    ----------
    tiles : int
        Tiles of a batch.
    objects_per_tile : int
        Most objects prompted on each tile.
    box_jitter : (float, float)
        Error of prompted boxes, as fractions of their sides.
    exact_fraction : float
        Part of the boxes that stay exact.
    thickest_fraction : float
        Part of the prompted points that lie where the object is thickest.
    min_object_px : float
        Least area of an object, slice px; parts of objects at the edge of a tile may have half of it.
    """

    tiles: int = 1
    objects_per_tile: int = 16
    box_jitter: tuple[float, float] = (0.05, 0.15)
    exact_fraction: float = 0.3
    thickest_fraction: float = 0.5
    min_object_px: float = MIN_OBJECT_PX


class Batch(NamedTuple):
    """Tiles, and n prompted objects in the order of their tiles.

    Of the objects, `numbers` (n,) are their numbers on the tile `tile_index` (n,), `boxes_xyxy` (n, 4) their tight
    boxes and `prompts` boxes (n, 4) or points (n, 2), all in tile px. `sparse` are the tiles on which
    some objects have no label.
    """

    tiles: tuple[Tile, ...]
    numbers: NDArray[np.int64]
    tile_index: NDArray[np.int64]
    boxes_xyxy: NDArray[np.float32]
    prompts: NDArray[np.float32]
    use_points: bool
    sparse: tuple[int, ...] = ()

    def coverage(self, rows: NDArray[np.intp], origins_yx: NDArray[np.int64], side: int) -> NDArray[np.float32]:
        """Return which part of each cell of its region each object covers, ``(n, side, side)``, in S/4 cells."""
        return np.stack(
            [
                coverage(self.tiles[self.tile_index[row]].objects, int(self.numbers[row]), origin, side)
                for row, origin in zip(rows, origins_yx, strict=True)
            ]
        )

    def object_masks(self) -> NDArray[np.bool_]:
        """Return each object as a mask of its tile, ``(n, S, S)``."""
        pairs = zip(self.tile_index, self.numbers, strict=True)
        return np.stack([self.tiles[tile].objects == number for tile, number in pairs])


def draw_batch(
    sources: Sequence[TrainingSource], recipe: BatchRecipe, rng: np.random.Generator, *, use_points: bool
) -> Batch:
    """Draw tiles, objects and prompts.

    Parameters
    ----------
    sources : sequence of TrainingSource
        Drawn from in proportion to their weights.
    recipe : BatchRecipe
        Sizes of the batch and errors of the prompts.
    rng : numpy.random.Generator
        Source of all choices.
    use_points : bool
        Prompt with a point in each object in place of its box.

    Raises
    ------
    VolumeError
        If the labels are so sparse that no tile shows an object.
    """
    weights = np.array([source.weight for source in sources])
    tiles: list[Tile] = []
    sparse: list[int] = []
    chosen: list[TileObjects] = []
    prompts: list[NDArray[np.float32]] = []
    source: TrainingSource | None = None
    for _ in range(MOST_TILES_DRAWN):
        # A tile without an object is drawn again from the same source: sparse labels are no reason to get less.
        source = source or sources[int(rng.choice(len(sources), p=weights / weights.sum()))]
        tile = random_tile(source.train, source.recipe, rng)
        objects = tile_objects(tile, max(recipe.min_object_px * source.recipe.zoom**2 / 2, 1))
        if not len(objects.numbers):
            continue  # it would teach a decoder of prompts nothing
        objects = objects.take(rng.permutation(len(objects.numbers))[: recipe.objects_per_tile])
        sparse += [] if source.is_dense else [len(tiles)]
        tiles.append(tile)
        chosen.append(objects)
        if use_points:
            drawn = random_points(tile.objects, objects.numbers, objects.boxes_xyxy, rng, recipe.thickest_fraction)
        else:
            drawn = jittered_boxes(objects.boxes_xyxy, recipe.box_jitter, recipe.exact_fraction, rng)
        prompts.append(drawn)
        source = None
        if len(tiles) == recipe.tiles:
            return Batch(
                tiles=tuple(tiles),
                numbers=np.concatenate([objects.numbers for objects in chosen]),
                tile_index=np.repeat(np.arange(len(chosen)), [len(objects.numbers) for objects in chosen]),
                boxes_xyxy=np.concatenate([objects.boxes_xyxy for objects in chosen]),
                prompts=np.concatenate(prompts),
                use_points=use_points,
                sparse=tuple(sparse),
            )
    raise VolumeError(f"hardly any of {MOST_TILES_DRAWN} random tiles shows an object; choose slices that are labelled")

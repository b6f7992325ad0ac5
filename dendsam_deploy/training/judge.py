"""Judges a model under training: IoU of its masks with the true objects, prompted by their exact boxes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch.nn import functional

from dendsam_deploy.geometry import LOGIT_STRIDE_PX
from dendsam_deploy.training.samples import (
    MIN_OBJECT_PX,
    LabelledVolume,
    Tile,
    TileObjects,
    TileRecipe,
    boxes_by_region,
    deployed_tiles,
    spread_slices,
    tile_objects,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray
    from torch import Tensor

    from dendsam_deploy.models.box_decoder import BoxDecoderGraph
    from dendsam_deploy.models.image_encoder import ImageEncoderGraph

BOXES_AT_ONCE = 16


@dataclass(frozen=True, slots=True)
class Judgement:
    """Mean IoU with exact boxes on held-out slices after some steps and seconds of training."""

    step: int
    elapsed_s: float
    held_out_iou: float


class JudgedTile(NamedTuple):
    """A tile of a held-out slice and those of its objects that are large enough to count."""

    tile: Tile
    objects: TileObjects


def judged_tiles(volume: LabelledVolume, recipe: TileRecipe, slices: int) -> list[JudgedTile]:
    """Choose what to judge by: of each of up to `slices` evenly spaced slices one tile with objects.

    The tiles are those of deployment, and of one slice after the other they lie ever further down. Where the spaced
    slices show nothing, all slices are searched. The list is empty only where no tile shows a whole object of
    `MIN_OBJECT_PX`.
    """
    spread = spread_slices(volume, slices)
    chosen: list[JudgedTile] = []
    for turn, z in enumerate(spread):
        shown = _tiles_with_objects(volume, z, recipe)
        chosen += shown[turn * len(shown) // len(spread) :][:1]
    if not chosen:
        chosen = next((shown for z in volume.slices if (shown := _tiles_with_objects(volume, z, recipe))), [])
    return chosen


def _tiles_with_objects(volume: LabelledVolume, z: int, recipe: TileRecipe) -> list[JudgedTile]:
    """Return the tiles of a slice that show objects worth judging."""
    tiles = deployed_tiles(volume[z], recipe)
    judged = [JudgedTile(tile, tile_objects(tile, MIN_OBJECT_PX * recipe.zoom**2)) for tile in tiles]
    return [entry for entry in judged if len(entry.objects.numbers)]


@torch.no_grad()
def box_prompt_iou(
    encoder: ImageEncoderGraph, decoder: BoxDecoderGraph, judged: Iterable[JudgedTile]
) -> NDArray[np.float64]:
    """Return the IoU of each object's mask with the object; masks are upsampled bilinearly and cut at logit 0.

    Returns
    -------
    ndarray, shape (N,), float64
    """
    encoder.eval()
    decoder.eval()
    device = decoder.image_position.device
    scores: list[float] = []
    for tile, objects in judged:
        image = torch.from_numpy(tile.image)[None].to(device)
        embeddings = encoder(image, torch.tensor([tile.size_hw], device=device)).float()
        for region, rows in boxes_by_region(objects.boxes_xyxy, decoder.grid):
            for some in np.array_split(rows, math.ceil(len(rows) / BOXES_AT_ONCE)):
                chosen = objects.take(some)
                scores.extend(_region_iou(decoder, embeddings, tile, chosen, region))
    return np.array(scores, np.float64)


def _region_iou(
    decoder: BoxDecoderGraph, embeddings: Tensor, tile: Tile, objects: TileObjects, region: int
) -> list[float]:
    """Decode some boxes of a tile on regions of one size and return their masks' IoU with the whole objects."""
    boxes = torch.from_numpy(objects.boxes_xyxy).to(embeddings.device)
    index = torch.zeros(len(boxes), dtype=torch.int64, device=embeddings.device)
    logits, origin, _ = decoder(embeddings, boxes, index, torch.tensor([region], device=embeddings.device))
    masks = functional.interpolate(logits[None], scale_factor=LOGIT_STRIDE_PX, mode="bilinear")[0] > 0
    corners = origin.cpu().numpy() * LOGIT_STRIDE_PX
    scores = []
    for mask, (y, x), number, area in zip(masks.cpu().numpy(), corners, objects.numbers, objects.areas_px, strict=True):
        valid = mask[: max(tile.size_hw[0] - y, 0), : max(tile.size_hw[1] - x, 0)]
        true = tile.objects[y : y + valid.shape[0], x : x + valid.shape[1]] == number
        overlap = int((valid & true).sum())
        scores.append(overlap / (int(valid.sum()) + int(area) - overlap))
    return scores

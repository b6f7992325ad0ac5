"""Judges a model under training: IoU of its masks with the true objects, prompted by their exact boxes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

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
    deployed_tile,
    tile_objects,
)

if TYPE_CHECKING:
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


@torch.no_grad()
def box_prompt_iou(
    encoder: ImageEncoderGraph, decoder: BoxDecoderGraph, volume: LabelledVolume, recipe: TileRecipe, slices: int
) -> NDArray[np.float64]:
    """Return the IoU of each object's mask with the object, on up to `slices` evenly spaced slices.

    The top left tile of each slice is judged; masks are upsampled bilinearly to tile px and cut at logit 0.

    Returns
    -------
    ndarray, shape (N,), float64
    """
    encoder.eval()
    decoder.eval()
    count = min(slices, len(volume.slices))
    sampled = [volume.slices[round(i * (len(volume.slices) - 1) / max(count - 1, 1))] for i in range(count)]
    device = decoder.image_position.device
    scores: list[float] = []
    for z in sampled:
        tile = deployed_tile(volume[z], recipe)
        objects = tile_objects(tile, MIN_OBJECT_PX * recipe.zoom**2)
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
